"""Sends metrics to Weights & Biases or Trackio, besides the files of the workdir.

The tracker is called in a thread of its own, which takes rows from a bounded queue: one that fails or hangs loses
curves and is reported once, but does not stop the run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pathlib
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from cgrpo_jax.errors import ConfigError
from cgrpo_jax.workdir.places import write_whole

ROWS = 1000  # of the queue
PATIENCE = 20.0  # seconds to wait at the end of a run for the rows in the queue

# Settings of wandb: it sends metrics and configuration, and nothing of the machine, its user, paths or output.
QUIET: dict[str, Any] = {"disable_git": True, "disable_code": True, "save_code": False, "x_disable_meta": True}
QUIET |= {"console": "off", "host": ""}

Log = Callable[[str], None]


class Tracker:
    """One run in a tracker, with the metric names of metrics.jsonl.

    Args:
      name: of the tracker, for messages.
      started: begins the run, and returns a module with `log` and `finish` as wandb has them.
    """

    def __init__(self, name: str, started: Callable[[], Any], log: Log, rows: int = ROWS):
        self.name, self.started, self.say = name, started, log
        self.rows: queue.Queue[dict[str, Any] | None] = queue.Queue(rows)
        self.lost, self.failed = 0, False
        self.thread = threading.Thread(target=self._work, daemon=True, name=name)  # a daemon: the run ends without it
        self.thread.start()

    def row(self, row: Mapping[str, Any]) -> None:
        """Queues a line of metrics.jsonl, without waiting. If the queue is full, the line is dropped and counted."""
        try:
            self.rows.put_nowait(dict(row))
        except queue.Full:
            if not self.lost and not self.failed:
                self.say(f"{self.name} does not keep up: some of its curves will have gaps")
            self.lost += 1

    def close(self, patience: float = PATIENCE) -> None:
        """Waits for the rows in the queue, at most `patience` seconds."""
        try:
            self.rows.put(None, timeout=patience)
            self.thread.join(patience)
        except queue.Full:
            pass
        if self.thread.is_alive():
            lacks = "it may lack the last steps; metrics.jsonl has them"
            self.say(f"{self.name} did not end within {patience:g} s: {lacks}")
        elif self.lost and not self.failed:
            self.say(f"{self.name} lacks {self.lost} lines of metrics.jsonl")

    def _work(self) -> None:
        try:
            tracker = self.started()
            while (row := self.rows.get()) is not None:
                step = row.pop("step")
                tracker.log({name: value for name, value in row.items() if value is not None}, step=step)
            tracker.finish()
        except (Exception, SystemExit) as error:  # whatever a tracker raises
            self.failed = True
            line = " ".join(str(error).split())[:300]
            self.say(f"{self.name} failed and is told no more ({type(error).__name__}: {line}); metrics.jsonl has all")


def _identity(workdir: pathlib.Path) -> str:
    """The id of this run in a tracker, kept in the workdir for when the run is resumed."""
    path = workdir / "tracker_id"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8").strip()


def _start(name: str, workdir: pathlib.Path, config: Mapping[str, Any], log: Log) -> Any:
    """Begins or resumes the run in the tracker, and returns its module. Never prompts for a key."""
    module, known = importlib.import_module(name), _identity(workdir)
    label = f"{workdir.absolute().name}-{known}"
    if name == "trackio":
        project = os.environ.get("TRACKIO_PROJECT", "cgrpo_jax")
        module.init(project=project, name=label, config=dict(config), resume="allow", embed=False)
        return module
    mode = os.environ.get("WANDB_MODE") or ("online" if module.login(prompt=False) else "offline")
    if mode == "offline":
        log(f"wandb is offline; later: wandb sync {workdir}/wandb/offline-run-*")
    project = os.environ.get("WANDB_PROJECT", "cgrpo_jax")
    where = {"dir": str(workdir), "mode": mode, "settings": QUIET}
    module.init(project=project, name=label, id=known, config=dict(config), resume="allow", **where)
    return module


def open_tracker(name: str, workdir: pathlib.Path, config: Mapping[str, Any], log: Log) -> Tracker | None:
    """The tracker that `train.tracker` names; None for ""."""
    return Tracker(name, functools.partial(_start, name, workdir, config, log), log) if name else None


def check_tracker(name: str) -> None:
    """Raises ConfigError where the package of `train.tracker` is not installed."""
    try:
        found = not name or importlib.util.find_spec(name) is not None
    except ValueError:  # a module without a spec
        found = True
    if not found:
        raise ConfigError(f"train.tracker = {name!r} needs its package: pip install 'cgrpo_jax[{name}]'")
