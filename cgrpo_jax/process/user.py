"""Functions of the user that meet what a model wrote, in the main thread of a process of their own.

There signals work (as math-verify's time limits need), a call is killed at its limit with all that it started, and
neither a fork nor `os._exit` harms the run. Calls come one after another, from any thread; a process that has ended is
replaced at the next call. Lines of JSON go both ways (`user_worker.py`), so arguments and results are what JSON holds.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from cgrpo_jax.process.calling import Fault, function_of, one_line

WORKER = pathlib.Path(__file__).with_name("user_worker.py")
LOAD_SECONDS = 600.0  # for the import of somebody's module
GRACE = 10.0  # seconds beyond its limit until a process that does not end itself is killed


def by_value(path: str) -> str | None:
    """A function of a notebook or script as text that another process can read; None where it imports it instead.

    Raises: TypeError for a function that cannot be sent, as one that holds a lock; what `function_of` raises.
    """
    if path.partition(":")[0] != "__main__":
        return None
    import cloudpickle

    function = function_of(path)
    try:
        return base64.b64encode(cloudpickle.dumps(function)).decode()
    except Exception as error:  # of whatever it refers to
        raise TypeError(
            f"it cannot be sent to the process in which it would run ({one_line(error)}); write it into a module"
        ) from error


class _Worker:
    """A process, and the functions that it has loaded."""

    def __init__(self) -> None:
        theirs_in, self.requests = os.pipe()
        self.replies, theirs_out = os.pipe()
        try:
            self.process = subprocess.Popen(  # -P: the folder of the script is not searched for imports
                [sys.executable, "-P", str(WORKER), str(theirs_in), str(theirs_out)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs_in, theirs_out),
                start_new_session=True,  # Ctrl-C is for the main process alone
                env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the devices are the run's
            )
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self.ended = os.pidfd_open(self.process.pid)  # a fork of the user's may hold the pipe open for longer
        self.loaded: set[str] = set()
        self.closed = False

    def ask(self, request: Mapping[str, Any], seconds: float) -> Any:
        """What came back. Raises Fault; the process is gone unless its status is "error"."""
        try:
            data, late = self._exchange(json.dumps(request).encode() + b"\n", time.monotonic() + seconds + GRACE)
            if data.startswith(b"{") and data.endswith(b"\n"):
                reply = json.loads(data)
                if "fault" in reply:
                    raise Fault("error", *reply["fault"])
                return reply["found"]
        except Fault:
            raise
        except BaseException:  # somebody stopped waiting, and a reply may be on its way
            self.close()
            raise
        code = self.close()
        if late or data.startswith(b"Timeout"):
            raise _overdue(seconds, data.decode(errors="replace"))
        how = (
            f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended, code {code}"
        )
        raise Fault("died", how, how, None)

    def _exchange(self, request: bytes, until: float) -> tuple[bytes, bool]:
        """The reply, or what there is of it where the process ends; and whether it did not come until then."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, which shows below
            while request:
                request = request[os.write(self.requests, request) :]
        data = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.replies, selectors.EVENT_READ)
            selector.register(self.ended, selectors.EVENT_READ)
            while not (data.startswith(b"{") and data.endswith(b"\n")):
                ready = [key.fd for key, _ in selector.select(max(0.0, until - time.monotonic()))]
                if not ready:
                    return data, True
                if self.replies not in ready:  # it has ended, and all is read
                    break
                chunk = os.read(self.replies, 1 << 16)
                data += chunk
                if not chunk:  # it is about to end
                    selector.unregister(self.replies)
        return data, False

    def close(self) -> int:
        """Kills the process and what it started; its exit code."""
        if not self.closed:
            self.closed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # before it is waited for: its number is still its own
            self.process.wait()
            for descriptor in (self.requests, self.replies, self.ended):
                os.close(descriptor)
        return self.process.wait()


def _overdue(seconds: float, dump: str) -> Fault:
    """The fault of a call that was not back in time, from faulthandler's dump, whose last call comes first."""
    frames = [line.strip() for line in dump.splitlines() if line.startswith('  File "')]
    frames = [frame for frame in frames if str(WORKER) not in frame]
    said = f"not back after {seconds:g} s"
    return Fault("timeout", said, "\n  ".join([said, *reversed(frames)]), None)


class UserProcess:
    """Runs functions by their dotted paths. A context manager: leaving it ends the process and what it started."""

    def __init__(self) -> None:
        self._values: dict[str, str | None] = {}
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> UserProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._worker is not None:
            self._worker.close()

    def load(self, path: str) -> None:
        """Makes a function known. Raises Fault where its module fails; what `by_value` raises."""
        self._values[path] = by_value(path)
        with self._lock:
            self._with(path)

    def call(self, path: str, arguments: Mapping[str, Any], seconds: float) -> Any:
        """What a known function returns, see `user_worker.plain`.

        Args:
          arguments: by name; `trainer_state` becomes an object with these attributes.
          seconds: of the call itself, at most; waiting for others costs nothing.

        Raises:
          Fault: it raised something, took too long, or ended its process.
        """
        with self._lock:
            return self._with(path).ask({"call": path, "arguments": arguments, "seconds": seconds}, seconds)

    def _with(self, path: str) -> _Worker:
        """A process that has loaded the function."""
        if self._worker is None or self._worker.closed:
            self._worker = _Worker()
        if path not in self._worker.loaded:
            load = {"load": path, "value": self._values[path], "path": sys.path, "seconds": LOAD_SECONDS}
            self._worker.ask(load, LOAD_SECONDS)
            self._worker.loaded.add(path)
        return self._worker
