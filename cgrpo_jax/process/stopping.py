"""Ctrl-C and SIGTERM set a flag, which a run reads where it can stop cleanly. Imports nothing of this package.

An exception raised at an arbitrary instruction could be swallowed by a callback of jax, or leave a step half done. So a
signal only sets the flag, and `look` raises between two chunks of sampling, two verdicts or two steps. A second signal
does not wait for that: it ends a command, or interrupts a call, at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_asked: list[int] = []  # the signals that have arrived
_told_on = threading.Event()  # in a run of several hosts, whose leader decides where all of them leave
_here: list[int] = []  # then the signals to this host, until its leader asks it to stop


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and ends. The message says what it has saved."""


def look() -> None:
    """Raises Stopped if a signal has arrived."""
    if _asked:
        raise Stopped


def ask(number: int) -> None:
    """Asks this process to stop, as if it had been sent this signal."""
    if not _asked:
        _asked.append(number)


def tell_on() -> None:
    """From now on a signal does not stop this process by itself: it is told to the leader of the run (`waiting`)."""
    _told_on.set()


def waiting() -> int:
    """The first signal to this process that is to be told to the leader; 0: none."""
    return _here[0] if _here else 0


def exit_code() -> int:
    """The exit status of a process that a signal stopped, by the convention of shells: 128 + signal."""
    return 128 + (_asked[0] if _asked else signal.SIGINT)


def _first(number: int) -> None:
    (_here if _told_on.is_set() else _asked).append(number)
    os.write(2, b"\nstopping after what is under way; once more leaves at once\n")


def for_this_process() -> None:
    """Handles signals for the rest of a command: a second one ends the process, without a traceback.

    A thread of its own reads the signals, so that a second signal also ends a compilation that takes minutes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # what counts was written to the pipe

    def watch() -> None:
        while True:
            number = os.read(reader, 1)[0]
            if number in SIGNALS and not (_asked or _here):
                _first(number)
            elif number in SIGNALS:
                shown = b"\x1b[?25h" if sys.stderr.isatty() else b""  # the cursor, which a progress bar hides
                os.write(2, shown + b"left at once: what was not saved yet is lost\n")
                os._exit(128 + number)

    threading.Thread(target=watch, daemon=True, name="signals").start()


@contextlib.contextmanager
def for_this_call() -> Iterator[None]:
    """Handles signals while a call from Python runs: the first asks it to stop, a second one interrupts it.

    Does nothing outside the main thread, the only one in which Python allows signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if _asked or _here:
            raise KeyboardInterrupt
        _first(number)

    before = {number: signal.signal(number, handle) or signal.SIG_DFL for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()
        _here.clear()
