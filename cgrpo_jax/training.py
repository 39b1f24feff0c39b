"""The training loop of Critique-GRPO and of its special case without refinements."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from cgrpo_jax import build
from cgrpo_jax.build import Run
from cgrpo_jax.config import Config
from cgrpo_jax.data.sources import DataError, Problems, load_problems, prompt_fault
from cgrpo_jax.data.tasks import load_task, parse_names
from cgrpo_jax.evaluation.sample import accuracies, sample_and_grade
from cgrpo_jax.grading import equivalence, rewards
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.learning import credit
from cgrpo_jax.learning.finite import nonfinite_counts, nonfinite_steps
from cgrpo_jax.learning.packing import Bins, BinSize, PackingError, Terms, pack
from cgrpo_jax.learning.update import make_logps, make_update, put_bins
from cgrpo_jax.model.hosts import AgreedSource, Hosts, OneHost
from cgrpo_jax.options import SamplingConfig
from cgrpo_jax.records import Group, Problem, Segment
from cgrpo_jax.rollout.collect import Method, by_rule, collect_groups
from cgrpo_jax.rollout.critics import CRITICS
from cgrpo_jax.sampling.sampler import Sampler, Stats
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.checkpoints import Checkpointer
from cgrpo_jax.workdir.metrics import Writer, group_metrics, update_metrics
from cgrpo_jax.workdir.progress import Progress


@dataclasses.dataclass
class Desk:
    """What the leader alone has: data, graders, files and clocks."""

    run: Run
    progress: Progress
    verifier: Verifier
    writer: Writer
    problems: Problems
    evaluations: dict[str, list[Problem]]  # metric name -> problems; none without eval.every

    def collect(self, step: int, problems_seen: int, sampler: Sampler, hosts: Hosts) -> list[Group]:
        """The rollout of a step."""
        cfg = self.run.cfg
        score = functools.partial(rewards.score, verifier=self.verifier)
        method = Method(
            samples=cfg.train.samples,
            scorer=by_rule(score, self.run.tokenizer),
            critic=CRITICS[cfg.refine.critique],
            tokenizer=self.run.tokenizer,
            refine=cfg.refine,
            seed=cfg.seed,
            step=step,
        )
        problems = self.problems.batch(cfg.seed, problems_seen, cfg.train.prompts)

        def sample(source: Any) -> None:
            sampler.run(AgreedSource(hosts, source))

        return collect_groups(problems, method, sample, self.progress.phase, cfg.verifier.workers)

    def evaluate(self, step: int, sampler: Sampler, hosts: Hosts) -> dict[str, float]:
        """Accuracies on what is held out, written and shown."""
        cfg, values = self.run.cfg, dict[str, float]()
        score = functools.partial(rewards.score, verifier=self.verifier)

        def sample(source: Any) -> None:
            sampler.run(AgreedSource(hosts, source))

        with self.progress.phase("evaluate"):
            sets = list(self.evaluations.values())
            graded = sample_and_grade(sets, cfg.eval.samples, sample, score, self.run.tokenizer)
            for (name, asked), attempts in zip(self.evaluations.items(), graded, strict=True):
                values |= accuracies(asked, attempts, name)
        self.writer.scalars(step, values | {"seconds/evaluate": self.progress.take_seconds()["evaluate"]})
        for name in [name for name in values if f"{name}/low" in values]:
            low, high = values[f"{name}/low"], values[f"{name}/high"]
            self.progress.log(f"step {step}  {name} {values[name]:.3f}  [{low:.3f}, {high:.3f}]")
        return values

    def log_step(self, step: int, groups: Sequence[Group], sums: Sequence[dict[str, float]], stats: Stats) -> None:
        """Metrics and rollouts of a step that is done."""
        seconds = self.progress.take_seconds()
        values = group_metrics(groups) | update_metrics(sums)
        values |= {f"seconds/{name}": value for name, value in seconds.items()}
        values |= {"sampler/slot_use": stats.slot_use, "tokens/prefilled": float(stats.prefilled)}
        values["sampler/nonfinite"] = float(stats.nonfinite)
        tokens = {"sample": stats.tokens, "update": sum(update["tokens"] for update in sums)}
        values |= {f"tokens_per_s/{name}": count / seconds[name] for name, count in tokens.items() if count}
        self.writer.rollout(step, groups)
        self.writer.scalars(step, values)
        shown = {
            "reward": values["reward/responses"],
            "refined": values["refine/rate"],
            "fixed": values.get("refine/success", 0.0),
            "tok/s": values["tokens_per_s/sample"],
            "s": sum(seconds.values()),
        }
        self.progress.step_done(step, shown)


def _load_data(run: Run, verifier: Verifier, log) -> tuple[Problems, dict[str, list[Problem]], int]:
    """The training stream, what is evaluated, and the tokens of the longest prompt of training that was looked at."""
    cfg, lengths = run.cfg, [1]

    def prompt_tokens(problem: Problem) -> int:
        return len(run.tokenizer.encode_chat(problem.messages))

    def measured(problem: Problem) -> int:
        count = prompt_tokens(problem)
        lengths.append(count)
        return count

    load = functools.partial(
        load_problems, seed=cfg.seed, parsable=functools.partial(equivalence.readable, verifier=verifier), log=log
    )
    load_training = functools.partial(load, cfg.data, prompt_tokens=measured)
    if not cfg.eval.every:
        problems = load_training()
        return problems, {}, max(lengths)
    fault = functools.partial(prompt_fault, prompt_tokens=prompt_tokens, most=cfg.data.max_prompt_tokens)
    tasks = {
        f"eval/{name}": [named.problem for named in load_task(name, where, cfg.eval.problems, cfg.data, fault, log)]
        for name, where in parse_names(cfg.eval.tasks)
    }
    if tasks and not cfg.eval.source:
        problems = load_training()
        return problems, tasks, max(lengths)
    test = dataclasses.replace(cfg.data, split=cfg.eval.split)
    if cfg.eval.source:
        test = dataclasses.replace(test, source=cfg.eval.source, revision=cfg.eval.revision)
        test = dataclasses.replace(test, question_column="", answer_column="")
    opened, faults = [], []
    for open_source in (load_training, functools.partial(load, test, prompt_tokens=prompt_tokens)):
        try:
            opened.append(open_source())
        except DataError as error:
            faults.append(str(error))
    if faults:  # of both at once
        raise DataError("\n".join(faults))
    problems, held_out = opened
    count = cfg.eval.problems if held_out.size is None else min(cfg.eval.problems or held_out.size, held_out.size)
    return problems, {"eval": [held_out.get(index) for index in range(count)]} | tasks, max(lengths)


def packed(segments: Sequence[Segment], sizes: Sequence[BinSize], terms: Terms) -> Bins:
    """Bins of the first size that holds all segments."""
    for size in sizes[:-1]:
        with contextlib.suppress(PackingError):
            return pack(segments, size, terms)
    return pack(segments, sizes[-1], terms)


def make_bins(groups: Sequence[Group], cfg: Config, sizes: Sequence[BinSize]) -> list[Bins]:
    """The bins of each update of this rollout, which has its own share of the problems."""
    share = len(groups) // cfg.train.updates_per_rollout
    parts = [groups[first : first + share] for first in range(0, len(groups), share)]
    constant = float(cfg.sampling.max_new_tokens)
    return [packed(credit.segments(part, cfg.objective, constant), sizes, build.terms(cfg)) for part in parts]


def train(cfg: Config, workdir: pathlib.Path, hosts: Hosts | None = None) -> None:
    """Trains from the newest checkpoint of `workdir` (or from the start) to `cfg.train.steps`.

    Order of a step, never changed: problems, rollout, update, log, evaluate, save.
    """
    # ---- Build: everything that can be refused is refused here ----
    hosts = hosts or OneHost()
    run = build.open_run(cfg)
    cfg, steps, compiled = run.cfg, cfg.train.steps, compilation.watch()
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(workdir, cfg.checkpoint.keep))
        progress = stack.enter_context(Progress(checkpointer.newest() or 0, steps))
        verifier = stack.enter_context(Verifier(cfg.verifier))
        problems, evaluations, longest = _load_data(run, verifier, progress.log)
        sizes = build.bin_sizes(run, longest)

        # ---- Restore ----
        start = build.initial_state(run, checkpointer)
        build.start_workdir(run, start, workdir, progress.log)
        state, first_step, problems_seen = start.state, start.step, start.problems_seen
        del start  # the update donates the state it holds
        reference = build.initial_params(run) if cfg.objective.kl_coef else None
        update = make_update(run.learner, run.mesh, state.params)
        logps = make_logps(run.learner, run.mesh)
        desk = Desk(run, progress, verifier, Writer(workdir, first_step), problems, evaluations)
        eval_sampling = SamplingConfig(cfg.eval.temperature, 0, cfg.eval.top_p, cfg.sampling.max_new_tokens)

        if first_step == 0 and evaluations:
            desk.evaluate(0, run.sampler.bind(state.params, 0, eval_sampling), hosts)
        nonfinite = 0  # steps in a row
        for step in range(first_step, steps):
            # ---- Rollout ----
            with progress.phase("sample"):
                sampler = run.sampler.bind(state.params, step, cfg.sampling)
                groups = desk.collect(step, problems_seen, sampler, hosts)
                stats = sampler.stats
                del sampler  # and its copy of the weights, before the update

            # ---- Update ----
            with progress.phase("update"):
                host_bins = hosts.agree(functools.partial(make_bins, groups, cfg, sizes))
                updates = [put_bins(run.mesh, bins) for bins in host_bins]
                if len(updates) > 1:  # the trainer's own log-probabilities, before the first update
                    updates = [bins._replace(old_logp_ABT=logps(state.params, bins)) for bins in updates]
                if reference is not None:
                    updates = [bins._replace(ref_logp_ABT=logps(reference, bins)) for bins in updates]
                sums_of_updates = []
                for bins in updates:
                    state, sums = update(state, {}, bins)
                    sums_of_updates.append({name: float(value) for name, value in jax.device_get(sums).items()})
            found = {"sampled log-probabilities": stats.nonfinite} | nonfinite_counts(sums_of_updates)
            nonfinite = nonfinite_steps(nonfinite, step + 1, found, cfg.train.max_nonfinite)

            # ---- Log, evaluate, save ----
            done, problems_seen = step + 1, problems_seen + cfg.train.prompts
            if step == first_step:
                progress.log(f"compiled {compiled}")
            desk.log_step(done, groups, sums_of_updates, stats)
            if evaluations and (done % cfg.eval.every == 0 or done == steps):
                desk.evaluate(done, run.sampler.bind(state.params, done, eval_sampling), hosts)
            if done % cfg.checkpoint.every == 0 or done == steps:
                checkpointer.save(done, state, build.checkpoint_meta(run, done, problems_seen))
        desk.writer.close()
        checkpointer.wait()
        progress.log(f"compiled {compiled}")
        progress.log(
            f"done: step {steps} is in {workdir}/checkpoints; metrics.jsonl, rollouts/, tensorboard/ beside it"
        )
        progress.log(f"export: python -m cgrpo_jax.convert --from={workdir} --to=hf --out={workdir}/model")
