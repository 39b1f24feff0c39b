"""The training loop, of Critique-GRPO and its baselines (method=rl) and of supervised training (method=sft)."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

from cgrpo_jax.config import Config
from cgrpo_jax.learning.finite import check_last, check_parameters, nonfinite_counts, nonfinite_steps
from cgrpo_jax.learning.steps import Updates
from cgrpo_jax.model.sharding import joined
from cgrpo_jax.planner.ahead import compile_ahead, memory_line
from cgrpo_jax.process.hosts import ONE_HOST, Hosts
from cgrpo_jax.rollout.stories import Completions, Stories, run_stories
from cgrpo_jax.run import build
from cgrpo_jax.run.beginning import begun
from cgrpo_jax.run.leader import open_desk
from cgrpo_jax.run.saving import Saves
from cgrpo_jax.workdir import compilation


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
        desk = stack.enter_context(open_desk(run, progress, workdir))  # None on hosts that do not lead
        sizes = hosts.share(lambda: build.bin_sizes(run, desk.longest_prompt if desk else 0))
        planned = compile_ahead(run, sizes, progress)
        hosts.meet("compile")  # collectives of unequal beginnings give up

        # ---- Restore ----
        second = run.second.synced() if run.second else None
        state, frozen = saves.restore()
        reference = saves.reference(frozen) if build.terms(cfg).kl else None
        if desk is not None:
            saves.start_workdir()
            desk.log.open_files(workdir, saves.step, on_row)
        updates = Updates(run.learner, run.mesh, state.params, sizes, build.terms(cfg), reference)
        first, problems_seen, nonfinite = saves.step, saves.problems_seen, 0  # steps in a row that were not finite

        def evaluate(step: int) -> dict[str, float] | None:
            with progress.phase("evaluate"), saves.evaluation():
                exam = desk.exam() if desk else None
                engine = run.policy.engine_of(joined(state.params, frozen), step, run.evaluation)
                with exam.stories() if exam else Stories([]) as stories:
                    run_stories(stories, [engine], hosts)
                return hosts.share(lambda: desk.log_exam(step, exam) if desk and exam else None)

        if not saves.past.evaluated:
            evaluate(first)
        for step in range(first, steps):
            saves.check()  # for a signal, and a save that failed behind the last step
            # ---- Rollout ----
            groups, stats, completions = None, None, Completions()
            if cfg.method == "rl":
                with progress.phase("sample"):
                    engines = run.policy.engines(joined(state.params, frozen), run.second, second, step)
                    with desk.stories(step, problems_seen) if desk else Stories([]) as stories:
                        stats = run_stories(stories, engines, hosts, completions)
                    groups = desk.groups(stories) if desk else None
                    del engines  # and with them the policy's copy of the weights, before the update

            # ---- Update ----
            with progress.phase("update"):
                told, taken = hosts.share(lambda: desk.updates(step, groups, completions) if desk else ([], 0))  # noqa: B023
                state, sums_of_updates = updates(state, frozen, told, completions)

            # ---- Log, evaluate, save ----
            done, evaluated = step + 1, None
            problems_seen += taken
            if step == first:
                progress.log(f"compiled {compiled}")
                if line := memory_line(run, planned):
                    progress.log(line)
            if desk is not None:
                desk.log.step(done, groups, sums_of_updates, stats)
            check_parameters(done, sums_of_updates)
            saves.done(done, state, problems_seen)
            found = {"sampled log-probabilities": stats.nonfinite if stats else 0} | nonfinite_counts(sums_of_updates)
            nonfinite = nonfinite_steps(nonfinite, done, found)
            if saves.evaluation_due():
                evaluated = evaluate(done)
            if done % cfg.checkpoint.every == 0 or done == steps:
                saves.save(evaluated)
        saves.wait()
        progress.log(f"compiled {compiled}")
        check_last(nonfinite, steps)
        saves.finish()
