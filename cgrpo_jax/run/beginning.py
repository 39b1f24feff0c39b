"""How every verb begins: the run is opened, its workdir locked, its progress shown."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

from cgrpo_jax.config import Config
from cgrpo_jax.process.hosts import Hosts
from cgrpo_jax.run.build import Run
from cgrpo_jax.run.opening import open_run
from cgrpo_jax.run.startup import lines
from cgrpo_jax.workdir.places import exclusive
from cgrpo_jax.workdir.progress import Progress, Silence


@contextlib.contextmanager
def begun(
    cfg: Config, workdir: pathlib.Path, hosts: Hosts, unit: str = "step"
) -> Iterator[tuple[Run, Progress | Silence]]:
    """Opens a run, as every verb does; its leader holds the lock of the workdir and shows the progress.

    Args:
      unit: what the progress counts.

    Raises:
      ConfigError, CheckpointError, MeshError, DataError, PromptError: all that is wrong, at once.
      BusyError: another process works in the workdir.
    """
    run = open_run(cfg)
    if not hosts.leader:
        yield run, Silence()
        return
    with exclusive(workdir), Progress(0, run.cfg.train.steps, unit) as progress:
        progress.log("\n".join(lines(run)))
        yield run, progress
