"""Rewards by functions of the user (`reward.fn`), with the signature of TRL's GRPOTrainer.

A function is given lists (prompts, completions, completion_ids, each column of the row, and `trainer_state` with
`global_step`) and returns a list of numbers or None. A row that holds chat turns has turns as prompt and completion, a
row that holds text has text, as there. Several functions are added; None and NaN are left out of the sum.
"""

from __future__ import annotations

import functools
import math
import numbers
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cgrpo_jax.records import Completion, Problem, Verdict
from cgrpo_jax.trusted import Complaints, Overdue, one_line, shown, within

Item = tuple[Problem, Completion, str]
RESERVED = ("prompt", "completion", "completion_ids")  # columns that TRL passes on under other names, or not at all
GRADER = "function"
FAULTS = (Exception, SystemExit)  # of somebody's function


class FunctionError(ValueError):
    """A function that fails on a row of the data, before anything else is done."""


class Named(NamedTuple):
    """A function, and the name under which its values are logged."""

    name: str
    path: str
    call: Callable[..., Any]


def arguments(items: Sequence[Item], step: int) -> dict[str, Any]:
    """The keyword arguments of a call, a list each."""
    problems = [problem for problem, _, _ in items]
    chat = problems[0].chat
    columns = {name: None for problem in problems for name in problem.row if name not in RESERVED}
    given: dict[str, Any] = {name: [problem.row.get(name) for problem in problems] for name in columns}
    return given | {
        "prompts": [list(problem.messages) if chat else problem.question for problem in problems],
        "completions": [[{"role": "assistant", "content": text}] if chat else text for _, _, text in items],
        "completion_ids": [completion.ids.tolist() for _, completion, _ in items],
        "trainer_state": types.SimpleNamespace(global_step=step),
    }


def _values(found: Any, count: int) -> list[float]:
    """What a function returned as numbers; None is NaN. Raises TypeError or ValueError for anything else."""
    if isinstance(found, (str, bytes, Mapping)) or not hasattr(found, "__len__"):
        raise TypeError(f"a list of numbers is needed, not {type(found).__name__}")
    if len(found) != count:
        raise ValueError(f"{len(found)} rewards for {count} completions")
    values = []
    for value in found:
        value = value.item() if isinstance(value, np.generic) else value
        if value is not None and not isinstance(value, numbers.Real):
            raise TypeError(f"a number or None is needed, not {type(value).__name__}")
        values.append(math.nan if value is None or not math.isfinite(value) else float(value))
    return values


class Functions:
    """The functions of `reward.fn`. Any thread may ask; a fault costs the reward of what it is about, and is counted.

    Args:
      seconds: of a call, at most.
    """

    def __init__(self, named: Sequence[Named], seconds: float, log: Callable[[str], None]):
        self.named, self.seconds, self.complaints, self.step = tuple(named), seconds, Complaints(log), 0

    def grade(self, items: Sequence[Item]) -> list[Verdict]:
        """A verdict each, with the reward of each function; one call for the completions of one row."""
        verdicts: list[Verdict] = []
        first = 0
        while first < len(items):
            last = first + 1
            while last < len(items) and items[last][0] is items[first][0]:
                last += 1
            verdicts += self._of_row(items[first:last])
            first = last
        return verdicts

    def _of_row(self, items: Sequence[Item]) -> list[Verdict]:
        found = [self._asked(one, items) for one in self.named]
        verdicts = [
            self._sum([values[i] for values, _ in found], [words[i] for _, words in found]) for i in range(len(items))
        ]
        known = [verdict.reward for verdict in verdicts if verdict.status == "ok"]
        lowest = min([0.0, *known])  # a fault is never worth more than a reward
        return [verdict if verdict.status == "ok" else verdict._replace(reward=lowest) for verdict in verdicts]

    def _sum(self, values: Sequence[float], words: Sequence[str]) -> Verdict:
        parts = {one.name: value for one, value in zip(self.named, values, strict=True) if not math.isnan(value)}
        status = next((word for word in words if word != "ok"), "ok" if parts else "no_reward")
        return Verdict(math.fsum(parts.values()), False, status, parts)

    def _asked(self, one: Named, items: Sequence[Item]) -> tuple[list[float], list[str]]:
        """Values of a function, NaN where there is none, and a status each; what fails together is asked one by one."""
        try:
            return self._called(one, items), ["ok"] * len(items)
        except Overdue as error:
            self._complain(one, error, items[0])
            return [math.nan] * len(items), ["timeout"] * len(items)
        except FAULTS as error:
            if len(items) > 1:
                each = [self._asked(one, [item]) for item in items]
                words = [status for _, (status,) in each]
                if set(words) == {"ok"}:  # it fails only with several
                    self._complain(one, error, items[0])
                return [value for (value,), _ in each], words
            self._complain(one, error, items[0])
            return [math.nan], ["error"]

    def _called(self, one: Named, items: Sequence[Item]) -> list[float]:
        call = functools.partial(one.call, **arguments(items, self.step))
        return _values(within(self.seconds, call), len(items))

    def _complain(self, one: Named, error: BaseException, item: Item) -> None:
        problem, _, text = item
        self.complaints.add(f"reward.fn {one.path}", error, dict(problem.row) | {"completion": text})

    def check(self, items: Sequence[Item]) -> None:
        """Calls each function on each item alone. Raises FunctionError, which names path, cause and row, in a line."""
        for one in self.named:
            for item in items:
                try:
                    self._called(one, [item])
                except FAULTS as error:
                    row = shown(dict(item[0].row) | {"completion": item[2]})
                    raise FunctionError(f"{one.path!r}: {one_line(error)}; row: {row}") from error
