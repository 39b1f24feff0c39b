"""The supervised warm start of the embedded model, through the same update, checkpoints and metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cgrpo_jax import build, report, resuming, startup
from cgrpo_jax.build import Run
from cgrpo_jax.config import Config, ConfigError
from cgrpo_jax.data import arithmetic
from cgrpo_jax.learning import credit
from cgrpo_jax.learning.finite import check_last, nonfinite_counts, nonfinite_steps
from cgrpo_jax.learning.packing import Bins, pack_smallest
from cgrpo_jax.learning.update import make_update, put_bins
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.checkpoints import Checkpointer
from cgrpo_jax.workdir.lock import exclusive
from cgrpo_jax.workdir.metrics import Writer, update_metrics
from cgrpo_jax.workdir.progress import Progress
from cgrpo_jax.workdir.tracking import check_tracker, open_tracker

PLAIN_PROMPT = 64  # tokens of a question without a refinement's context, at most


def _bins_of_step(run: Run, step: int) -> Bins:
    """Plain rows and refinements, which are much longer, take turns, so that neither is padded to the other."""
    cfg, refinements = run.cfg, step % 2 == 1
    end = run.tokenizer.hf.eos_token_id
    assert isinstance(end, int)
    rows = []
    for index in range(step * cfg.train.prompts, (step + 1) * cfg.train.prompts):
        messages, text = arithmetic.warm_start_row(cfg.seed, index, refinements)
        rows.append(
            (run.tokenizer.encode_chat(messages), np.asarray([*run.tokenizer.encode_text(text), end], np.int32))
        )
    return pack_smallest(credit.supervised(rows), build.bin_sizes(run, PLAIN_PROMPT), build.terms(cfg))


def sft(cfg: Config, workdir: pathlib.Path, on_row: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Trains on `train.prompts` (chat, answer) rows a step, mean loss per token; resumes by default.

    Args:
      on_row: is given each line of metrics.jsonl.
    """
    if cfg.data.source != "arithmetic":
        raise ConfigError(
            f"method=sft trains on the warm-start rows of data.source=arithmetic, not {cfg.data.source!r}"
        )
    check_tracker(cfg.train.tracker)
    run = build.open_run(cfg)
    cfg, steps, compiled = run.cfg, run.cfg.train.steps, compilation.watch()
    with (
        exclusive(workdir),
        Progress(0, steps) as progress,
        Checkpointer(workdir, cfg.checkpoint, progress.log) as checkpointer,
    ):
        past = resuming.look_back(run, checkpointer, progress.log)
        if resuming.all_done(run, past, progress.log):
            return
        progress.resume_at(past.step)
        progress.log("\n".join(startup.lines(run)))
        state, past = resuming.initial_state(run, checkpointer, past)
        resuming.start_workdir(run, past, workdir, progress.log)
        update = make_update(run.learner, run.mesh, state.params)
        nonfinite = 0
        tracker = open_tracker(cfg.train.tracker, workdir, dataclasses.asdict(cfg), progress.log)
        with contextlib.closing(Writer(workdir, past.step, progress.log, on_row, tracker)) as writer:
            for step in range(past.step, steps):
                checkpointer.check()  # a save that failed behind the last step
                with progress.phase("update"):
                    bins = put_bins(run.mesh, _bins_of_step(run, step))
                    state, sums = update(state, {}, bins)
                    scalars = {name: float(value) for name, value in jax.device_get(sums).items()}
                values = update_metrics([scalars])
                values["seconds/update"] = progress.take_seconds()["update"]
                writer.scalars(step + 1, values)
                progress.step_done(step + 1, {"loss": values["loss/total"], "s": values["seconds/update"]})
                nonfinite = nonfinite_steps(nonfinite, step + 1, nonfinite_counts([scalars]), cfg.train.max_nonfinite)
                if (step + 1) % cfg.checkpoint.every == 0 or step + 1 == steps:
                    seen = (step + 1) * cfg.train.prompts
                    checkpointer.save(step + 1, state, resuming.checkpoint_meta(run, past, step + 1, seen))
        progress.log(f"compiled {compiled}")
        check_last(nonfinite, steps)
        report.leave(workdir, progress.log)
