"""Critics: attempts in, critiques out, as a part of a problem's story. A model or a server can be one, too."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from cgrpo_jax.data.arithmetic import worked_critique
from cgrpo_jax.data.rows import RowError, text_of, worked_solution
from cgrpo_jax.records import Attempt, Critique, Problem
from cgrpo_jax.rollout.collect import Critic
from cgrpo_jax.text import prompts


def indicative(problem: Problem, attempt: Attempt) -> str:
    """The verdict alone."""
    return prompts.indicative(attempt.correct)


def indicative_gt(problem: Problem, attempt: Attempt) -> str:
    """The verdict and the ground truth."""
    return prompts.indicative_gt(attempt.correct, problem.answer)


def worked(problem: Problem, attempt: Attempt) -> str:
    """Generated tasks only: the task's own checker names the first wrong step and gives a verdict, not the answer."""
    return worked_critique(problem.question, attempt.text, attempt.correct)


def shown_truth(problem: Problem, reference: str) -> str | None:
    """What a critic that is a model is shown beside question and attempt, see options.REFERENCES."""
    if reference == "none":
        return None
    solution = worked_solution(problem) if reference == "solution" else None
    return problem.answer if solution is None else solution.text


def templated(text_of: Callable[[Problem, Attempt], str]) -> Critic:
    """A critic that knows its text at once, and waits for nothing."""

    def critic(
        problem: Problem, number: int, attempts: Sequence[tuple[int, Attempt]]
    ) -> Generator[Any, Any, list[Critique]]:
        yield from ()
        return [Critique(text_of(problem, attempt)) for _, attempt in attempts]

    return critic


def offline(
    problem: Problem, number: int, attempts: Sequence[tuple[int, Attempt]]
) -> Generator[Any, Any, list[Critique]]:
    """What the data say of this problem, in the column `critique`; nothing usable where that holds no text."""
    yield from ()
    try:
        text = text_of(problem.columns.get("critique"), "critique")
    except RowError:
        text = None
    return [Critique(text) for _ in attempts]


TEMPLATES = {"indicative": indicative, "indicative_gt": indicative_gt, "worked": worked}
