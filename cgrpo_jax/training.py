"""The training loop, of Critique-GRPO and its baselines (method=rl) and of supervised training (method=sft)."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from cgrpo_jax import report
from cgrpo_jax.config import Config
from cgrpo_jax.learning.finite import check_last, check_parameters, nonfinite_counts, nonfinite_steps
from cgrpo_jax.learning.update import make_logps, make_update, put_bins
from cgrpo_jax.model.sharding import joined
from cgrpo_jax.planner.ahead import compile_ahead, memory_line
from cgrpo_jax.process import stopping
from cgrpo_jax.process.hosts import ONE_HOST, Hosts
from cgrpo_jax.rollout.collect import groups_of
from cgrpo_jax.rollout.stories import run_stories
from cgrpo_jax.run import build
from cgrpo_jax.run.beginning import begun
from cgrpo_jax.run.leader import open_desk
from cgrpo_jax.run.models import rollout_engines
from cgrpo_jax.run.saving import Saves
from cgrpo_jax.sampling.pool import Stats
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.progress import Progress


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
    with contextlib.ExitStack() as stack:
        # ---- Build: everything that can be refused is refused here ----
        run, progress = stack.enter_context(begun(cfg, workdir, hosts))
        cfg, steps, compiled = run.cfg, run.cfg.train.steps, compilation.watch()
        saves = stack.enter_context(Saves(run, workdir, hosts, progress.log))
        if saves.all_done():
            return
        progress.resume_at(saves.step)
        desk = stack.enter_context(open_desk(run, progress, workdir)) if isinstance(progress, Progress) else None
        sizes = hosts.share(build.bin_sizes(run, desk.longest_prompt) if desk else None)
        planned = compile_ahead(run, sizes, progress)

        # ---- Restore ----
        second = run.second.synced() if run.second else None
        state, frozen = saves.restore()
        reference = saves.reference(frozen) if build.terms(cfg).kl else None
        if desk is not None:
            saves.start_workdir()
            desk.log.open_files(workdir, saves.step, on_row)
        update = make_update(run.learner, run.mesh, state.params)
        logps = make_logps(run.learner, run.mesh)
        first, problems_seen, nonfinite = saves.step, saves.problems_seen, 0  # steps in a row that were not finite

        def evaluate(step: int) -> dict[str, float] | None:
            with progress.phase("evaluate"), saves.evaluation():
                exam = desk.exam() if desk else None
                engine = run.policy.engine_of(joined(state.params, frozen), step, run.evaluation)
                with exam.stories() if exam else contextlib.nullcontext() as stories:
                    run_stories(stories, [engine], hosts)
                return desk.log_exam(step, exam) if desk and exam else None

        if not saves.past.evaluated:
            evaluate(first)
        for step in range(first, steps):
            stopping.look()
            saves.check()  # a save that failed behind the last step
            # ---- Rollout ----
            groups, stats = None, Stats()
            if cfg.method == "rl":
                with progress.phase("sample"):
                    engines = rollout_engines(run.policy, joined(state.params, frozen), run.second, second, step)
                    with desk.stories(step, problems_seen) if desk else contextlib.nullcontext() as stories:
                        stats = run_stories(stories, engines, hosts)
                    groups = groups_of(stories) if stories else None
                    del engines  # and with them the policy's copy of the weights, before the update

            # ---- Update ----
            with progress.phase("update"):
                host_bins = hosts.share(desk.bins(step, groups, sizes) if desk else None)
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
            if step == first:
                progress.log(f"compiled {compiled}")
                if told := memory_line(run, planned):
                    progress.log(told)
            if desk is not None:
                desk.log.step(done, groups, sums_of_updates, stats)
            check_parameters(done, sums_of_updates)
            saves.done(done, state, problems_seen)
            found = {"sampled log-probabilities": stats.nonfinite} | nonfinite_counts(sums_of_updates)
            nonfinite = nonfinite_steps(nonfinite, done, found)
            if saves.evaluation_due():
                evaluated = evaluate(done)
            if done % cfg.checkpoint.every == 0 or done == steps:
                saves.save(evaluated)
        saves.wait()
        progress.log(f"compiled {compiled}")
        check_last(nonfinite, steps)
        progress.log(
            f"done: step {steps} is in {workdir}/checkpoints; metrics.jsonl, rollouts/, tensorboard/ beside it"
        )
        if desk is not None:
            report.leave(workdir, progress.log)
        progress.log(f"export: python -m cgrpo_jax.convert --from={workdir} --to=hf --out={workdir}/model")
