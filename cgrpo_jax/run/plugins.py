"""The user's functions, which a configuration names as package.module:function: imported, and tried before step 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cgrpo_jax.config import Config, critic_of, samples_refinements
from cgrpo_jax.config.options import TextsConfig
from cgrpo_jax.data.sources import Problems
from cgrpo_jax.errors import ConfigError
from cgrpo_jax.grading.functions import WRONG, FunctionError, Functions, Item, deciding, named_in
from cgrpo_jax.process.calling import FAULTS, function_of, one_line
from cgrpo_jax.process.user import UserProcess
from cgrpo_jax.records import Completion, Message, Problem
from cgrpo_jax.rollout.critics import OwnCritic
from cgrpo_jax.text.prompts import Texts
from cgrpo_jax.text.tokenizer import Tokenizer

Encode = Callable[[Sequence[Message]], list[int]]
TRIED = 3  # rows


def _fault(key: str, path: str, error: BaseException) -> ConfigError:
    return ConfigError(f"config.{key} = {path!r}: {one_line(error)}")


def imported(key: str, path: str) -> Callable[..., Any]:
    """The function of a dotted path. Raises ConfigError, which names `key` and the cause, where there is none."""
    try:
        return function_of(path)
    except FAULTS as error:  # somebody's module may raise anything
        raise _fault(key, path, error) from error


def _encoded(turns: Any, encode: Encode) -> None:
    """Raises an error where the turns are no chat that a model can answer."""
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
        except FAULTS as error:  # of somebody's function
            raise _fault(f"texts.{name}", paths[name], error) from error
    return texts


def _loaded(key: str, path: str, process: UserProcess) -> None:
    """Raises ConfigError, which names `key` and the cause, for a function that cannot be had in that process."""
    try:
        process.load(path)
    except FAULTS as error:  # somebody's module may raise anything
        raise _fault(key, path, error) from error


def open_rewards(cfg: Config, process: UserProcess, log: Callable[[str], None]) -> Functions | None:
    """The functions of `reward.fn`; None where there are none. Raises ConfigError for one that cannot be had."""
    try:
        named, decides = named_in(cfg.reward), deciding(cfg.reward)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for one in named:
        _loaded("reward.fn", one.path, process)
    return Functions(named, process, cfg.reward, log, decides) if named else None


def open_critic(cfg: Config, process: UserProcess, log: Callable[[str], None]) -> OwnCritic | None:
    """The function of `refine.critique_fn`; None where nobody is asked. Raises ConfigError."""
    if critic_of(cfg).by != "function" or not samples_refinements(cfg):
        return None
    _loaded("refine.critique_fn", cfg.refine.critique_fn, process)
    return OwnCritic(process.call, cfg.refine, log)


def try_on_rows(
    own: Functions | None, critic: OwnCritic | None, problems: Problems, tokenizer: Tokenizer, samples: int
) -> None:
    """Calls the user's functions on the first rows: `samples` completions each, two at least, the gold answer first.

    Raises ConfigError, which names key, cause and row in a line, where one fails or returns what is no reward.
    """
    if own is None and critic is None:
        return
    count = TRIED if problems.size is None else min(TRIED, problems.size)
    rows = [_tried(problems.get(index), tokenizer, max(2, samples)) for index in range(count)]
    try:
        key = "reward.fn"
        if own is not None:
            own.check(rows)
        key = "refine.critique_fn"
        if critic is not None:
            critic.check(rows)
    except FunctionError as error:
        raise ConfigError(f"config.{key} = {error}") from error.__cause__


def _tried(problem: Problem, tokenizer: Tokenizer, samples: int) -> list[Item]:
    made = []
    for text in [f"The answer is \\boxed{{{problem.answer}}}."] + [WRONG] * (samples - 1):
        ids = np.asarray(tokenizer.encode_text(text), np.int32)
        none = np.zeros(len(ids), np.float32)
        made.append((problem, Completion(ids, none, none + 1, True), text))
    return made
