"""Orbax checkpoints of a run: parameters, optimizer state and metadata, saved asynchronously.

The metadata of a step is one JSON object: the position of the run, its configuration, its metrics, a digest of each
array, taken before the array was written, and a digest of the object itself. A restore is compared with the digests.
Older checkpoints are deleted only after the new one has been opened for reading.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp

from cgrpo_jax.config.options import CheckpointConfig
from cgrpo_jax.errors import CheckpointError
from cgrpo_jax.learning.update import TrainState
from cgrpo_jax.model.decoder import Params
from cgrpo_jax.model.sharding import path_of
from cgrpo_jax.workdir.digests import leaf_digests, nonfinite_leaves
from cgrpo_jax.workdir.places import write_whole

SEAL = "seal"  # the key of the digest over the metadata
_OF_AN_ARRAY = "Encountered error while reading array"
_DETAILS = re.compile(r"\. See full TensorStore details| \[(?:source locations|tensorstore_spec)(?:\[\d+\])?=")


def _digest(meta: Mapping[str, Any]) -> str:
    """32 hex digits over names and values, in whatever order."""
    text = json.dumps({name: value for name, value in meta.items() if name != SEAL}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata as JSON returns it, with its own digest."""
    plain = json.loads(json.dumps(meta))
    return plain | {SEAL: _digest(plain)}


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """The metadata of a checkpoint folder.

    Raises:
      CheckpointError: the metadata cannot be read, is not what was written, belongs to another step, or holds no
        digests.
    """
    path = folder / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({_one_line(error)})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("digests"), dict) or SEAL not in meta:
        raise CheckpointError(f"{path}: no digests in it, so nothing can vouch for the checkpoint")
    if meta[SEAL] != _digest(meta):
        raise CheckpointError(f"{path}: not what was saved (its digest differs)")
    if str(meta.get("step", folder.name)) != folder.name:
        raise CheckpointError(f"{folder}: holds step {meta['step']}; was the folder renamed?")
    return meta


@functools.cache
def _silence_other_readers() -> None:
    """Stops other reader threads from printing their errors after the first one was raised; once a process.

    Otherwise each array that cannot be read prints a traceback and a page of TensorStore's details.
    """
    hook = sys.unraisablehook

    def without_readers(found: Any) -> None:
        if not str(found.exc_value).startswith(("Event loop is closed", _OF_AN_ARRAY)):
            hook(found)

    sys.unraisablehook = without_readers
    warnings.filterwarnings("ignore", message="coroutine 'Store.* was never awaited", category=RuntimeWarning)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())


def _one_line(error: BaseException) -> str:
    """The first line of an error of Orbax or TensorStore, whose messages fill pages; a long line loses its middle."""
    if str(error).startswith(_OF_AN_ARRAY) and error.__cause__:
        error = error.__cause__  # which names the array
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = _DETAILS.split(line)[0].strip()
    return line if len(line) <= 300 else f"{line[:140]} ... {line[-140:]}"


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """A log filter: what Orbax logs about a failed save is raised here as one line instead."""
    return "orbax" not in pathlib.PurePath(record.pathname).parts


def best_step(metrics: Mapping[int, Mapping[str, float]], name: str) -> int | None:
    """The step with the highest value of `name`, the newest of equals; None where no step has one."""
    known = [(values[name], step) for step, values in metrics.items() if name in values]
    return max(known)[1] if known else None


def check_path(path: pathlib.Path) -> None:
    """Raises CheckpointError for a path that Orbax takes for a glob pattern: it saves there but cannot read."""
    if glob.escape(str(path)) != str(path):
        raise CheckpointError(f"{path}: checkpoints cannot be kept under a path with *, ? or [; take another folder")


