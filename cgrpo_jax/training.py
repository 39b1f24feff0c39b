"""The training loop, of Critique-GRPO and its baselines (method=rl) and of supervised training (method=sft)."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from cgrpo_jax import report
from cgrpo_jax.config import Config, public
from cgrpo_jax.data.told import for_others
from cgrpo_jax.learning import credit
from cgrpo_jax.learning.finite import check_last, check_parameters, nonfinite_counts, nonfinite_steps
from cgrpo_jax.learning.packing import pack_smallest
from cgrpo_jax.learning.update import make_logps, make_update, put_bins
from cgrpo_jax.model.trees import joined
from cgrpo_jax.planner.ahead import compile_ahead, memory_line
from cgrpo_jax.process import stopping
from cgrpo_jax.process.hosts import ONE_HOST, Hosts
from cgrpo_jax.records import Group, Segment
from cgrpo_jax.rollout.collect import groups_of
from cgrpo_jax.rollout.loop import run_stories
from cgrpo_jax.run import build, resuming, startup
from cgrpo_jax.run.leader import open_desk
from cgrpo_jax.run.leaving import Leaving
from cgrpo_jax.run.opening import open_run
from cgrpo_jax.sampling.engine import weights_of
from cgrpo_jax.sampling.pool import Stats
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.checkpoints import Checkpointer
from cgrpo_jax.workdir.lock import exclusive
from cgrpo_jax.workdir.metrics import Writer
from cgrpo_jax.workdir.progress import Progress, Silence
from cgrpo_jax.workdir.tracking import open_tracker


def segments_of(groups: Sequence[Group], cfg: Config) -> list[list[Segment]]:
    """The segments of each update of a rollout, which has its own share of the problems."""
    groups = [group for group in groups if group.rows()]  # without those that were replaced
    share = len(groups) // cfg.train.updates_per_rollout
    parts = [groups[first : first + share] for first in range(0, len(groups), share)]
    return [credit.segments(part, cfg.objective, float(cfg.sampling.max_new_tokens)) for part in parts]


def train(
    cfg: Config,
    workdir: pathlib.Path,
    hosts: Hosts = ONE_HOST,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Trains from the newest checkpoint of `workdir` (or from the start) to `cfg.train.steps`.

    Order of a step, never changed: problems, rollout, update, log, evaluate, save. In method=sft the rows of a file
    stand in the place of a rollout.

    Args:
      hosts: of a run of several processes, each of which calls this function.
      on_row: is given each line of metrics.jsonl, by the leader.

    Raises:
      ConfigError, DataError, CheckpointError, MeshError, PromptError, VerifierError: before anything is compiled.
      TrainingError: numbers that are not finite.
      Stopped: a signal has come; the message says what was saved.
    """
    # ---- Build: everything that can be refused is refused here ----
    run = open_run(cfg)
    cfg, steps, compiled = run.cfg, cfg.train.steps, compilation.watch()
    with contextlib.ExitStack() as stack:
        if hosts.leader:
            stack.enter_context(exclusive(workdir))
        progress: Progress | Silence = stack.enter_context(Progress(0, steps)) if hosts.leader else Silence()
        checkpointer = stack.enter_context(Checkpointer(workdir, cfg.checkpoint, progress.log))
        past = hosts.share(resuming.look_back(run, checkpointer, progress.log) if hosts.leader else None)
        if resuming.all_done(run, past, progress.log):
            if hosts.leader:
                report.renew(workdir, progress.log)
            return
        progress.resume_at(past.step)
        progress.log("\n".join(startup.lines(run)))
        desk = stack.enter_context(open_desk(run, progress, workdir)) if isinstance(progress, Progress) else None
        sizes = hosts.share(build.bin_sizes(run, desk.longest_prompt) if desk else None)
        planned = compile_ahead(run, sizes, progress)

        # ---- Restore ----
        second = run.second.synced() if run.second else None
        state, frozen, past = resuming.initial_state(run, checkpointer, past)
        reference = resuming.reference_params(run, frozen, past) if build.terms(cfg).kl else None
        if desk is not None:
            resuming.start_workdir(run, past, workdir, progress.log)
            tracker = open_tracker(cfg.train.tracker, workdir, for_others(public(cfg)), progress.log)
            desk.writer = Writer(workdir, past.step, progress.log, on_row, tracker)
        update = make_update(run.learner, run.mesh, state.params)
        logps = make_logps(run.learner, run.mesh)
        problems_seen, nonfinite = past.problems_seen, 0  # of nonfinite steps: how many in a row
        leaving = stack.enter_context(Leaving(run, past, checkpointer, state, workdir, progress.log))

        def evaluate(step: int) -> dict[str, float] | None:
            with progress.phase("evaluate"), leaving.evaluation():
                exam = desk.exam() if desk else None
                weights = weights_of(run.policy.sampler, joined(state.params, frozen))
                engine = run.policy.engine(weights, step, run.evaluation)
                with exam.stories() if exam else contextlib.nullcontext() as stories:
                    run_stories(stories, [engine], hosts)
                return desk.log_exam(step, exam) if desk and exam else None

        if not past.evaluated:
            evaluate(past.step)
        for step in range(past.step, steps):
            stopping.look()
            checkpointer.check()  # a save that failed behind the last step
            # ---- Rollout ----
            groups, stats = None, Stats()
            if cfg.method == "rl":
                with progress.phase("sample"):
                    engines = build.engines(run, joined(state.params, frozen), second, step)
                    with desk.stories(step, problems_seen) if desk else contextlib.nullcontext() as stories:
                        stats = run_stories(stories, engines, hosts)
                    groups = groups_of(stories) if stories else None
                    del engines  # and with them the policy's copy of the weights, before the update

            # ---- Update ----
            with progress.phase("update"):
                segments = segments_of(groups, cfg) if groups else [desk.rows(step)] if desk else []
                packed = [pack_smallest(part, sizes, build.terms(cfg)) for part in segments]
                host_bins = hosts.share(packed)
                # One in which no row has a loss is none: it would decay the weights and move Adam by old gradients.
                updates = [put_bins(run.mesh, bins) for bins in host_bins if bins.count]
                if len(host_bins) > 1:  # the trainer's own log-probabilities, before the first update
                    params = joined(state.params, frozen)
                    updates = [bins._replace(old_logp_ABT=logps(params, bins)) for bins in updates]
                    del params
                if reference is not None:
                    updates = [bins._replace(ref_logp_ABT=logps(reference, bins)) for bins in updates]
                sums_of_updates = []
                for bins in updates:
                    state, sums = update(state, frozen, bins)
                    sums_of_updates.append({name: float(value) for name, value in jax.device_get(sums).items()})

            # ---- Log, evaluate, save ----
            done, evaluated = step + 1, None
            problems_seen += hosts.share(len(groups) if groups else cfg.train.prompts)
            if step == past.step:
                progress.log(f"compiled {compiled}")
                if told := memory_line(run, planned):
                    progress.log(told)
            if desk is not None:
                desk.log_step(done, groups, sums_of_updates, stats)
            check_parameters(done, sums_of_updates)
            leaving.done(done, state, problems_seen)
            found = {"sampled log-probabilities": stats.nonfinite} | nonfinite_counts(sums_of_updates)
            nonfinite = nonfinite_steps(nonfinite, done, found)
            if resuming.evaluation_due(cfg, done):
                evaluated = evaluate(done)
            if done % cfg.checkpoint.every == 0 or done == steps:
                checkpointer.save(done, state, resuming.checkpoint_meta(run, past, done, problems_seen), evaluated)
        checkpointer.wait()
        progress.log(f"compiled {compiled}")
        check_last(nonfinite, steps)
        progress.log(
            f"done: step {steps} is in {workdir}/checkpoints; metrics.jsonl, rollouts/, tensorboard/ beside it"
        )
        if desk is not None:
            report.leave(workdir, progress.log)
        progress.log(f"export: python -m cgrpo_jax.convert --from={workdir} --to=hf --out={workdir}/model")
