"""Metrics to a tracker of others, beside those of the workdir: Weights & Biases, or Trackio.

All that is asked of it happens in a thread of its own, which is given rows by a queue with an end: a tracker that fails
or hangs costs its own curves, is said once, and stops no run.
"""

from __future__ import annotations

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

ROWS = 1000  # that wait for a slow tracker, at most
PATIENCE = 20.0  # seconds for what is left at the end of a run

# Of wandb: it is told metrics and settings, and sends nothing of the machine, its user, paths and printed lines beside.
QUIET: dict[str, Any] = {
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "x_disable_meta": True,
    "host": "",
}

Log = Callable[[str], None]


class Tracker:
    """One run of a tracker. The names of the metrics are those of metrics.jsonl.

    Args:
      name: of the module, with `init`, `log` and `finish` as wandb has them.
      started: calls `init`.
    """

    def __init__(self, name: str, started: Callable[[], Any], log: Log, rows: int = ROWS):
        self.name, self.started, self.say = name, started, log
        self.rows: queue.Queue[dict[str, Any] | None] = queue.Queue(rows)
        self.lost, self.failed = 0, False
        self.thread = threading.Thread(target=self._work, daemon=True, name=name)  # a daemon: the run ends without it
        self.thread.start()

    def row(self, row: Mapping[str, Any]) -> None:
        """Takes a line of metrics.jsonl and returns at once. Where the queue is full the line is lost, and counted."""
        try:
            self.rows.put_nowait(dict(row))
        except queue.Full:
            if not self.lost and not self.failed:
                self.say(f"{self.name} does not keep up: some of its curves will have gaps")
            self.lost += 1

    def close(self, patience: float = PATIENCE) -> None:
        """Waits for what is left, for so many seconds and no longer."""
        try:
            self.rows.put(None, timeout=patience)
            self.thread.join(patience)
        except queue.Full:
            pass
        if self.thread.is_alive():
            self.say(
                f"{self.name} did not end within {patience:g} s: it may lack the last steps; metrics.jsonl has them"
            )
        elif self.lost and not self.failed:
            self.say(f"{self.name} lacks {self.lost} lines of metrics.jsonl")

    def _work(self) -> None:
        try:
            tracker = self.started()
            while (row := self.rows.get()) is not None:
                step = row.pop("step")
                tracker.log({name: value for name, value in row.items() if value is not None}, step=step)
            tracker.finish()
        except (Exception, SystemExit) as error:  # of others
            self.failed = True
            line = " ".join(str(error).split())[:300]
            self.say(f"{self.name} failed and is told no more ({type(error).__name__}: {line}); metrics.jsonl has all")


def _identity(workdir: pathlib.Path) -> str:
    """The name of this run for a tracker, the same when the run is resumed."""
    path = workdir / "tracker_id"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        partial.rename(path)
    return path.read_text(encoding="utf-8").strip()


def _start(name: str, workdir: pathlib.Path, config: Mapping[str, Any], log: Log) -> Any:
    """The module of a tracker, its run begun or taken up again. Asks nobody for a key."""
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
    """The tracker of `train.tracker`; None for ""."""
    if not name:
        return None

    def started() -> Any:
        return _start(name, workdir, config, log)

    return Tracker(name, started, log)


def check_tracker(name: str) -> None:
    """Raises ConfigError where the package of `train.tracker` is not installed."""
    try:
        found = not name or importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was made by hand
        found = True
    if not found:
        raise ConfigError(f"train.tracker = {name!r} needs its package: pip install 'cgrpo_jax[{name}]'")
