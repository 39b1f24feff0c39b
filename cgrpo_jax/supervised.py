"""The supervised warm start of the embedded model, through the same update, checkpoints and metrics.

A row of advantage 1 whose ratio is taken against `stop_gradient` of itself has the gradient of its log-likelihood, so
supervised training is the RL update on given answers.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np

from cgrpo_jax import build, resuming
from cgrpo_jax.config import Config, ConfigError
from cgrpo_jax.data import arithmetic
from cgrpo_jax.learning import packing
from cgrpo_jax.learning.update import make_update, put_batch
from cgrpo_jax.workdir.checkpoints import Checkpointer
from cgrpo_jax.workdir.lock import exclusive
from cgrpo_jax.workdir.metrics import Writer, update_metrics
from cgrpo_jax.workdir.progress import Progress


def sft(cfg: Config, workdir: pathlib.Path) -> None:
    """Trains on `train.prompts` (chat, answer) rows a step, mean loss per token; resumes by default.

    Plain rows and refinements, which are much longer, take turns, so that neither is padded to the other.
    """
    if cfg.data.source != "arithmetic":
        raise ConfigError(
            f"method=sft trains on the warm-start rows of data.source=arithmetic, not {cfg.data.source!r}"
        )
    mean = dataclasses.replace(cfg.objective, aggregation="token_mean", weights="uniform")
    cfg = dataclasses.replace(cfg, objective=mean)
    run = build.open_run(cfg)
    cfg = run.cfg
    rows_a_step, steps = cfg.train.prompts, cfg.train.steps
    encode = run.tokenizer.encode_chat
    end = run.tokenizer.hf.eos_token_id
    assert isinstance(end, int)

    def prompted(messages, text: str) -> packing.Prompted:
        ids = np.asarray([*run.tokenizer.encode_text(text), end], np.int32)
        return packing.Prompted(encode(messages), [packing.Row(ids, np.zeros(len(ids), np.float32), 1.0, 1.0, False)])

    with exclusive(workdir), Checkpointer(workdir, cfg.checkpoint, print) as checkpointer:
        past = resuming.look_back(run, checkpointer, print)
        if resuming.all_done(run, past, print):
            return
        state, past = resuming.initial_state(run, checkpointer, past)
        resuming.start_workdir(run, past, workdir, print)
        first_step = past.step
        update = make_update(run.learner, run.mesh, state.params)
        writer = Writer(workdir, first_step, print)
        with Progress(first_step, steps) as progress:
            for step in range(first_step, steps):
                checkpointer.check()  # a save that failed behind the last step
                indices = range(step * rows_a_step, (step + 1) * rows_a_step)
                rows = [prompted(*arithmetic.warm_start_row(cfg.seed, index, step % 2 == 1)) for index in indices]
                host = packing.make_batch(rows, rows_per_prompt=1, micro_batch=cfg.train.micro_batch)
                with progress.phase("update"):
                    state, sums = update(state, put_batch(run.mesh, host))
                    scalars = {name: float(value) for name, value in jax.device_get(sums).items()}
                values = update_metrics([scalars])
                values["seconds/update"] = progress.take_seconds()["update"]
                writer.scalars(step + 1, values)
                progress.step_done(step + 1, {"logp": values["policy/logp"], "s": values["seconds/update"]})
                if (step + 1) % cfg.checkpoint.every == 0 or step + 1 == steps:
                    meta = resuming.checkpoint_meta(run, past, step + 1, (step + 1) * rows_a_step)
                    checkpointer.save(step + 1, state, meta)
        writer.close()
