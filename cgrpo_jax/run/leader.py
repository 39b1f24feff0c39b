"""What only the leader of a run has and does: data, graders, critics, files and clocks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence

from cgrpo_jax.config import critic_of, reference_of, samples_refinements
from cgrpo_jax.data.sources import Problems, rows_of_step
from cgrpo_jax.evaluation.exam import Exam, accuracies
from cgrpo_jax.grading import rewards
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.learning.telling import Update, told_groups, told_rows
from cgrpo_jax.process.user import UserProcess
from cgrpo_jax.records import Group, Problem
from cgrpo_jax.rollout.collect import Method, Score, by_rule, groups_of, stories_of
from cgrpo_jax.rollout.critics import Brief
from cgrpo_jax.rollout.served import Server
from cgrpo_jax.rollout.stories import Completions, Stories
from cgrpo_jax.rollout.written import critic_and_scorer, introduce
from cgrpo_jax.run.build import Run
from cgrpo_jax.run.opening import open_all
from cgrpo_jax.run.step_log import StepLog
from cgrpo_jax.text.tokenizer import Pieces
from cgrpo_jax.workdir.progress import Progress, Silence


@dataclasses.dataclass
class Desk:
    """Everything that the leader works with over a run. The other hosts have no desk: they are told what to compute."""

    run: Run
    progress: Progress
    problems: Problems
    evaluations: dict[str, list[Problem]]  # metric name -> problems; none without eval.every
    longest_prompt: int  # tokens, of the training problems that were looked at
    log: StepLog
    method: Method  # of each problem of training
    score: Score

    def stories(self, step: int, problems_seen: int, count: int | None = None) -> Stories:
        """The rollout of a step, of the problems of the stream from `problems_seen` on; see `collect.groups_of`.

        Args:
          count: so many problems and no replacements; None: train.prompts, with replacements.
        """
        cfg = self.run.cfg
        problems = self.problems.batch(cfg.seed, problems_seen, count or cfg.train.prompts)
        first = problems_seen + cfg.train.prompts
        places = range(first, first + (0 if count else cfg.train.replacements))
        spare = (problem for place in places for problem in self.problems.batch(cfg.seed, place, 1))
        return stories_of(problems, self.method, step, self.progress.phase, cfg.verifier.workers, spare)

    def groups(self, stories: Stories) -> list[Group]:
        """The groups of a rollout that has ended, in the order of its problems; see `collect.groups_of`."""
        return groups_of(stories)

    def updates(self, step: int, groups: Sequence[Group] | None, completions: Completions) -> tuple[list[Update], int]:
        """What each update of a step learns, and how many problems or rows of the stream the step took.

        Args:
          groups: of the rollout of the step; None: in method=sft it learns rows of the file.
          completions: what every host sampled in this step.
        """
        cfg, encoder = self.run.cfg, self.run.policy.tokenizer
        if groups is not None:
            limit = float(cfg.sampling.max_new_tokens)
            return told_groups(groups, cfg.objective, limit, cfg.train.updates_per_rollout, completions), len(groups)
        rows = rows_of_step(self.problems, cfg.data.source, cfg.seed, step, cfg.train.prompts)
        encoded = [(encoder.encode_chat(messages), encoder.encode_answer(text)) for messages, text in rows]
        return [told_rows(encoded)], cfg.train.prompts

    def exam(self) -> Exam:
        """The held-out problems as questions to the policy."""
        return Exam(list(self.evaluations.values()), self.run.cfg.eval.samples, self.run.policy.tokenizer)

    def log_exam(self, step: int, exam: Exam) -> dict[str, float]:
        """Grades the answers of an evaluation; writes and shows the accuracies."""
        values, graded = dict[str, float](), exam.graded(functools.partial(self.score, step=step))
        for (name, asked), attempts in zip(self.evaluations.items(), graded, strict=True):
            values |= accuracies(asked, attempts, name)
        self.log.evaluation(step, values)
        return values


@contextlib.contextmanager
def open_desk(run: Run, progress: Progress | Silence, workdir: pathlib.Path) -> Iterator[Desk | None]:
    """Loads the data and starts the graders; everything that can be refused is refused here.

    Args:
      progress: of the leader; silence on the other hosts, which have no desk.
    """
    if isinstance(progress, Silence):
        yield None
        return
    with contextlib.ExitStack() as stack:
        cfg = run.cfg
        verifier = stack.enter_context(Verifier(cfg.verifier))
        asks = critic_of(cfg).by == "server" and samples_refinements(cfg)
        server = stack.enter_context(Server(cfg.api, workdir / "critiques")) if asks else None
        process = stack.enter_context(UserProcess())
        texts, own, own_critic, loaded = open_all(cfg, run.policy.tokenizer, verifier, process, progress.log)
        brief = Brief(cfg.refine, reference_of(cfg), texts.critique)
        if cfg.method in ("rl", "generate") and samples_refinements(cfg):
            introduce(brief, loaded[0], cfg.data.source, server, progress.log)
        score = functools.partial(rewards.score, verifier=verifier, cfg=cfg.reward, own=own)
        second = run.second.tokenizer if run.second else None
        rule = functools.partial(by_rule, score, run.policy.tokenizer)
        criticise, scorer = critic_and_scorer(brief, run.policy.tokenizer, rule, server, second, own_critic)
        method = Method(
            samples=cfg.train.samples,
            scorer=scorer,
            criticise=criticise,
            tokenizer=run.policy.tokenizer,
            refine=cfg.refine,
            seed=cfg.seed,
            texts=texts,
            trace_tokens=cfg.sampling.max_new_tokens,
            local=second if cfg.refine.refiner == "local" else None,
        )
        log = StepLog(cfg, progress, Pieces(run.policy.tokenizer), server)
        yield Desk(run, progress, *loaded, log, method, score)
        if log.writer is not None:
            log.writer.close()
