"""What the leader of a run alone has and does: data, graders, critics, files and clocks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cgrpo_jax.config import Config, critic_of, fallback, public, reference_of, samples_refinements
from cgrpo_jax.config.options import drawn
from cgrpo_jax.config.secrecy import public_url
from cgrpo_jax.data import arithmetic
from cgrpo_jax.data.sources import Problems
from cgrpo_jax.data.told import for_others
from cgrpo_jax.evaluation.sample import Exam, accuracies
from cgrpo_jax.grading import rewards
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.learning import credit
from cgrpo_jax.learning.packing import Bins, BinSize, pack_smallest
from cgrpo_jax.process.hosts import Hosts
from cgrpo_jax.process.user import UserProcess
from cgrpo_jax.records import Group, Problem, Segment
from cgrpo_jax.rollout.collect import Method, Score, by_rule, stories_of
from cgrpo_jax.rollout.critics import Brief
from cgrpo_jax.rollout.introducing import introduce
from cgrpo_jax.rollout.served import Server
from cgrpo_jax.rollout.stories import Stories
from cgrpo_jax.rollout.written import critic_and_scorer
from cgrpo_jax.run.build import Run, terms
from cgrpo_jax.run.opening import open_all, open_run
from cgrpo_jax.run.startup import lines
from cgrpo_jax.sampling.pool import Stats
from cgrpo_jax.text.pieces import Pieces
from cgrpo_jax.text.stop import going_on
from cgrpo_jax.workdir.lock import exclusive
from cgrpo_jax.workdir.metrics import Writer, group_metrics, update_metrics
from cgrpo_jax.workdir.progress import Progress, Silence
from cgrpo_jax.workdir.tracking import open_tracker

OnRow = Callable[[dict[str, Any]], None]


@dataclasses.dataclass
class Desk:
    """The leader's things; the other hosts of a run have none."""

    run: Run
    progress: Progress
    problems: Problems
    evaluations: dict[str, list[Problem]]  # metric name -> problems; none without eval.every
    longest_prompt: int  # tokens, of the training problems that were looked at
    pieces: Pieces
    method: Method  # of each problem of training
    score: Score
    server: Server | None = None  # of critique=api
    looked: bool = False  # at the texts of a rollout, whether they go on behind their answer
    writer: Writer | None = None  # once it is known where the run begins

    def open_files(self, workdir: pathlib.Path, step: int, on_row: OnRow | None = None) -> None:
        """Opens the files of the workdir, and the tracker, behind `step`.

        Args:
          on_row: is given each line of metrics.jsonl.
        """
        cfg, log = self.run.cfg, self.progress.log
        tracker = open_tracker(cfg.train.tracker, workdir, for_others(public(cfg)), log)
        self.writer = Writer(workdir, step, log, on_row, tracker)

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

    def bins(self, step: int, groups: Sequence[Group] | None, sizes: Sequence[BinSize]) -> list[Bins]:
        """The bins of each update of a step: of the groups of its rollout, or in method=sft of rows to learn."""
        segments = [self.rows(step)] if groups is None else segments_of(groups, self.run.cfg)
        return [pack_smallest(part, sizes, terms(self.run.cfg)) for part in segments]

    def rows(self, step: int) -> list[Segment]:
        """What a step of method=sft learns: rows of the stream, in a seeded order that is a new one each epoch.

        Of the warm start (data.source=arithmetic) plain rows and refinements, which are much longer, take turns, so
        that neither is padded to the length of the other.
        """
        cfg, tokenizer, first = self.run.cfg, self.run.policy.tokenizer, step * self.run.cfg.train.prompts
        if cfg.data.source == "arithmetic":
            indices = range(first, first + cfg.train.prompts)
            asked = [arithmetic.warm_start_row(cfg.seed, index, step % 2 == 1) for index in indices]
        else:
            asked = [(row.messages, row.answer) for row in self.problems.batch(cfg.seed, first, cfg.train.prompts)]
        rows = [(tokenizer.encode_chat(messages), tokenizer.encode_answer(text)) for messages, text in asked]
        return credit.supervised(rows)

    def exam(self) -> Exam:
        """What is held out, as questions to the policy."""
        return Exam(list(self.evaluations.values()), self.run.cfg.eval.samples, self.run.policy.tokenizer)

    def log_exam(self, step: int, exam: Exam) -> dict[str, float]:
        """Accuracies on what is held out, written and shown."""
        assert self.writer is not None
        cfg, values = self.run.cfg, dict[str, float]()
        graded = exam.graded(functools.partial(self.score, step=step))
        for (name, asked), attempts in zip(self.evaluations.items(), graded, strict=True):
            values |= accuracies(asked, attempts, name)
        self.writer.scalars(step, values)
        for name in [name for name in values if name.endswith("/nonfinite")]:
            tokens, measured = f"{values[name]:.0f}", name.removesuffix("/nonfinite")
            self.progress.log(
                f"step {step}: {tokens} tokens of {measured} were sampled from numbers that are not finite; "
                "its accuracy means nothing"
            )
        for name in [name for name in values if f"{name}/low" in values]:
            low, high = values[f"{name}/low"], values[f"{name}/high"]
            how = drawn(cfg.eval.temperature, cfg.eval.top_p)
            self.progress.log(f"step {step}  {name} {values[name]:.3f}  [{low:.3f}, {high:.3f}]  {how}")
        return values

    def rollout_metrics(self, step: int, groups: Sequence[Group], stats: Stats) -> dict[str, float]:
        """Of what was sampled, with the seconds of all phases since the last call; says what went wrong."""
        seconds = self.progress.take_seconds()
        values = group_metrics(groups) | {f"seconds/{name}": value for name, value in seconds.items()}
        values |= {"sampler/slot_use": stats.slot_use, "tokens/prefilled": float(stats.prefilled)}
        values |= {"sampler/nonfinite": float(stats.nonfinite), "rollout/late": float(stats.late)}
        values |= {"tokens_per_s/sample": stats.tokens / seconds["sample"]}
        if self.run.cfg.train.replacements:
            values["problems/replaced"] = float(sum(not group.rows() for group in groups))
        if self.server is not None:
            values |= self._server_totals(step, self.server)
        attempts = (attempt for group in groups for attempt in (*group.responses, *group.refinements))
        if not self.looked and (found := going_on(attempt.text for attempt in attempts)):
            self.progress.log(f"step {step}: {found}")
        self.looked = True
        if stats.late:
            self.progress.log(
                f"step {step}: decoding did not wait for {stats.late} verdicts that took longer than a chunk; what was "
                "sampled after them followed a clock, so a run resumed before this step may differ in the last bits"
            )
        return values

    def log_step(
        self, step: int, groups: Sequence[Group] | None, sums: Sequence[dict[str, float]], stats: Stats
    ) -> None:
        """Metrics and rollouts of a step that is done; without groups it learnt rows."""
        assert self.writer is not None
        if groups is None:
            seconds = self.progress.take_seconds()
            values = update_metrics(sums) | {f"seconds/{name}": value for name, value in seconds.items()}
            self.writer.scalars(step, values)
            return self.progress.step_done(step, {"loss": values["loss/total"], "s": values["seconds/update"]})
        values = self.rollout_metrics(step, groups, stats) | update_metrics(sums)
        of, objective = self.run.cfg.train.updates_per_rollout, self.run.cfg.objective
        if skipped := of - len(sums):
            self.progress.log(
                f"step {step}: {skipped} of {of} updates trained nothing, for no row in them has a loss (no advantage, "
                "or cut and masked); weights and optimizer stayed as they were"
            )
        values["update/skipped"] = float(skipped)
        if objective.divide_by_std and objective.baseline == "responses":
            values["problems/undivided"] = float(sum(map(credit.undivided, groups)))
        if trained := sum(update["tokens"] for update in sums):
            values["tokens_per_s/update"] = trained / values["seconds/update"]
        self.writer.rollout(step, groups, self.pieces.widths)
        self.writer.scalars(step, values)
        if values.get("policy/kl_clamped"):
            self.progress.log(
                f"step {step}: {values['policy/kl_clamped']:.1%} of the tokens are so far from the reference that "
                "their KL term is clamped (objective.kl_limit) and has no gradient"
            )
        shown = {
            "reward": values["reward/responses"],
            "refined": values["refine/rate"],
            "fixed": values.get("refine/success", 0.0),
            "tok/s": values["tokens_per_s/sample"],
            "s": sum(value for name, value in values.items() if name.startswith("seconds/")),
        }
        self.progress.step_done(step, shown)

    def _server_totals(self, step: int, server: Server) -> dict[str, float]:
        """What a step asked of the critic's server."""
        totals, cfg = server.take_totals(), self.run.cfg
        where = public_url(cfg.api.base_url)
        if totals.faults:
            self.progress.log(
                f"step {step}: {totals.faults} of {totals.requests} requests to {where} failed "
                f"({totals.last_fault}); refine.critique_fallback = {fallback(cfg)} stood in"
            )
        if totals.damaged:
            self.progress.log(f"step {step}: {totals.damaged} critiques on file were damaged and were asked for anew")
        if totals.guessed:
            self.progress.log(
                f"step {step}: {totals.guessed} replies of {where} report no number of tokens that can be; they count "
                "as the most that they can be, also for api.spend_cap"
            )
        return {
            "api/requests": float(totals.requests),
            "api/cached": float(totals.cached),
            "api/faults": float(totals.faults),
            "api/guessed": float(totals.guessed),
            "api/tokens": float(totals.tokens),
            "api/cost": totals.cost,
            "api/cost_total": server.spent,
        }


