"""Configuration files, by name or by path. Imports no jax.

The files of `configs/` travel in the package; in a checkout they lie beside it. A name is the file's, without .py.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import pathlib
import traceback
from collections.abc import Callable

from ml_collections import config_dict

from cgrpo_jax.errors import ConfigError

_PACKAGE = pathlib.Path(__file__).parents[1]


def folder() -> pathlib.Path:
    """Where the named configurations lie: in the installed package, else in the checkout."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """The names that `get_config` knows."""
    return sorted(path.stem for path in folder().glob("*.py"))


def find(name: str) -> pathlib.Path:
    """The file of a name; what ends in .py or holds a slash is a path. Raises ConfigError where there is none."""
    if name.endswith(".py") or os.sep in name:
        path = pathlib.Path(os.path.expanduser(name))
        if not path.is_file():
            raise ConfigError(f"{name}: no such configuration file")
        return path
    if name not in names():
        raise ConfigError(f"no configuration {name!r}; known: {', '.join(names())}; or give the path of a .py file")
    return folder() / f"{name}.py"


def _fault(path: pathlib.Path, error: Exception) -> ConfigError:
    """What went wrong inside a configuration file, with its line there."""
    line, own = None, os.path.abspath(path)
    if isinstance(error, SyntaxError) and error.filename and os.path.abspath(error.filename) == own:
        line, text = error.lineno, error.msg
    else:
        text = str(error)
        for frame in traceback.extract_tb(error.__traceback__):
            line = frame.lineno if os.path.abspath(frame.filename) == own else line
    where = f"{path}, line {line}" if line else f"{path}"
    return ConfigError(f"{where}: {type(error).__name__}: {(text.splitlines() or [''])[0]}")


def _function(path: pathlib.Path) -> Callable[..., object]:
    """`get_config` of a file. Raises ConfigError, which the file's own error has caused, where that fails."""
    spec = importlib.util.spec_from_file_location(f"cgrpo_jax_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # of a .py file there always is one
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _fault(path, error) from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path}: defines no function get_config")
    return module.get_config


def get_config(config: str | os.PathLike) -> config_dict.ConfigDict:
    """The configuration of a name ("quickstart"), of a path, or of either with an argument ("quickstart:dr_grpo").

    Any leaf may be changed before it is run: config.train.steps = 12. Raises ConfigError for a name, a path or an
    argument that is not known, and for a file that fails, with the line.
    """
    given = os.fspath(config)
    name, colon, argument = given.partition(":")
    path = find(name)
    function, arguments = _function(path), [argument] if colon else []
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{given}: get_config of {path}: {error}") from error
    try:
        made = function(*arguments)
    except Exception as error:
        if arguments and isinstance(error, ValueError):  # an argument that the file does not know
            raise ConfigError(f"{given}: {error}") from error
        raise _fault(path, error) from error
    if not isinstance(made, config_dict.ConfigDict):
        raise ConfigError(f"{path}: get_config returned {type(made).__name__}; start from config.default_config()")
    return made
