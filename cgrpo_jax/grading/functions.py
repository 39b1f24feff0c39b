"""Rewards by functions of the user (`reward.fn`), with the signature of TRL's GRPOTrainer.

A function is given lists (prompts, completions, completion_ids, each column of the row, and `trainer_state` with
`global_step`) and returns a list of numbers or None. A row that holds chat turns has turns as prompt and completion, a
row that holds text has text, as there. Several functions are added; None and NaN are left out of the sum. They run in a
process of their own (`user_process`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cgrpo_jax.config.options import RewardConfig
from cgrpo_jax.process.calling import Complaints, Fault, one_line, shown
from cgrpo_jax.process.user import UserProcess
from cgrpo_jax.records import Completion, Problem, Verdict

Item = tuple[Problem, Completion, str]
RESERVED = ("prompt", "completion", "completion_ids")  # columns that TRL passes on under other names, or not at all
GRADER = "function"
SUM = "sum"  # of reward.correct_by: all functions together decide
TAKEN = ("responses", "refinements", "trained")  # reward/NAME of the metrics
LARGEST = 3.4e38  # of rewards, in size: what float32 holds
WRONG = "I do not know."  # a completion that is right nowhere, for the first check


class FunctionError(ValueError):
    """A function that fails on a row of the data, before anything else is done."""


class WrongNumber(ValueError):
    """Another number of values than there are completions: nobody knows which is whose."""


class Named(NamedTuple):
    """A function, and the name under which its values are logged."""

    name: str
    path: str


def named_in(cfg: RewardConfig) -> list[Named]:
    """The functions of `reward.fn`. Raises ValueError for one that is named twice."""
    paths = [path for part in cfg.fn.split(",") if (path := part.strip())]
    if len(set(paths)) < len(paths):
        raise ValueError(f"config.reward.fn = {cfg.fn!r} names a function twice")
    short = [path.partition(":")[2] for path in paths]
    names = [path if short.count(name) > 1 or name in TAKEN else name for path, name in zip(paths, short, strict=True)]
    return [Named(*parts) for parts in zip(names, paths, strict=True)]


def deciding(cfg: RewardConfig) -> str | None:
    """The name of the function that decides what is correct; None: all of them, by their sum.

    Raises ValueError where there are several and `reward.correct_by` names none of them.
    """
    named, chosen = named_in(cfg), cfg.correct_by.strip()
    if not named and not chosen:
        return None
    if not named:
        raise ValueError(
            f"reward.correct_by = {chosen!r} is for reward.fn, which is not set (--config.reward.correct_by=)"
        )
    for name, path in named:
        if chosen in (name, path):
            return name
    if chosen == SUM or (len(named) == 1 and not chosen):
        return None
    known = " or ".join([*(f"reward.correct_by={one.path}" for one in named[1:]), f"reward.correct_by={SUM}"])
    what = (
        f"reward.correct_by = {chosen!r} is none of them" if chosen else "their sum would call a wrong answer correct"
    )
    first = named[0].path
    raise ValueError(
        f"reward.fn = {cfg.fn!r}: which function decides what is correct? {what} (--config.reward.correct_by={first} "
        f"or {known})"
    )


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
        "trainer_state": {"global_step": step},
    }


def listed(found: Any, count: int, what: str) -> list[Any]:
    """The list that a function returned (`user_worker.plain`). Raises TypeError or WrongNumber for another."""
    if isinstance(found, dict):
        raise TypeError(f"a list of {what} is needed, not {found['type']}")
    if len(found) != count:
        raise WrongNumber(f"{len(found)} {what} for {count} completions")
    return found


def _values(found: Any, count: int) -> list[float]:
    """Rewards; None is NaN. Raises TypeError or ValueError for anything else."""
    values = listed(found, count, "rewards")
    for value in values:
        if value is not None and not isinstance(value, float):
            raise TypeError(f"a number or None is needed, not {'str' if isinstance(value, str) else value['type']}")
        if value is not None and LARGEST < abs(value) < math.inf:
            raise ValueError(f"a reward of {value:g} is too large: {LARGEST:g} is the largest")
    return [math.nan if value is None or not math.isfinite(value) else value for value in values]


class Functions:
    """The functions of `reward.fn`. Any thread may ask; a fault costs the reward of what it is about, and is counted.

    Args:
      process: has loaded them.
      decides: the name of the function that decides what is correct; None: the sum.
    """

    def __init__(
        self,
        named: Sequence[Named],
        process: UserProcess,
        cfg: RewardConfig,
        log: Callable[[str], None],
        decides: str | None = None,
    ):
        self.named, self.process, self.cfg, self.decides = tuple(named), process, cfg, decides
        self.log, self.complaints = log, Complaints(log)

    def grade(self, items: Sequence[Item], step: int = 0) -> list[Verdict]:
        """A verdict each, with the reward of each function; one call for the completions of one row.

        Args:
          step: what `trainer_state.global_step` says; 0 outside of training.
        """
        verdicts: list[Verdict] = []
        first = 0
        while first < len(items):
            last = first + 1
            while last < len(items) and items[last][0] is items[first][0]:
                last += 1
            verdicts += self._of_row(items[first:last], step)
            first = last
        return verdicts

    def _of_row(self, items: Sequence[Item], step: int) -> list[Verdict]:
        found = [self._asked(one, items, step) for one in self.named]
        verdicts = [
            self._verdict([values[i] for values, _ in found], [words[i] for _, words in found])
            for i in range(len(items))
        ]
        known = [verdict.reward for verdict in verdicts if verdict.status == "ok"]
        lowest = min([0.0, *known])  # a fault is never worth more than a reward
        return [verdict if verdict.status == "ok" else verdict._replace(reward=lowest) for verdict in verdicts]

    def _verdict(self, values: Sequence[float], words: Sequence[str]) -> Verdict:
        parts = {one.name: value for one, value in zip(self.named, values, strict=True) if not math.isnan(value)}
        status = next((word for word in words if word != "ok"), "ok" if parts else "no_reward")
        total = math.fsum(parts.values())
        decisive = total if self.decides is None else parts.get(self.decides, -math.inf)
        return Verdict(total, status == "ok" and decisive >= self.cfg.correct_at, status, parts)

    def _asked(self, one: Named, items: Sequence[Item], step: int) -> tuple[list[float], list[str]]:
        """Values of a function, NaN where there is none, and a status each; what fails together is asked one by one."""
        try:
            return self._called(one, items, step), ["ok"] * len(items)
        except (Fault, TypeError, ValueError) as error:
            status = error.status if isinstance(error, Fault) else "error"
            if len(items) > 1 and status != "timeout" and not isinstance(error, WrongNumber):
                each = [self._asked(one, [item], step) for item in items]
                words = [status for _, (status,) in each]
                if set(words) == {"ok"}:  # it fails only with several
                    self._complain(one, error, items[0])
                return [value for (value,), _ in each], words
            self._complain(one, error, items[0])
            return [math.nan] * len(items), [status] * len(items)

    def _called(self, one: Named, items: Sequence[Item], step: int = 0) -> list[float]:
        """Raises Fault, and TypeError or ValueError for what are no rewards."""
        found = self.process.call(one.path, arguments(items, step), self.cfg.seconds)
        return _values(found, len(items))

    def _complain(self, one: Named, error: Exception, item: Item) -> None:
        problem, _, text = item
        self.complaints.add(f"reward.fn {one.path}", error, dict(problem.row) | {"completion": text})

    def check(self, rows: Sequence[Sequence[Item]]) -> None:
        """Calls each function with the completions of each row, of the first row also with one alone.

        Args:
          rows: the first completion of each is its gold answer, where it has one.

        Says where gold answers have no reward. Raises FunctionError, which names path, cause and row, in a line.
        """
        calls = [(rows[0][:1], False), *((items, bool(items[0][0].answer)) for items in rows)]
        for one in self.named:
            of_golds = []
            for items, known in calls:
                row = shown(dict(items[0][0].row) | {"completion": items[0][2]})
                try:
                    first, *_ = self._called(one, items)
                except (Fault, TypeError, ValueError) as error:
                    raise FunctionError(f"{one.path!r}: {one_line(error)}; row: {row}") from error
                of_golds += [first] * known
            if of_golds and all(value == 0 or math.isnan(value) for value in of_golds):
                said = f"reward.fn {one.path}: 0 for the gold answers of all rows tried ({len(of_golds)})"
                self.log(f"{said}; the last one was {row}")
