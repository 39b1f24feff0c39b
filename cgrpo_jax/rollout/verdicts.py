"""What a critique that a model wrote concludes, what of it is usable, and what stands in where nothing is.

A critique is asked to end in `Conclusion: correct [END]` or `Conclusion: incorrect [END]` (arXiv 2506.03106, appendix
G; `right` and `wrong` in the release). Only that is a verdict: all else that a model may write is unreadable.
"""

from __future__ import annotations

import re

from cgrpo_jax.options import RefineConfig, fallback_of
from cgrpo_jax.records import Attempt, Critique, Problem
from cgrpo_jax.rollout.critics import TEMPLATES

END = "[END]"
# At the beginning of a line or of a sentence, behind any mark-up. All repeats are bounded: model text is hostile.
CONCLUSION = re.compile(
    r"(?:^|[.!?)\]}][*_`\"'’”]{0,4}\s)[ \t>#*_`\"'’”-]{0,12}conclusion[*_`]{0,4}\s{0,2}[:：][\s*_`\"'‘“]{0,8}"
    r"(?:(?:the|this)\s(?:(?:student|student['’]s|generated|previous|given|final)\s){0,2}(?:solution|answer)\sis\s)?"
    r"[*_`\"'‘“]{0,4}(?P<word>correct|right|incorrect|wrong)[*_`\"'’”.!]{0,8}\s*\Z",
    re.IGNORECASE | re.MULTILINE,
)
NAMED = re.compile(r"conclusion\W{0,8}(correct|right|incorrect|wrong)\b", re.IGNORECASE)  # in whatever form
INDICATIVE = re.compile(r"The generated solution is (?P<word>correct|incorrect)\b")
NEEDS = {"agreeing": "agreeing", "any": "text"}  # refine.critique_accept -> what `judged` needs
OPPOSITE = {"correct": "incorrect", "incorrect": "correct", "right": "wrong", "wrong": "right"}


def _spoken(text: str) -> str:
    """A critique without its reasoning block."""
    _, closed, after = text.rpartition("</think>")
    return after if closed else text.partition("<think>")[0]


def _means_right(word: str) -> bool:
    return word.lower() in ("correct", "right")


def verdict_of(text: str, finished: bool) -> bool | None:
    """Whether a critique finds a solution right; None where no verdict can be read.

    The last words of a critique are its verdict, if they are a conclusion in the form that is asked for. A critique
    ends at its first end mark. What follows is not read, but where that concludes otherwise there is no verdict.

    Args:
      finished: the model ended the text itself; one that a limit cut is finished only if it holds the end mark.
    """
    critique, mark, rest = _spoken(text).partition(END)
    found = CONCLUSION.search(critique) if mark or finished else None
    if found is None:
        return None
    right = _means_right(found["word"])
    return None if any(_means_right(word) != right for word in NAMED.findall(rest)) else right


def usable(text: str) -> str:
    """A critique without a reasoning block and without what follows its end mark; "" where nothing is left."""
    return _spoken(text).partition(END)[0].strip()


def judged(text: str, finished: bool, correct: bool, needs: str, before: Critique, tokens: int) -> Critique:
    """What one more text of a model makes of a critique.

    Args:
      finished: see `verdict_of`.
      correct: what the rule says of the attempt.
      needs: what makes a text usable: "agreeing", a verdict that is the rule's; "verdict", one that can be read;
        "text", nothing but that there is one.
      before: what the texts before it made of it.
      tokens: that were written for this one.
    """
    verdict = verdict_of(text, finished)
    agrees = None if verdict is None else verdict == correct
    heard = {"agreeing": agrees is True, "verdict": agrees is not None, "text": True}[needs]
    first = before.first_agrees if before.tries else agrees
    good = usable(text) if heard else ""
    return Critique(good or None, verdict, agrees, before.tries + 1, before.tokens + tokens, first_agrees=first)


def is_asked_about(attempt: Attempt, cfg: RefineConfig) -> bool:
    """Whether a model is asked for a critique of an attempt, see `refine.critique_accept`."""
    return cfg.critique_accept == "agreeing" or not attempt.correct


def or_fallback(critique: Critique, problem: Problem, attempt: Attempt, cfg: RefineConfig, reference: str) -> Critique:
    """The critique, or what stands in for it: never more than the critic was to say itself.

    Args:
      reference: what the critic is shown, one of options.REFERENCES.
    """
    fallback = fallback_of(cfg.critique_fallback, cfg.critique, reference)
    if critique.text is not None or fallback == "drop":
        return critique
    return critique._replace(text=TEMPLATES[fallback](problem, attempt), fallback=True)


def inverted(text: str) -> str | None:
    """A critique with the opposite verdict, else word for word; None where it has none that could be turned round."""
    critique, mark, rest = text.partition(END)
    found = CONCLUSION.search(critique) or INDICATIVE.match(critique)
    if found is None:
        return None
    word = OPPOSITE[found["word"].lower()]
    start, end = found.span("word")
    return critique[:start] + (word.capitalize() if found["word"][0].isupper() else word) + critique[end:] + mark + rest
