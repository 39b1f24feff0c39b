"""What critiques say and conclude: the verdict, the templates, the brief of a critic, and a function of the user.

A critique that a model writes is to end in `Conclusion: correct [END]` or `Conclusion: incorrect [END]` (arXiv
2506.03106, appendix G; `right` and `wrong` in the release). Only that is read as a verdict; in any other form there is
none. How each critic is asked is in `written.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from cgrpo_jax.config.critics import CRITICS, Critic
from cgrpo_jax.config.options import RefineConfig
from cgrpo_jax.data.arithmetic import worked_critique
from cgrpo_jax.data.cells import RowError, text_of, worked_solution
from cgrpo_jax.grading.functions import FunctionError, Item, arguments, listed
from cgrpo_jax.process.calling import Complaints, Fault, one_line, shown
from cgrpo_jax.records import Attempt, Critique, Message, Problem
from cgrpo_jax.rollout.collect import Chosen, Critiques, Posed
from cgrpo_jax.text import prompts

END = "[END]"
# At the beginning of a line or of a sentence, after any mark-up. Repeats are bounded: the text may be hostile.
CONCLUSION = re.compile(
    r"(?:^|[.!?)\]}][*_`\"'’”]{0,4}\s)[ \t>#*_`\"'’”-]{0,12}conclusion[*_`]{0,4}\s{0,2}[:：][\s*_`\"'‘“]{0,8}"
    r"(?:(?:the|this)\s(?:(?:student|student['’]s|generated|previous|given|final)\s){0,2}(?:solution|answer)\sis\s)?"
    r"[*_`\"'‘“]{0,4}(?P<word>correct|right|incorrect|wrong)[*_`\"'’”.!]{0,8}\s*\Z",
    re.IGNORECASE | re.MULTILINE,
)
ANY_CONCLUSION = re.compile(r"conclusion\W{0,8}(correct|right|incorrect|wrong)\b", re.IGNORECASE)
INDICATIVE = re.compile(r"The generated solution is (?P<word>correct|incorrect)\b")
OPPOSITE = {"correct": "incorrect", "incorrect": "correct", "right": "wrong", "wrong": "right"}


def _spoken(text: str) -> str:
    """A critique without its reasoning block."""
    _, closed, after = text.rpartition("</think>")
    return after if closed else text.partition("<think>")[0]


def _means_right(word: str) -> bool:
    return word.lower() in ("correct", "right")


def verdict_of(text: str, finished: bool) -> bool | None:
    """Whether a critique finds a solution right; None where no verdict can be read.

    A critique ends at its first end mark, and its last words are the verdict, if they are a conclusion in the form that
    is asked for. Where the text after the end mark concludes the opposite, there is no verdict.

    Args:
      finished: the model ended the text itself. A text that a limit cut has a verdict only if it holds the end mark.
    """
    critique, mark, rest = _spoken(text).partition(END)
    found = CONCLUSION.search(critique) if mark or finished else None
    if found is None:
        return None
    right = _means_right(found["word"])
    return None if any(_means_right(word) != right for word in ANY_CONCLUSION.findall(rest)) else right


def usable(text: str) -> str:
    """A critique without its reasoning block and without the text after its end mark; "" where nothing is left."""
    return _spoken(text).partition(END)[0].strip()


def inverted(text: str) -> str | None:
    """A critique with its verdict inverted and all else unchanged; None where it has no verdict."""
    critique, mark, rest = text.partition(END)
    found = CONCLUSION.search(critique) or INDICATIVE.match(critique)
    if found is None:
        return None
    word = OPPOSITE[found["word"].lower()]
    start, end = found.span("word")
    return critique[:start] + (word.capitalize() if found["word"][0].isupper() else word) + critique[end:] + mark + rest


def indicative(problem: Problem, attempt: Attempt) -> str:
    """The verdict alone."""
    return prompts.indicative(attempt.correct)


def indicative_gt(problem: Problem, attempt: Attempt) -> str:
    """The verdict and the ground truth."""
    return prompts.indicative_gt(attempt.correct, problem.answer)


def worked(problem: Problem, attempt: Attempt) -> str:
    """Generated tasks only: the task's checker names the first wrong step and the verdict, but not the answer."""
    return worked_critique(problem.question, attempt.text, attempt.correct)


TEMPLATES = {"indicative": indicative, "indicative_gt": indicative_gt, "worked": worked}


@dataclasses.dataclass(frozen=True)
class Brief:
    """What a critic is shown, which of its critiques count, and which critique is used where none of them does."""

    cfg: RefineConfig
    reference: str = "none"  # what it is shown beside question and attempt, of config.critics.REFERENCES
    prompt: prompts.CriticPrompt = prompts.critique_messages  # for a critic that is a model

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
        """The critique of an attempt after a model has written one more text for it.

        Args:
          finished: see `verdict_of`.
          correct: the verdict of the rule.
          before: the critique after the texts before this one.
          tokens: of this text.
        """
        verdict = verdict_of(text, finished)
        agrees = None if verdict is None else verdict == correct
        if self.critic.scores:  # the verdict is the reward, so any verdict counts
            counts = verdict is not None
        else:
            counts = agrees is True or not self.critic.concludes or self.cfg.critique_accept == "any"
        first = before.first_agrees if before.tries else agrees
        good = usable(text) if counts else ""
        return Critique(good or None, verdict, agrees, before.tries + 1, before.tokens + tokens, first_agrees=first)

    def or_fallback(self, critique: Critique, problem: Problem, attempt: Attempt) -> Critique:
        """The critique, or the fallback where it has no text."""
        if critique.text is not None or self.fallback == "drop":
            return critique
        return critique._replace(text=TEMPLATES[self.fallback](problem, attempt), fallback=True)


def shown_truth(problem: Problem, reference: str) -> str | None:
    """The text that a critic is shown beside question and attempt; None where it is shown nothing else."""
    if reference == "none":
        return None
    solution = worked_solution(problem) if reference == "solution" else None
    return problem.answer if solution is None else solution.text


def templated(write: Callable[[Problem, Attempt], str], posed: Posed, chosen: Chosen) -> Critiques:
    """Critiques from a template."""
    yield from ()
    return [Critique(write(posed.problem, attempt)) for _, attempt in chosen]


def offline(posed: Posed, chosen: Chosen) -> Critiques:
    """Critiques from the column `critique` of the data; none where that holds no text."""
    yield from ()
    try:
        text = text_of(posed.problem.columns.get("critique"), "critique")
    except RowError:
        text = None
    return [Critique(text) for _ in chosen]


class OwnCritic:
    """A function of the user (`refine.critique_fn`), which is called as the functions of `reward.fn` are.

    It is also given the lists `rewards` and `correct`, and returns a list of texts, with None for no critique. Where a
    call fails, the fallback is used for its critiques.

    Args:
      call: calls a function that was loaded before: (path, arguments, seconds) -> what it returns.
    """

    def __init__(self, call: Callable[..., Any], cfg: RefineConfig, log: Callable[[str], None]):
        self.call, self.cfg, self.complaints = call, cfg, Complaints(log)

    def _called(self, problem: Problem, attempts: Sequence[Attempt], step: int = 0) -> list[str | None]:
        """Raises Fault, and TypeError or ValueError where the function returns no list of texts."""
        items: list[Item] = [(problem, attempt.completion, attempt.text) for attempt in attempts]
        rewards = {"rewards": [a.reward for a in attempts], "correct": [a.correct for a in attempts]}
        given = arguments(items, step) | rewards
        found = self.call(self.cfg.critique_fn, given, self.cfg.critique_seconds)
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
