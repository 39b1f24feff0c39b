"""Functions of the user that a configuration names: how they are found, and how their errors are reported.

They are trusted: they may do all that their process may. Functions that write prompts and rows of tasks run in the
leader's process; rewards and critics, which read what a model wrote, run in a process of their own (`user.py`).
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

CELL = 300  # characters of a row in a message
FAULTS = (Exception, SystemExit, GeneratorExit)  # of somebody's function here; KeyboardInterrupt is somebody's Ctrl-C


class Fault(Exception):
    """An error of a user's function that runs in a process of its own.

    Args:
      status: as in verdicts: "error", "timeout", or "died" if the function ended its process.
      said: type and message of the error, in one line.
      trace: the traceback, from the first frame of the user's code on.
      place: file and line of the error; two faults of one place are the same fault.
    """

    def __init__(self, status: str, said: str, trace: str, place: Sequence[Any] | None):
        super().__init__(trace)
        self.status, self.said, self.trace, self.place = status, said, trace, tuple(place or ())


def function_of(path: str) -> Callable[..., Any]:
    """The function that `package.module:function` names.

    Raises: ValueError if `path` has another form, TypeError if it names no function, and whatever the import raises.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError("give package.module:function")
    found = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise TypeError(f"a {type(found).__name__} is no function")
    return found


def one_line(error: BaseException) -> str:
    """Type and message of an error, in one line of at most `CELL` characters."""
    said = error.said if isinstance(error, Fault) else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return said.removesuffix(": ")[:CELL]


def shown(row: dict[str, Any]) -> str:
    """A row in one line; each cell is cut after `CELL` characters."""
    return repr({name: value if len(repr(value)) < CELL else f"{repr(value)[:CELL]}..." for name, value in row.items()})


class Complaints:
    """Logs each distinct error once. `add` may be called from any thread."""

    def __init__(self, log: Callable[[str], None]):
        self.log, self.said, self._lock = log, set[Any](), threading.Lock()

    def add(self, what: str, error: Exception, row: dict[str, Any]) -> None:
        """Two errors are the same if they have one type and one place in the user's code."""
        key = (what, error.said.partition(":")[0], error.place) if isinstance(error, Fault) else (what, type(error))
        with self._lock:
            if key in self.said:
                return
            self.said.add(key)
        trace = error.trace if isinstance(error, Fault) else one_line(error)
        self.log(f"{what}: {trace}\n  row: {shown(row)}\n  (said once; the metrics count them)")
