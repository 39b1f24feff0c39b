"""Code of the user that a configuration names: found, called within a time limit, and told of where it fails.

It is trusted: it runs in this process, in a thread of the leader, with all that the process may do. A call that takes
too long is left behind and not ended (Python ends no thread); where it computes on, it takes the interpreter's time.
"""

from __future__ import annotations

import importlib
import pathlib
import queue
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

OWN = str(pathlib.Path(__file__).parent)
CELL = 300  # characters of a row in a message


class Overdue(Exception):
    """A call that is not back in time; the message is where it was."""


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


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns. Raises what it raises (also SystemExit), and Overdue after so many seconds."""
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:  # it is raised where somebody waits
            done.put((None, error))

    thread = threading.Thread(target=work, daemon=True, name="user code")  # a daemon: the process ends without it
    thread.start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        frame = sys._current_frames().get(thread.ident or 0)
        frames = [one for one in traceback.extract_stack(frame) if not _ours(one.filename)] if frame else []
        frames = [one for one in frames if pathlib.Path(one.filename).name != "threading.py"]
        raise Overdue(f"not back after {seconds:g} s\n{''.join(traceback.format_list(frames))}".rstrip()) from None
    if error is not None:
        raise error
    return result


def _ours(filename: str) -> bool:
    return filename.startswith(OWN)


def traceback_of(error: BaseException) -> str:
    """The traceback from the user's own first frame on."""
    if isinstance(error, Overdue):
        return str(error)
    at: types.TracebackType | None = error.__traceback__
    while at is not None and _ours(at.tb_frame.f_code.co_filename):
        at = at.tb_next
    return "".join(traceback.format_exception(type(error), error, at, chain=False)).rstrip()


def one_line(error: BaseException) -> str:
    """Type and message of an error, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:CELL]


def shown(row: dict[str, Any]) -> str:
    """A row in a line, each cell cut to a length that can be read."""
    return repr({name: value if len(repr(value)) < CELL else f"{repr(value)[:CELL]}..." for name, value in row.items()})


class Complaints:
    """Says each distinct error once. Any thread may complain."""

    def __init__(self, log: Callable[[str], None]):
        self.log, self.said, self._lock = log, set[Any](), threading.Lock()

    def add(self, what: str, error: BaseException, row: dict[str, Any]) -> None:
        """Errors are the same where type and place in the user's code are."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _ours(frame.filename)]
        place = (frames[-1].filename, frames[-1].lineno) if frames else str(error)
        key = (what, type(error), None if isinstance(error, Overdue) else place)
        with self._lock:
            if key in self.said:
                return
            self.said.add(key)
        self.log(f"{what}: {traceback_of(error)}\n  row: {shown(row)}\n  (said once; the metrics count them)")
