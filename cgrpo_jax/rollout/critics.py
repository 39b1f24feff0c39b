"""Critics: attempts in, critique texts out. One signature, so that a model or a server can be one too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cgrpo_jax.data.arithmetic import worked_critique
from cgrpo_jax.records import Attempt, Problem
from cgrpo_jax.text import prompts

Critic = Callable[[Sequence[tuple[Problem, Attempt]]], list[str]]


def indicative(items: Sequence[tuple[Problem, Attempt]]) -> list[str]:
    """The verdict alone."""
    return [prompts.indicative(attempt.correct) for _, attempt in items]


def indicative_gt(items: Sequence[tuple[Problem, Attempt]]) -> list[str]:
    """The verdict and the ground truth."""
    return [prompts.indicative_gt(attempt.correct, problem.answer) for problem, attempt in items]


def worked(items: Sequence[tuple[Problem, Attempt]]) -> list[str]:
    """Generated tasks only: the task's own checker names the first wrong step and gives a verdict, not the answer."""
    return [worked_critique(problem.question, attempt.text, attempt.correct) for problem, attempt in items]


CRITICS: dict[str, Critic] = {"indicative": indicative, "indicative_gt": indicative_gt, "worked": worked}
