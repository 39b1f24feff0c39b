"""One process a workdir. The lock lies with the process: killed or not, when it ends the workdir is free."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import socket
import sys
from collections.abc import Iterator


class BusyError(OSError):
    """Another process works on the workdir; the message names it."""


@contextlib.contextmanager
def exclusive(workdir: str | os.PathLike) -> Iterator[None]:
    """Makes the workdir and holds `WORKDIR/.lock` while the block runs.

    Where the file system knows no locks, that is said once on stderr and the block runs without.

    Raises:
      BusyError: another process holds it.
      OSError: the folder cannot be made or written to.
    """
    path = pathlib.Path(workdir) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise BusyError(f"{workdir}: {owner} works on it; wait for its end or take another workdir") from None
        except OSError as error:
            unprotected = "nothing keeps a second process from this workdir"
            print(f"warning: {path} cannot be locked ({error.strerror}): {unprotected}", file=sys.stderr)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
