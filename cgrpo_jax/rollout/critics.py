"""What a critic says, shows and accepts, whoever writes: the templates, and the brief of one that is a model.

How critiques that take their time are asked for is in `written.py` (sampled), `served.py` and `own_critic.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from cgrpo_jax.config.critics import CRITICS, Critic
from cgrpo_jax.config.options import RefineConfig
from cgrpo_jax.data.arithmetic import worked_critique
from cgrpo_jax.data.rows import RowError, text_of, worked_solution
from cgrpo_jax.records import Attempt, Critique, Message, Problem
from cgrpo_jax.rollout.collect import Chosen, Criticise, Critiques, Posed
from cgrpo_jax.rollout.verdicts import usable, verdict_of
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


TEMPLATES = {"indicative": indicative, "indicative_gt": indicative_gt, "worked": worked}


@dataclasses.dataclass(frozen=True)
class Brief:
    """What a critic is shown, which of its texts count, and what stands in where none does."""

    cfg: RefineConfig
    reference: str = "none"  # what it is shown beside question and attempt, of critics.REFERENCES
    prompt: prompts.CriticPrompt = prompts.critique_messages  # of a critic that is a model

    @property
    def critic(self) -> Critic:
        return CRITICS[self.cfg.critique]

    @property
    def fallback(self) -> str:
        return self.critic.fallback(self.cfg.critique_fallback, self.reference)

    def messages(self, problem: Problem, solution: str) -> Sequence[Message]:
        """The chat turns that ask a model for a critique of a solution."""
        return self.prompt(problem.question, solution, shown_truth(problem, self.reference), self.critic.concludes)

    def asks_about(self, attempt: Attempt) -> bool:
        """Whether a model is asked for a critique of an attempt, see `refine.critique_accept`."""
        return self.cfg.critique_accept == "agreeing" or not attempt.correct

    def judged(self, text: str, finished: bool, correct: bool, before: Critique, tokens: int) -> Critique:
        """What one more text of a model makes of a critique.

        Args:
          finished: see `verdict_of`.
          correct: what the rule says of the attempt.
          before: what the texts before it made of it.
          tokens: that were written for this one.
        """
        verdict = verdict_of(text, finished)
        agrees = None if verdict is None else verdict == correct
        if self.critic.scores:  # the verdict itself is wanted, whatever it is
            counts = verdict is not None
        else:
            counts = agrees is True or not self.critic.concludes or self.cfg.critique_accept == "any"
        first = before.first_agrees if before.tries else agrees
        good = usable(text) if counts else ""
        return Critique(good or None, verdict, agrees, before.tries + 1, before.tokens + tokens, first_agrees=first)

    def or_fallback(self, critique: Critique, problem: Problem, attempt: Attempt) -> Critique:
        """The critique, or what stands in for it."""
        if critique.text is not None or self.fallback == "drop":
            return critique
        return critique._replace(text=TEMPLATES[self.fallback](problem, attempt), fallback=True)


def shown_truth(problem: Problem, reference: str) -> str | None:
    """What a critic that is a model is shown beside question and attempt, see critics.REFERENCES."""
    if reference == "none":
        return None
    solution = worked_solution(problem) if reference == "solution" else None
    return problem.answer if solution is None else solution.text


def templated(text_of: Callable[[Problem, Attempt], str]) -> Criticise:
    """A critic that knows its text at once, and waits for nothing."""

    def criticise(posed: Posed, chosen: Chosen) -> Critiques:
        yield from ()
        return [Critique(text_of(posed.problem, attempt)) for _, attempt in chosen]

    return criticise


def offline(posed: Posed, chosen: Chosen) -> Critiques:
    """What the data say of this problem, in the column `critique`; nothing usable where that holds no text."""
    yield from ()
    try:
        text = text_of(posed.problem.columns.get("critique"), "critique")
    except RowError:
        text = None
    return [Critique(text) for _ in chosen]
