"""Critiques by a function of the user (`refine.critique_fn`), called as the functions of `reward.fn` are.

It is given `rewards` and `correct` beside, a list each, and returns a list of texts, or None where there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from cgrpo_jax.config.options import RefineConfig
from cgrpo_jax.grading.functions import FunctionError, Item, arguments, listed
from cgrpo_jax.process.calling import Complaints, Fault, one_line, shown
from cgrpo_jax.process.user import UserProcess
from cgrpo_jax.records import Attempt, Critique, Problem
from cgrpo_jax.rollout.collect import Chosen, Criticise, Critiques, Posed
from cgrpo_jax.rollout.critics import Brief
from cgrpo_jax.rollout.stories import Work
from cgrpo_jax.rollout.verdicts import verdict_of


def _texts(found: Any, count: int) -> list[str | None]:
    """What a critic returned. Raises TypeError or ValueError where that is no list of texts."""
    texts = listed(found, count, "critiques")
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"text or None is needed, not {text['type'] if isinstance(text, dict) else 'a number'}")
        (text or "").encode()  # half a character could not be read by the policy
    return [text if text and text.strip() else None for text in texts]


class OwnCritic:
    """The function of `refine.critique_fn`. A fault costs the critiques of the call: the fallback stands in.

    Args:
      process: has loaded it.
    """

    def __init__(self, process: UserProcess, cfg: RefineConfig, log: Callable[[str], None]):
        self.process, self.cfg, self.complaints = process, cfg, Complaints(log)

    def _called(self, problem: Problem, attempts: Sequence[Attempt], step: int = 0) -> list[str | None]:
        """Raises Fault, and TypeError or ValueError for what are no texts."""
        items: list[Item] = [(problem, attempt.completion, attempt.text) for attempt in attempts]
        rewards = {"rewards": [a.reward for a in attempts], "correct": [a.correct for a in attempts]}
        given = arguments(items, step) | rewards
        return _texts(self.process.call(self.cfg.critique_fn, given, self.cfg.critique_seconds), len(attempts))

    def critiques(self, posed: Posed, attempts: Sequence[Attempt]) -> list[Critique]:
        """A critique each, without text where the function gave none; any thread may ask."""
        try:
            texts = self._called(posed.problem, attempts, posed.step)
        except (Fault, TypeError, ValueError) as error:
            row = dict(posed.problem.row) | {"completions": [attempt.text for attempt in attempts]}
            self.complaints.add(f"refine.critique_fn {self.cfg.critique_fn}", error, row)
            texts = [None] * len(attempts)
        made = []
        for text, attempt in zip(texts, attempts, strict=True):
            verdict = verdict_of(text or "", finished=True)
            agrees = None if verdict is None else verdict == attempt.correct
            made.append(Critique(text, verdict, agrees, tries=1, first_agrees=agrees))
        return made

    def check(self, rows: Sequence[Sequence[Item]]) -> None:
        """Calls it with the completions of each row. Raises FunctionError: path, cause and row in a line."""
        for items in rows:
            problem, _, first = items[0]
            attempts = [Attempt(completion, text, 0.0, False, None, "ok") for _, completion, text in items]
            try:
                self._called(problem, attempts)
            except (Fault, TypeError, ValueError) as error:
                row = shown(dict(problem.row) | {"completion": first})
                raise FunctionError(f"{self.cfg.critique_fn!r}: {one_line(error)}; row: {row}") from error


def by_function(own: OwnCritic, brief: Brief) -> Criticise:
    """A critic that asks for all critiques of a problem at once, beside the decoding."""

    def criticise(posed: Posed, chosen: Chosen) -> Critiques:
        attempts = [attempt for _, attempt in chosen]
        found = yield Work(functools.partial(own.critiques, posed, attempts), "critique")
        return [
            brief.or_fallback(critique, posed.problem, attempt)
            for critique, attempt in zip(found, attempts, strict=True)
        ]

    return criticise
