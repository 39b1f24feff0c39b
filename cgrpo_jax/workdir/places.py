"""Paths: as users write them, the lock of a workdir, files written whole, and the cache folder. Imports no jax."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import pathlib
import re
import socket
import sys
import tempfile
from collections.abc import Iterator

from cgrpo_jax.errors import ConfigError

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def expanded(path: str | os.PathLike) -> pathlib.Path:
    """The path, with `~` for the home folder."""
    return pathlib.Path(os.path.expanduser(path))


def local_folder(given: str | os.PathLike, name: str) -> pathlib.Path:
    """The absolute path of a local folder to write to; absolute, because a user's function may call `chdir`.

    Args:
      name: of the option, for messages.

    Raises:
      ConfigError: the name is empty, that of a file, or of remote storage (`gs://`, `s3://`).
    """
    text = os.fspath(given)
    if not text.strip():
        raise ConfigError(f"{name} is empty; name a folder")
    if _REMOTE.match(text):
        raise ConfigError(f"{name} = {text!r}: only a local folder works; copy it there when the run is done")
    path = expanded(text)
    if str(path).startswith("~"):
        raise ConfigError(f"{name} = {text!r}: no such home folder")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{name} = {text!r} is a file; name a folder")
    return path.absolute()


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Adds the path to an OSError of the block that names no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: pathlib.Path, data: str | bytes) -> None:
    """Writes a file by way of `NAME.partial`: a process that is killed leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with writing(partial):
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    partial.rename(path)


class BusyError(OSError):
    """Another process holds the lock of the workdir; the message names it."""


@contextlib.contextmanager
def exclusive(workdir: str | os.PathLike) -> Iterator[None]:
    """Makes the workdir and holds `WORKDIR/.lock` while the block runs; the lock ends with the process, even if killed.

    Where the file system has no locks, a warning goes to stderr and the block runs without one.

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
            why = f"({error.strerror}): nothing keeps a second process from this workdir"
            print(f"warning: {path} cannot be locked {why}", file=sys.stderr)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def cache_root() -> pathlib.Path:
    """The folder of this project's caches. An empty XDG_CACHE_HOME counts as unset."""
    root = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return expanded(root) / "cgrpo_jax"


def cache_folder(name: str) -> pathlib.Path | None:
    """A folder of the cache, made if need be; None, with one warning, where it cannot be written to."""
    root = writable(cache_root())
    return writable(root / name) if root else None


@functools.cache
def writable(folder: pathlib.Path) -> pathlib.Path | None:
    """The absolute path of the folder, made if need be; None, with one warning, where it cannot be written to."""
    try:
        if str(folder).startswith("~"):
            raise OSError(errno.ENOENT, "no such home folder")
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print(f"warning: {folder} cannot be written to ({error.strerror}): nothing is kept there", file=sys.stderr)
        return None
    return folder