class Checkpointer:
    """Checkpoints under `WORKDIR/checkpoints/STEP`. A context manager: leaving it waits for the last save."""

    def __init__(self, workdir: str | os.PathLike, cfg: CheckpointConfig, log: Callable[[str], None]):
        """Raises CheckpointError where `WORKDIR/checkpoints` is a file, or a path that Orbax cannot read."""
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        check_path(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: a file stands where checkpoints are to be kept; move it away")
        self.metric, self.keep, self.log = cfg.best, cfg.keep, log
        self.saving: int | None = None  # the step of the save in progress
        absl.logging.get_absl_logger().addFilter(_not_of_orbax)
        # Temporary directories are those of saves that a kill or a full disk cut short.
        options = ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        self._note_best()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Waits for the save in progress. After an exception, a failed save is only logged, so as not to hide it."""
        step = self.saving
        if step is not None and kind is not None:
            self.log(f"finishing the save of step {step}")
        try:
            self.wait()
        except CheckpointError as failed:
            if kind is None:
                raise
            self.log(str(failed))
        else:
            if step is not None and kind is not None:
                self.log(f"step {step} is saved")
        finally:
            self.manager.close()

    def save(
        self, step: int, state: TrainState, meta: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts a save; the arrays are copied before this returns, so the state may be donated afterwards.

        Args:
          metrics: of the evaluation of this state, if there was one; they decide which checkpoint is the best.

        Raises:
          CheckpointError: the save cannot start, the previous one failed, or an array holds a NaN or an infinity.
        """
        self.wait()
        if bad := nonfinite_leaves(state._asdict()):
            raise self._lost(step, f"{bad[0]} holds a NaN or an infinity")
        items = {name: ocp.args.StandardSave(tree) for name, tree in state._asdict().items()}
        meta = meta | {"step": step, "metrics": dict(metrics or {}), "digests": leaf_digests(state._asdict())}
        self.saving = step
        try:
            self.manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(sealed(meta))))
        except Exception as error:
            self.saving = None
            raise self._lost(step, _one_line(error)) from error

    def ended(self) -> bool:
        """Whether the last save has ended, well or not, so that `wait` returns or raises at once."""
        return not self.manager.is_saving_in_progress()

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises CheckpointError if it failed."""
        if self.saving is None:
            return
        step = self.saving
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            self.saving = None
            raise self._lost(step, _one_line(error)) from error
        self.saving = None  # only now: if Ctrl-C interrupts the wait, `__exit__` waits again
        try:
            self._read_back(step)
        except Exception as error:
            raise self._lost(step, _one_line(error)) from error
        kept = {*self.steps()[-self.keep :], self._note_best()}
        for older in [older for older in self.steps() if older not in kept]:
            self.manager.delete(older)

    def _read_back(self, step: int) -> None:
        """Opens the metadata and every array, as a resumed run does: Orbax does not raise every failure."""
        folder = self.folder / str(step)
        for item in {path.partition("/")[0] for path in read_meta(folder)["digests"]}:
            ocp.StandardCheckpointHandler().metadata(folder / item)

    def _lost(self, step: int, why: str) -> CheckpointError:
        return CheckpointError(f"{self.folder / str(step)}: the save is lost ({why}); older checkpoints are untouched")

    def steps(self) -> list[int]:
        """Steps on disk, in ascending order."""
        return sorted(self.manager.all_steps())

    def newest(self) -> int | None:
        return self.manager.latest_step()

    def newest_whole(self, before: int, **abstract: Any) -> int | None:
        """The newest step before this one that `restore` accepts; it restores each one that it tries."""
        for step in reversed([step for step in self.steps() if step < before]):
            try:
                self.restore(step, **abstract)
            except CheckpointError:
                continue
            return step
        return None

    def best(self) -> int | None:
        """The best step on disk by `checkpoint.best`; None where none was evaluated."""
        return best_step({step: self._metrics(step) for step in self.steps()} if self.metric else {}, self.metric)

    def _metrics(self, step: int) -> dict[str, float]:
        """Metrics of the evaluation of a step; empty, and logged, where its metadata cannot be read."""
        try:
            return dict(self.meta(step)["metrics"])
        except CheckpointError as error:
            self.log(f"{error}; this step is never the best one")
            return {}

    def _note_best(self) -> int | None:
        """Returns `best`, and writes it to `WORKDIR/best.json` and the log when it has changed."""
        step = self.best()
        if step is None or jax.process_index():
            return step
        note = {"step": step, "metric": self.metric, "value": self.meta(step)["metrics"][self.metric]}
        path = self.folder.with_name("best.json")
        text = json.dumps(note) + "\n"
        if path.exists() and path.read_bytes() == text.encode():
            return step
        write_whole(path, text)
        self.log(f"best so far: step {step}, {self.metric} {note['value']:.4f}")
        return step

    def meta(self, step: int) -> dict[str, Any]:
        """The metadata of a step. Raises CheckpointError, see `read_meta`."""
        return read_meta(self.folder / str(step))

    def restore(self, step: int, **abstract: Any) -> dict[str, Any]:
        """The named parts (`params`, `opt_state`) with the shapes, dtypes and shardings asked for.

        Raises:
          CheckpointError: the checkpoint cannot be read, is not what was saved, or holds a NaN or an infinity.
        """
        folder = self.folder / str(step)
        digests = self.meta(step)["digests"]
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        _silence_other_readers()
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise CheckpointError(f"{folder}: cannot be read ({_one_line(error)})") from error
        parts = {name: restored[name] for name in abstract}
        check_digests(folder, parts, digests)
        check_finite(str(folder), parts)
        return parts


def check_digests(folder: pathlib.Path, parts: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Raises CheckpointError that names the first leaf of `parts` with another digest than when it was saved."""
    found = leaf_digests(dict(parts))
    saved = {path: digest for path, digest in digests.items() if path.split("/")[0] in parts}
    for path in sorted(found.keys() | saved.keys()):
        if found.get(path) != saved.get(path):
            raise CheckpointError(f"{folder}: {path} is not what was saved (its digest differs)")


def check_finite(where: str, tree: Any) -> None:
    """Raises CheckpointError that names the first leaf of `tree` with a NaN or an infinity."""
    if bad := nonfinite_leaves(tree):
        raise CheckpointError(f"{where}: {bad[0]} holds a NaN or an infinity ({len(bad)} such arrays in all)")


def save_params(folder: pathlib.Path, params: Params) -> None:
    """Saves parameters alone, for `convert --to=orbax`: `params` and `meta`, laid out as in a step of a run.

    Raises CheckpointError for a path that Orbax cannot read.
    """
    check_path(folder.absolute())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "params", params)
    (folder / "meta").mkdir()
    meta = json.dumps(sealed({"digests": leaf_digests({"params": params})}))
    (folder / "meta" / "metadata").write_text(meta, encoding="utf-8")


def restore_params(
    folder: pathlib.Path, sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
) -> Params:
    """Reads parameters that `save_params` or a run has saved, in the dtype of the file.

    Args:
      sharding_of: (path, shape) -> sharding.

    Raises:
      CheckpointError: the folder cannot be read, or a parameter is not what was saved.
    """
    digests, source = read_meta(folder)["digests"], folder.absolute() / "params"

    def placed(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(path_of(path), leaf.shape))

    _silence_other_readers()
    try:
        tree = ocp.StandardCheckpointHandler().metadata(source).tree
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(source, jax.tree_util.tree_map_with_path(placed, tree))
    except Exception as error:
        raise CheckpointError(f"{source}: cannot be read ({_one_line(error)})") from error
    check_digests(folder, {"params": params}, digests)
    check_finite(str(folder), {"params": params})
    return params
