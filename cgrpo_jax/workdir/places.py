"""Where things lie: paths as people write them, and what can be made again. Imports no jax."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator

from cgrpo_jax.errors import ConfigError

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def expanded(path: str | os.PathLike) -> pathlib.Path:
    """The path, with `~` for the home folder."""
    return pathlib.Path(os.path.expanduser(path))


def local_folder(given: str | os.PathLike, name: str) -> pathlib.Path:
    """A folder of this machine that something is written to, absolute, so that no `chdir` of a user's function moves
    it; `name` is that of the option.

    Raises:
      ConfigError: nothing is named, a file, or a place that only a network knows (`gs://`, `s3://`).
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
def writing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Errors of the block name the file that it writes; that of a full disk does not by itself."""
    try:
        yield path
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def cache_root() -> pathlib.Path:
    """Where this project keeps what can be made again. An empty XDG_CACHE_HOME counts as none."""
    root = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return expanded(root) / "cgrpo_jax"


def cache_folder(name: str) -> pathlib.Path | None:
    """A folder of the cache that is there and can be written to; None, which is said once, where there is none."""
    root = writable(cache_root())
    return writable(root / name) if root else None


@functools.cache
def writable(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder itself, made where it was not; None, which is said on stderr, where nothing can be kept in it."""
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
