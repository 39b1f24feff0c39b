"""Critiques by a function of the user (`refine.critique_fn`), which is called as the functions of `reward.fn` are.

It is also given the lists `rewards` and `correct`, and returns a list of texts, with None for no critique.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cgrpo_jax.config.options import RefineConfig
from cgrpo_jax.grading.functions import FunctionError, Item, arguments, listed
from cgrpo_jax.process.calling import Complaints, Fault, one_line, shown
from cgrpo_jax.process.user import UserProcess
from cgrpo_jax.records import Attempt, Problem


class OwnCritic:
    """The function of `refine.critique_fn`. Where a call fails, the fallback is used for its critiques.

    Args:
      process: the process that has loaded the function.
    """

    def __init__(self, process: UserProcess, cfg: RefineConfig, log: Callable[[str], None]):
        self.process, self.cfg, self.complaints = process, cfg, Complaints(log)

    def _called(self, problem: Problem, attempts: Sequence[Attempt], step: int = 0) -> list[str | None]:
        """Raises Fault, and TypeError or ValueError where the function returns no list of texts."""
        items: list[Item] = [(problem, attempt.completion, attempt.text) for attempt in attempts]
        rewards = {"rewards": [a.reward for a in attempts], "correct": [a.correct for a in attempts]}
        given = arguments(items, step) | rewards
        found = self.process.call(self.cfg.critique_fn, given, self.cfg.critique_seconds)
        texts = listed(found, len(attempts), "critiques")
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise TypeError(f"text or None is needed, not {text['type'] if isinstance(text, dict) else 'a number'}")
            (text or "").encode()  # raises for a lone surrogate, which no tokenizer takes
        return [text if text and text.strip() else None for text in texts]

    def texts(self, problem: Problem, attempts: Sequence[Attempt], step: int) -> list[str | None]:
        """The critique of each attempt; None where the function gave none, or failed. Any thread may call it."""
        try:
            return self._called(problem, attempts, step)
        except (Fault, TypeError, ValueError) as error:
            row = dict(problem.row) | {"completions": [attempt.text for attempt in attempts]}
            self.complaints.add(f"refine.critique_fn {self.cfg.critique_fn}", error, row)
            return [None] * len(attempts)

    def check(self, rows: Sequence[Sequence[Item]]) -> None:
        """Calls the function with the completions of each row. Raises FunctionError with path, cause and row."""
        for items in rows:
            problem, _, first = items[0]
            attempts = [Attempt(completion, text, 0.0, False, None, "ok") for _, completion, text in items]
            try:
                self._called(problem, attempts)
            except (Fault, TypeError, ValueError) as error:
                row = shown(dict(problem.row) | {"completion": first})
                raise FunctionError(f"{self.cfg.critique_fn!r}: {one_line(error)}; row: {row}") from error
