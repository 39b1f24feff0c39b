"""Critiques by a function of the user (`refine.critique_fn`), called as the functions of `reward.fn` are.

It is given `rewards` and `correct` beside, a list each, and returns a list of texts, or None where there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

from cgrpo_jax.grading.functions import FAULTS, FunctionError, Item, arguments
from cgrpo_jax.options import RefineConfig
from cgrpo_jax.records import Attempt, Critique, Problem
from cgrpo_jax.rollout.collect import Critic
from cgrpo_jax.rollout.stories import Sample, Work
from cgrpo_jax.rollout.verdicts import or_fallback, verdict_of
from cgrpo_jax.trusted import Complaints, one_line, shown, within


def _texts(found: Any, count: int) -> list[str | None]:
    """What a critic returned. Raises TypeError or ValueError where that is no list of texts."""
    if not isinstance(found, (list, tuple)):
        raise TypeError(f"a list of texts is needed, not {type(found).__name__}")
    if len(found) != count:
        raise ValueError(f"{len(found)} critiques for {count} completions")
    for text in found:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"text or None is needed, not {type(text).__name__}")
        (text or "").encode()  # half a character could not be read by the policy
    return [text if text and text.strip() else None for text in found]


class OwnCritic:
    """The function of `refine.critique_fn`. A fault costs the critiques of the call: the fallback stands in."""

    def __init__(self, call: Callable[..., Any], cfg: RefineConfig, log: Callable[[str], None]):
        self.call, self.cfg, self.complaints, self.step = call, cfg, Complaints(log), 0

    def _called(self, problem: Problem, attempts: Sequence[Attempt]) -> list[str | None]:
        items: list[Item] = [(problem, attempt.completion, attempt.text) for attempt in attempts]
        rewards = {"rewards": [a.reward for a in attempts], "correct": [a.correct for a in attempts]}
        call = functools.partial(self.call, **arguments(items, self.step) | rewards)
        return _texts(within(self.cfg.critique_seconds, call), len(attempts))

    def criticise(self, problem: Problem, attempts: Sequence[Attempt]) -> list[Critique]:
        """A critique each; any thread may ask."""
        try:
            texts = self._called(problem, attempts)
        except FAULTS as error:
            row = dict(problem.row) | {"completions": [attempt.text for attempt in attempts]}
            self.complaints.add(f"refine.critique_fn {self.cfg.critique_fn}", error, row)
            texts = [None] * len(attempts)
        made = []
        for text, attempt in zip(texts, attempts, strict=True):
            verdict = verdict_of(text or "", finished=True)
            agrees = None if verdict is None else verdict == attempt.correct
            critique = Critique(text, verdict, agrees, tries=1, first_agrees=agrees)
            made.append(or_fallback(critique, problem, attempt, self.cfg, reference="none"))
        return made

    def check(self, problems: Sequence[Problem], attempts: Sequence[Attempt]) -> None:
        """Calls it once a row. Raises FunctionError, which names path, cause and row, in a line."""
        for problem, attempt in zip(problems, attempts, strict=True):
            try:
                self._called(problem, [attempt])
            except FAULTS as error:
                row = shown(dict(problem.row) | {"completion": attempt.text})
                raise FunctionError(f"{self.cfg.critique_fn!r}: {one_line(error)}; row: {row}") from error


def by_function(own: OwnCritic) -> Critic:
    """A critic that asks for all critiques of a problem at once, beside the decoding."""

    def critic(
        problem: Problem, number: int, attempts: Sequence[tuple[int, Attempt]]
    ) -> Generator[Sample | Work, Any, list[Critique]]:
        call = functools.partial(own.criticise, problem, [attempt for _, attempt in attempts])
        critiques = yield Work(call, "critique")
        return critiques

    return critic
