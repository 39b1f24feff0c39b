"""Where a run begins: from the newest checkpoint of its workdir, which must be of the same run, or anew."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from cgrpo_jax.config import Config, public
from cgrpo_jax.data.files import local_file
from cgrpo_jax.errors import CheckpointError
from cgrpo_jax.learning.update import TrainState, init_state
from cgrpo_jax.model import hf
from cgrpo_jax.model.decoder import Params
from cgrpo_jax.model.sharding import joined, split
from cgrpo_jax.run.build import Run
from cgrpo_jax.run.checks import holds_out
from cgrpo_jax.run.models import check_frozen, frozen_digest
from cgrpo_jax.workdir import reading
from cgrpo_jax.workdir.changes import check_changes, files_digest, flat
from cgrpo_jax.workdir.checkpoints import Checkpointer
from cgrpo_jax.workdir.digests import tree_digest
from cgrpo_jax.workdir.places import writing

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Past:
    """How far a run has come before this start. It holds no arrays."""

    step: int  # 0: nothing
    problems_seen: int  # position in the training stream
    contents: dict[str, str]  # of this run, see `contents_of`
    evaluated: bool  # as far as the configuration asks: no evaluation of `step` is still to be done
    initial: str  # digest of the initial values of what is trained; "" until they are loaded for the first time
    frozen: str  # digest of the parameters that are not trained, which no checkpoint holds; "": all are trained


def contents_of(run: Run) -> dict[str, str]:
    """What the names of the configuration stand for, as dotted key -> digest of the files (their names and bytes).

    Problems that are no file (a hub set, a task) stand for themselves: source and revision.
    """
    data, cfg = local_file(run.cfg.data.source), run.cfg
    if data is None:
        content = f"{cfg.data.source} at {cfg.data.revision}"
    else:
        content = files_digest([data]) if data.is_file() else "no such file"
    found = model_contents(run) | {"data.content": content}
    if holds_out(cfg):
        found["data.held_out"] = "a tenth of the questions"  # with or without it the stream is another
    return found


def model_contents(run: Run) -> dict[str, str]:
    """The part of `contents_of` that is about the models: digests of their weights and of the files beside them."""
    found = {}
    for model in [run.policy] + ([run.second] if run.second else []):
        weights = model.folder.glob("*.safetensors") if model.seed is None else []
        found[f"{model.section}.weights"] = files_digest(weights)
        found[f"{model.section}.files"] = files_digest(_side_files(model.folder))
    return found


def look_back(run: Run, checkpointer: Checkpointer, log: Log) -> Past:
    """Reads the newest checkpoint's metadata; logs what has changed in the configuration since then.

    Raises:
      CheckpointError: the checkpoint cannot be read, or is not what was saved; names the newest that is whole.
      ConfigError: a change that has to be asked for by name (`workdir/changes.py`).
    """
    step, contents, accept = checkpointer.newest(), contents_of(run), run.cfg.train.accept_changes
    new = flat(public(run.cfg)) | contents
    if step is None:
        check_changes(new, new, accept, 0, log)
        return Past(0, 0, contents, not run.cfg.eval.every, "", "")
    try:
        meta = checkpointer.meta(step)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_mend(run, checkpointer, step)}") from error
    check_changes(flat(meta["config"]) | meta["contents"], new, accept, step, log)
    evaluated = not evaluation_due(run.cfg, step) or _is_evaluated(checkpointer.folder.parent, step, log)
    return Past(step, meta["problems_seen"], contents, evaluated, meta["initial"], meta.get("frozen", ""))


def evaluation_due(cfg: Config, step: int) -> bool:
    """Whether a step is followed by an evaluation; the last one always is, where there are any."""
    return cfg.eval.every > 0 and (step % cfg.eval.every == 0 or step == cfg.train.steps)


def _is_evaluated(workdir: pathlib.Path, step: int, log: Log) -> bool:
    """Whether the metrics hold an evaluation of this step; a run that was stopped in it has saved the step without."""
    if not (workdir / "metrics.jsonl").exists():
        return False
    rows = [row for row in reading.metrics(workdir, log) if row["step"] == step]
    return any(name.startswith("eval/") for row in rows for name in row)


def initial_state(run: Run, checkpointer: Checkpointer, past: Past) -> tuple[TrainState, Params, Past]:
    """The state of the newest checkpoint, else of the initial model; the frozen parameters; the past with digests.

    Raises:
      CheckpointError: the checkpoint cannot be read, or the frozen parameters are not those that the run began with.
    """
    if not past.step:
        trained, frozen = split(run.policy.weights(), run.policy.trained)
        past = dataclasses.replace(past, initial=tree_digest(trained), frozen=frozen_digest(frozen))
        return init_state(run.learner, run.mesh, trained), frozen, past
    try:
        parts = checkpointer.restore(past.step, **run.abstract_state()._asdict())
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_mend(run, checkpointer, past.step)}") from error
    frozen = run.policy.weights(run.policy.frozen)
    check_frozen(run.cfg.model.path, frozen, past.frozen)
    return TrainState(**parts), frozen, past


def _mend(run: Run, checkpointer: Checkpointer, step: int) -> str:
    """Advice for an error: what to do where the newest checkpoint, that of `step`, cannot be used."""
    whole = checkpointer.newest_whole(step, **run.abstract_state()._asdict())
    if whole is None:
        return "no older checkpoint here is whole: take another workdir"
    away = ", ".join(str(checkpointer.folder / str(other)) for other in checkpointer.steps() if other > whole)
    return f"the newest whole checkpoint is step {whole}: to go on from it, move away {away}"


def reference_params(run: Run, frozen: Params, past: Past) -> Params:
    """All parameters of the reference of the KL term: the initial ones, of which the frozen ones are here already.

    Raises:
      CheckpointError: they are not those that the run began with.
    """
    initial = run.policy.weights(run.policy.trained)
    if tree_digest(initial) != past.initial:
        raise CheckpointError(
            f"model.path = {run.cfg.model.path!r}: not the weights this run began with, which the KL term "
            "(objective.kl_coef) is taken against; give those or take another workdir"
        )
    return joined(initial, frozen)


def checkpoint_meta(run: Run, past: Past, step: int, problems_seen: int) -> dict[str, Any]:
    """The metadata of a checkpoint. It has no state of random numbers, for they follow from seed and step."""
    return {
        "step": step,
        "problems_seen": problems_seen,
        "config": public(run.cfg),
        "contents": past.contents,
        "initial": past.initial,
    } | ({"frozen": past.frozen} if past.frozen else {})


def _side_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [folder / name for name in hf.SIDE_FILES if (folder / name).exists()]


def start_workdir(run: Run, past: Past, workdir: pathlib.Path, log: Log) -> None:
    """Writes `config.json`, and once the side files that an export needs.

    Raises:
      CheckpointError: `WORKDIR/hf` holds the side files of another model, and no checkpoint goes with them.
    """
    side = workdir / "hf"
    if past.step:
        log(f"resuming after step {past.step}")
    if not side.exists():
        partial = workdir / "hf.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        hf.copy_side_files(run.policy.folder, partial)
        partial.rename(side)
    elif files_digest(_side_files(side)) != past.contents["model.files"]:
        if not past.step:
            raise CheckpointError(f"{side}: files of another model than {run.policy.folder}; take another workdir")
        log(f"{side} keeps the files the run began with")
    partial = workdir / "config.json.partial"
    with writing(partial):
        partial.write_text(json.dumps(public(run.cfg), indent=2) + "\n", encoding="utf-8")
    partial.rename(workdir / "config.json")
