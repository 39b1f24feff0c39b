"""Orbax checkpoints of a run: parameters, optimizer, and where the run stood. Asynchronous; resume is the default."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from cgrpo_jax.learning.update import TrainState
from cgrpo_jax.model.decoder import Params
from cgrpo_jax.model.hf_config import CheckpointError
from cgrpo_jax.model.sharding import path_of


class Checkpointer:
    """Checkpoints under `WORKDIR/checkpoints/STEP`. Use as a context manager: leaving waits for the last save."""

    def __init__(self, workdir: str | os.PathLike, keep: int = 2):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc) -> None:
        self.manager.close()

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts a save; the arrays are copied before this returns, so the state may be donated afterwards."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in state._asdict().items()}
        self.manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self.manager.wait_until_finished()

    def newest(self) -> int | None:
        return self.manager.latest_step()

    def restore(self, step: int, **abstract: Any) -> dict[str, Any]:
        """The named parts (`params`, `opt_state`) with the shapes, dtypes and shardings asked for, and `meta`.

        Raises:
          CheckpointError: the checkpoint exists but cannot be read. Nothing is started afresh instead.
        """
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore()))
        except Exception as error:
            raise CheckpointError(f"{self.folder / str(step)}: cannot be read ({error})") from error
        return {name: restored[name] for name in (*abstract, "meta")}


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes with the shardings to restore into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def save_params(folder: pathlib.Path, params: Params) -> None:
    """Parameters alone, for `convert --to=orbax`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), params)


def restore_params(
    folder: pathlib.Path, sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
) -> Params:
    """Parameters of `save_params` (or the `params` item of a step) in the dtype they have on file.

    Args:
      sharding_of: (path, shape) -> sharding.

    Raises:
      CheckpointError: the folder exists but cannot be read.
    """
    try:
        tree = ocp.StandardCheckpointHandler().metadata(folder.absolute()).tree
        with ocp.StandardCheckpointer() as checkpointer:
            abstract = jax.tree_util.tree_map_with_path(
                lambda path, m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding_of(path_of(path), m.shape)),
                tree,
            )
            return checkpointer.restore(folder.absolute(), abstract)
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