def segments_of(groups: Sequence[Group], cfg: Config) -> list[list[Segment]]:
    """The segments of each update of a rollout, which has its own share of the problems."""
    groups = [group for group in groups if group.rows()]  # without those that were replaced
    share = len(groups) // cfg.train.updates_per_rollout
    parts = [groups[first : first + share] for first in range(0, len(groups), share)]
    return [credit.segments(part, cfg.objective, float(cfg.sampling.max_new_tokens)) for part in parts]


@contextlib.contextmanager
def begun(
    cfg: Config, workdir: pathlib.Path, hosts: Hosts, unit: str = "step"
) -> Iterator[tuple[Run, Progress | Silence]]:
    """Opens a run, as every verb does; its leader holds the lock of the workdir and shows the progress.

    Args:
      unit: what the progress counts.

    Raises:
      ConfigError, CheckpointError, MeshError, DataError, PromptError: all that is wrong, at once.
      BusyError: another process works in the workdir.
    """
    run = open_run(cfg)
    if not hosts.leader:
        yield run, Silence()
        return
    with exclusive(workdir), Progress(0, run.cfg.train.steps, unit) as progress:
        progress.log("\n".join(lines(run)))
        yield run, progress


@contextlib.contextmanager
def open_desk(run: Run, progress: Progress, workdir: pathlib.Path) -> Iterator[Desk]:
    """Loads the data and starts the graders; everything that can be refused is refused here."""
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
        rule = by_rule(score, run.policy.tokenizer)
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
        desk = Desk(run, progress, *loaded, Pieces(run.policy.tokenizer), method, score, server)
        yield desk
        if desk.writer is not None:
            desk.writer.close()
