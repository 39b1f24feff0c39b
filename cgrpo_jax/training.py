"""The training loop of Critique-GRPO and of its special case without refinements."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from cgrpo_jax import build, report, resuming, startup, stopping
from cgrpo_jax.config import Config, public
from cgrpo_jax.leading import open_desk
from cgrpo_jax.learning import credit
from cgrpo_jax.learning.finite import check_last, check_parameters, nonfinite_counts, nonfinite_steps
from cgrpo_jax.learning.packing import Bins, BinSize, pack_smallest
from cgrpo_jax.learning.update import make_logps, make_update, put_bins
from cgrpo_jax.leaving import Leaving
from cgrpo_jax.model.hosts import AgreedSource, Hosts, OneHost
from cgrpo_jax.opening import open_run
from cgrpo_jax.options import SamplingConfig
from cgrpo_jax.planner.ahead import compile_ahead, memory_line
from cgrpo_jax.records import Group, Source
from cgrpo_jax.sampling.pool import summed
from cgrpo_jax.sampling.sampler import Sampler, run_together
from cgrpo_jax.told import for_others
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.checkpoints import Checkpointer
from cgrpo_jax.workdir.lock import exclusive
from cgrpo_jax.workdir.metrics import Writer
from cgrpo_jax.workdir.progress import Progress, Silence
from cgrpo_jax.workdir.tracking import open_tracker

T = TypeVar("T")


def make_bins(groups: Sequence[Group] | None, cfg: Config, sizes: Sequence[BinSize]) -> list[Bins]:
    """The bins of each update of this rollout, which has its own share of the problems."""
    assert groups is not None  # only the leader packs
    groups = [group for group in groups if group.rows()]  # without those that were replaced
    share = len(groups) // cfg.train.updates_per_rollout
    parts = [groups[first : first + share] for first in range(0, len(groups), share)]
    constant = float(cfg.sampling.max_new_tokens)
    return [pack_smallest(credit.segments(part, cfg.objective, constant), sizes, build.terms(cfg)) for part in parts]


def on_all(hosts: Hosts, samplers: Sequence[Sampler], lead: Callable[[Callable[[Source], None]], T] | None) -> T | None:
    """What `lead` makes of samplers that run on all hosts. The others sample what its source asks, and have none."""
    if lead is None:
        run_together(samplers, AgreedSource(hosts, None))
        return None

    def sample(source: Source) -> None:
        run_together(samplers, AgreedSource(hosts, source))

    return lead(sample)


def train(
    cfg: Config,
    workdir: pathlib.Path,
    hosts: Hosts | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Trains from the newest checkpoint of `workdir` (or from the start) to `cfg.train.steps`.

    Order of a step, never changed: problems, rollout, update, log, evaluate, save.

    Args:
      hosts: of a run of several processes, each of which calls this function; None: there is but one.
      on_row: is given each line of metrics.jsonl, by the leader.
    """
    # ---- Build: everything that can be refused is refused here ----
    hosts = hosts or OneHost()
    run = open_run(cfg)
    cfg, steps, compiled = run.cfg, cfg.train.steps, compilation.watch()
    with contextlib.ExitStack() as stack:
        if hosts.leader:
            stack.enter_context(exclusive(workdir))
        progress: Progress | Silence = stack.enter_context(Progress(0, steps)) if hosts.leader else Silence()
        checkpointer = stack.enter_context(Checkpointer(workdir, cfg.checkpoint, progress.log))
        past = hosts.agree(lambda: resuming.look_back(run, checkpointer, progress.log))
        if resuming.all_done(run, past, progress.log):
            if hosts.leader:
                report.renew(workdir, progress.log)
            return
        progress.resume_at(past.step)
        progress.log("\n".join(startup.lines(run)))
        desk = stack.enter_context(open_desk(run, progress, workdir)) if isinstance(progress, Progress) else None
        sizes = hosts.agree(lambda: build.bin_sizes(run, desk.longest_prompt if desk else 0))
        planned = compile_ahead(run, sizes, progress)

        # ---- Restore ----
        local = build.local_sampler(run)
        state, past = resuming.initial_state(run, checkpointer, past)
        reference = resuming.reference_params(run, past) if cfg.objective.kl_coef else None
        if desk is not None:
            resuming.start_workdir(run, past, workdir, progress.log)
            tracker = open_tracker(cfg.train.tracker, workdir, for_others(public(cfg)), progress.log)
            desk.writer = Writer(workdir, past.step, progress.log, on_row, tracker)
        update = make_update(run.learner, run.mesh, state.params)
        logps = make_logps(run.learner, run.mesh)
        eval_sampling = SamplingConfig(cfg.eval.temperature, 0, cfg.eval.top_p, cfg.sampling.max_new_tokens)
        problems_seen, nonfinite = past.problems_seen, 0  # of nonfinite steps: how many in a row
        leaving = stack.enter_context(Leaving(run, past, checkpointer, state, workdir, progress.log))

        def evaluate(step: int) -> dict[str, float] | None:
            with progress.phase("evaluate"), leaving.evaluation():
                sampler = run.sampler.bind(state.params, step, eval_sampling)
                return on_all(hosts, [sampler], functools.partial(desk.evaluate, step) if desk else None)

        if not past.evaluated:
            evaluate(past.step)
        for step in range(past.step, steps):
            stopping.look()
            checkpointer.check()  # a save that failed behind the last step
            # ---- Rollout ----
            with progress.phase("sample"):
                samplers = [run.sampler.bind(state.params, step, cfg.sampling)] + ([local.at(step)] if local else [])
                groups = on_all(hosts, samplers, functools.partial(desk.collect, step, problems_seen) if desk else None)
                stats = summed(sampler.stats for sampler in samplers)
                del samplers  # and the policy's copy of the weights, before the update

            # ---- Update ----
            with progress.phase("update"):
                host_bins = hosts.agree(functools.partial(make_bins, groups, cfg, sizes))
                # One in which no row has a loss is none: it would decay the weights and move Adam by old gradients.
                updates = [put_bins(run.mesh, bins) for bins in host_bins if bins.count]
                if len(host_bins) > 1:  # the trainer's own log-probabilities, before the first update
                    updates = [bins._replace(old_logp_ABT=logps(state.params, bins)) for bins in updates]
                if reference is not None:
                    updates = [bins._replace(ref_logp_ABT=logps(reference, bins)) for bins in updates]
                sums_of_updates = []
                for bins in updates:
                    state, sums = update(state, {}, bins)
                    sums_of_updates.append({name: float(value) for name, value in jax.device_get(sums).items()})

            # ---- Log, evaluate, save ----
            done, evaluated = step + 1, None
            problems_seen += hosts.agree(functools.partial(len, groups or ()))
            if step == past.step:
                progress.log(f"compiled {compiled}")
                if told := memory_line(run, planned):
                    progress.log(told)
            if desk is not None and groups is not None:
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
