"""Supervised training, through the same update, checkpoints, evaluations and metrics as the rest.

Of the rows of a file (data/targets.py: a generated one, or annotated solutions), or of data.source=arithmetic, the warm
start of the embedded model.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from cgrpo_jax import build, report, resuming, startup, stopping
from cgrpo_jax.build import Run
from cgrpo_jax.config import Config, public
from cgrpo_jax.data import arithmetic
from cgrpo_jax.data.sources import Problems
from cgrpo_jax.leading import open_desk
from cgrpo_jax.learning import credit
from cgrpo_jax.learning.finite import check_last, check_parameters, nonfinite_counts, nonfinite_steps
from cgrpo_jax.learning.packing import Bins, BinSize, pack_smallest
from cgrpo_jax.learning.update import make_update, put_bins
from cgrpo_jax.leaving import Leaving
from cgrpo_jax.opening import learnt_ids, open_run
from cgrpo_jax.options import SamplingConfig
from cgrpo_jax.told import for_others
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.checkpoints import Checkpointer
from cgrpo_jax.workdir.lock import exclusive
from cgrpo_jax.workdir.metrics import Writer, update_metrics
from cgrpo_jax.workdir.progress import Progress
from cgrpo_jax.workdir.tracking import open_tracker

PLAIN_PROMPT = 64  # tokens of a question of the warm start without a refinement's context, at most


def _bins_of_step(run: Run, problems: Problems, sizes: tuple[BinSize, ...], step: int) -> Bins:
    """The rows of a step: in a seeded order, a new one each epoch.

    Of the warm start plain rows and refinements, which are much longer, take turns, so that neither is padded to the
    other.
    """
    cfg, tokenizer = run.cfg, run.tokenizer
    first = step * cfg.train.prompts
    if cfg.data.source == "arithmetic":
        indices = range(first, first + cfg.train.prompts)
        asked = [arithmetic.warm_start_row(cfg.seed, index, step % 2 == 1) for index in indices]
    else:
        asked = [(row.messages, row.answer) for row in problems.batch(cfg.seed, first, cfg.train.prompts)]
    rows = [(tokenizer.encode_chat(messages), learnt_ids(tokenizer, text)) for messages, text in asked]
    return pack_smallest(credit.supervised(rows), sizes, build.terms(cfg))


def sft(cfg: Config, workdir: pathlib.Path, on_row: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Trains on `train.prompts` rows a step, mean loss per token of the texts; resumes by default.

    Args:
      on_row: is given each line of metrics.jsonl.
    """
    run = open_run(cfg)
    cfg, steps, compiled = run.cfg, run.cfg.train.steps, compilation.watch()
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(workdir))
        progress = stack.enter_context(Progress(0, steps))
        checkpointer = stack.enter_context(Checkpointer(workdir, cfg.checkpoint, progress.log))
        past = resuming.look_back(run, checkpointer, progress.log)
        if resuming.all_done(run, past, progress.log):
            return report.renew(workdir, progress.log)
        progress.resume_at(past.step)
        desk = stack.enter_context(open_desk(run, progress, workdir))
        sizes = build.bin_sizes(run, PLAIN_PROMPT if cfg.data.source == "arithmetic" else desk.longest_prompt)
        progress.log("\n".join(startup.lines(run)))
        if size := desk.problems.size:
            learnt = steps * cfg.train.prompts
            progress.log(f"{steps} steps of {cfg.train.prompts} rows are {learnt / size:.2f} epochs of {size} rows")
        state, past = resuming.initial_state(run, checkpointer, past)
        resuming.start_workdir(run, past, workdir, progress.log)
        tracker = open_tracker(cfg.train.tracker, workdir, for_others(public(cfg)), progress.log)
        desk.writer = Writer(workdir, past.step, progress.log, on_row, tracker)
        update = make_update(run.learner, run.mesh, state.params)
        eval_sampling = SamplingConfig(cfg.eval.temperature, 0, cfg.eval.top_p, cfg.sampling.max_new_tokens)
        leaving = stack.enter_context(Leaving(run, past, checkpointer, state, workdir, progress.log))
        nonfinite = 0

        def evaluate(step: int) -> dict[str, float]:
            with progress.phase("evaluate"), leaving.evaluation():
                return desk.evaluate(step, run.sampler.bind(state.params, step, eval_sampling).run)

        if not past.evaluated:
            evaluate(past.step)
        for step in range(past.step, steps):
            stopping.look()
            checkpointer.check()  # a save that failed behind the last step
            with progress.phase("update"):
                bins = put_bins(run.mesh, _bins_of_step(run, desk.problems, sizes, step))
                state, sums = update(state, {}, bins)
                scalars = {name: float(value) for name, value in jax.device_get(sums).items()}
            done = step + 1
            values = update_metrics([scalars])
            values |= {f"seconds/{name}": value for name, value in progress.take_seconds().items()}
            desk.writer.scalars(done, values)
            progress.step_done(done, {"loss": values["loss/total"], "s": values["seconds/update"]})
            check_parameters(done, [scalars])
            leaving.done(done, state, done * cfg.train.prompts)
            nonfinite = nonfinite_steps(nonfinite, done, nonfinite_counts([scalars]))
            evaluated = evaluate(done) if resuming.evaluation_due(cfg, done) else None
            if done % cfg.checkpoint.every == 0 or done == steps:
                meta = resuming.checkpoint_meta(run, past, done, done * cfg.train.prompts)
                checkpointer.save(done, state, meta, evaluated)
        checkpointer.wait()
        progress.log(f"compiled {compiled}")
        check_last(nonfinite, steps)
        report.leave(workdir, progress.log)
