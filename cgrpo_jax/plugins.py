"""What a configuration names by a dotted path (package.module:function): imported, and tried before all else."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cgrpo_jax.config import ConfigError
from cgrpo_jax.options import TextsConfig
from cgrpo_jax.records import Message
from cgrpo_jax.text.prompts import Texts

Encode = Callable[[Sequence[Message]], list[int]]


def _fault(key: str, path: str, error: Exception) -> ConfigError:
    line = " ".join(str(error).split())[:300]
    return ConfigError(f"config.{key} = {path!r}: {type(error).__name__}: {line}")


def imported(key: str, path: str) -> Callable[..., Any]:
    """The function of a dotted path. Raises ConfigError, which names `key` and the cause, where there is none."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"config.{key} = {path!r}: give package.module:function")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # somebody's module may raise anything
        raise _fault(key, path, error) from error
    if not callable(found):
        raise ConfigError(f"config.{key} = {path!r}: a {type(found).__name__} is no function")
    return found


def _encoded(turns: Any, encode: Encode) -> None:
    """Raises an error for what is no chat that a model can answer."""
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise TypeError("chat turns are needed, as [{'role': 'user', 'content': ...}]")
    if turns[-1].get("role") != "user" or not all(isinstance(turn.get("content"), str) for turn in turns):
        raise ValueError("each turn needs text as its 'content', and the last one must be the user's")
    encode(turns)


def open_texts(cfg: TextsConfig, encode: Encode) -> Texts:
    """The functions that write the prompts, each called once on a plain problem.

    Args:
      encode: chat turns -> ids; raises where the model's template takes no such turns.

    Raises:
      ConfigError: one cannot be imported, fails, or returns no chat turns; names its key and the cause in one line.
    """
    paths = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    texts = Texts(**{name: imported(f"texts.{name}", path) for name, path in paths.items()})
    tried: dict[str, tuple] = {
        "task": ("What is 2+3?",),
        "critique": ("What is 2+3?", "It is 6.", "5", True),
        "refinement": ("What is 2+3?", [("It is 6.", "That is wrong.")] * 2),
    }
    for name, arguments in tried.items():
        try:
            _encoded(getattr(texts, name)(*arguments), encode)
        except Exception as error:  # of somebody's function
            raise _fault(f"texts.{name}", paths[name], error) from error
    return texts
