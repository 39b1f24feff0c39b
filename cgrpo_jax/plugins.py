"""What a configuration names by a dotted path (package.module:function): imported, and tried before all else."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cgrpo_jax.config import Config, ConfigError, samples_refinements
from cgrpo_jax.data.sources import Problems
from cgrpo_jax.grading.functions import FunctionError, Functions, Named
from cgrpo_jax.options import TextsConfig
from cgrpo_jax.records import Attempt, Completion, Message, Problem
from cgrpo_jax.rollout.own_critic import OwnCritic
from cgrpo_jax.text.prompts import Texts
from cgrpo_jax.text.tokenizer import Tokenizer
from cgrpo_jax.trusted import function_of

Encode = Callable[[Sequence[Message]], list[int]]
TRIED = 3  # rows
TAKEN = ("responses", "refinements", "trained")  # reward/NAME of the metrics


def _fault(key: str, path: str, error: Exception) -> ConfigError:
    line = " ".join(str(error).split())[:300]
    return ConfigError(f"config.{key} = {path!r}: {type(error).__name__}: {line}")


def imported(key: str, path: str) -> Callable[..., Any]:
    """The function of a dotted path. Raises ConfigError, which names `key` and the cause, where there is none."""
    try:
        return function_of(path)
    except Exception as error:  # somebody's module may raise anything
        raise _fault(key, path, error) from error


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


def open_rewards(cfg: Config, log: Callable[[str], None]) -> Functions | None:
    """The functions of `reward.fn`; None where there are none. Raises ConfigError for one that cannot be imported."""
    paths = [path for part in cfg.reward.fn.split(",") if (path := part.strip())]
    calls = [imported("reward.fn", path) for path in paths]
    short = [path.partition(":")[2] for path in paths]
    alike = collections.Counter(short)
    names = [path if alike[name] > 1 or name in TAKEN else name for path, name in zip(paths, short, strict=True)]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"config.reward.fn = {cfg.reward.fn!r} names a function twice")
    named = [Named(*parts) for parts in zip(names, paths, calls, strict=True)]
    return Functions(named, cfg.reward.seconds, log) if named else None


def open_critic(cfg: Config, log: Callable[[str], None]) -> OwnCritic | None:
    """The function of `refine.critique_fn`; None where nobody is asked. Raises ConfigError."""
    if cfg.refine.critique != "function" or not samples_refinements(cfg):
        return None
    return OwnCritic(imported("refine.critique_fn", cfg.refine.critique_fn), cfg.refine, log)


def try_on_rows(own: Functions | None, critic: OwnCritic | None, problems: Problems, tokenizer: Tokenizer) -> None:
    """Calls the user's functions on the first rows, with their gold answers as completions.

    Raises ConfigError, which names key, cause and row in a line, where one fails or returns what is no reward.
    """
    if own is None and critic is None:
        return
    count = TRIED if problems.size is None else min(TRIED, problems.size)
    items = [_tried(problems.get(index), tokenizer) for index in range(count)]
    try:
        key = "reward.fn"
        if own is not None:
            own.check(items)
        key = "refine.critique_fn"
        if critic is not None:
            wrong = [Attempt(completion, text, 0.0, False, None, "ok") for _, completion, text in items]
            critic.check([problem for problem, _, _ in items], wrong)
    except FunctionError as error:
        raise ConfigError(f"config.{key} = {error}") from error.__cause__


def _tried(problem: Problem, tokenizer: Tokenizer) -> tuple[Problem, Completion, str]:
    text = f"The answer is \\boxed{{{problem.answer}}}."
    ids = np.asarray(tokenizer.encode_text(text), np.int32)
    return problem, Completion(ids, np.zeros(len(ids), np.float32), np.ones(len(ids), np.float32), True), text
