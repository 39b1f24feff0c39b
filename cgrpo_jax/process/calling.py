"""Code of the user that a configuration names: found, and told of where it fails.

It is trusted: it may do all that its process may. Prompts and rows of tasks are written in the process that leads,
rewards and critiques, which meet what a model wrote, in one of their own (`user_process.py`).
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

CELL = 300  # characters of a row in a message
FAULTS = (Exception, SystemExit, GeneratorExit)  # of somebody's function here; KeyboardInterrupt is somebody's Ctrl-C


class Fault(Exception):
    """What went wrong in a function that runs in a process of its own.

    Args:
      status: as of verdicts: "error", "timeout", or "died" where it ended its process.
      said: type and message in a line.
      trace: the traceback from the user's own first frame on.
      place: file and line; the same fault is at the same place.
    """

    def __init__(self, status: str, said: str, trace: str, place: Sequence[Any] | None):
        super().__init__(trace)
        self.status, self.said, self.trace, self.place = status, said, trace, tuple(place or ())


def function_of(path: str) -> Callable[..., Any]:
    """The function of a dotted path, `package.module:function`.

    Raises: ValueError for what is no such path, TypeError for what is no function, and whatever the import raises.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError("give package.module:function")
    found = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise TypeError(f"a {type(found).__name__} is no function")
    return found


def one_line(error: BaseException) -> str:
    """Type and message of an error, in a line."""
    said = error.said if isinstance(error, Fault) else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return said.removesuffix(": ")[:CELL]


def shown(row: dict[str, Any]) -> str:
    """A row in a line, each cell cut to a length that can be read."""
    return repr({name: value if len(repr(value)) < CELL else f"{repr(value)[:CELL]}..." for name, value in row.items()})


class Complaints:
    """Says each distinct error once. Any thread may complain."""

    def __init__(self, log: Callable[[str], None]):
        self.log, self.said, self._lock = log, set[Any](), threading.Lock()

    def add(self, what: str, error: Exception, row: dict[str, Any]) -> None:
        """Errors are the same where their type and their place in the user's code are."""
        key = (what, error.said.partition(":")[0], error.place) if isinstance(error, Fault) else (what, type(error))
        with self._lock:
            if key in self.said:
                return
            self.said.add(key)
        trace = error.trace if isinstance(error, Fault) else one_line(error)
        self.log(f"{what}: {trace}\n  row: {shown(row)}\n  (said once; the metrics count them)")
