"""What a critique that a model wrote concludes, and what of its text is shown to the policy.

A critique is asked to end in `Conclusion: correct [END]` or `Conclusion: incorrect [END]` (arXiv 2506.03106, appendix
G; `right` and `wrong` in the release). Only that is a verdict: all else that a model may write is unreadable.
"""

from __future__ import annotations

import re

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


def inverted(text: str) -> str | None:
    """A critique with the opposite verdict, else word for word; None where it has none that could be turned round."""
    critique, mark, rest = text.partition(END)
    found = CONCLUSION.search(critique) or INDICATIVE.match(critique)
    if found is None:
        return None
    word = OPPOSITE[found["word"].lower()]
    start, end = found.span("word")
    return critique[:start] + (word.capitalize() if found["word"][0].isupper() else word) + critique[end:] + mark + rest
