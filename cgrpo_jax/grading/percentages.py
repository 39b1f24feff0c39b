"""Does a question ask for a percentage? Only then may an answer have the sign that its gold was given without."""

from __future__ import annotations

import re

from cgrpo_jax.grading.normalise import COUNTS, SCALES, SHARES, number

_SIGN = r"(?:per ?cent(?:age)?s?\b|\\?%)"
_WORDS = r"(?:(?!(?:so|such|that|when|if|after|before|with|whose|where|by|for|at)\b)[a-z'’-]+ +){0,6}?"
# "what percent", "find the new win percentage", "as a percentage", "to the nearest tenth of a percent".
_ASKED = re.compile(
    rf"\b(?:what(?:['’]s)?|which|find|calculate|compute|determine|estimate|give|state|evaluate) +"
    rf"({_WORDS}){_SIGN}|\bhow (?:many|much) {_SIGN}"
    rf"|\b(?:as|in|to) (?:the )?(?:a |an )?(?:(?:nearest|closest|whole|decimal|integer|exact) )*()"
    rf"(?:(?:tenth|hundredth|half|quarter)s? (?:of )?(?:a |one )?)?{_SIGN}",
    re.IGNORECASE,
)
# "x percent of 60 is 15": the percentage has a name, and is asked for by it.
_NAMED = re.compile(rf"(?<![A-Za-z\\])([A-Za-z])\$? *{_SIGN}")
_WRITTEN = re.compile(r"%|per ?cent", re.IGNORECASE)
_COUNTED = frozenset((*COUNTS, *SCALES, *SHARES))


def asked(question: str) -> bool:
    """Whether the answer to a question is a percentage; not where percentages are only spoken of: "25 percent of n"."""
    for match in _ASKED.finditer(question):
        before = re.split(r"[ -]", (match[1] or "").strip().casefold())[-1]
        if before not in _COUNTED:
            return True
    return any(_asks_for(name, question) for name in set(_NAMED.findall(question)))


def _asks_for(name: str, question: str) -> bool:
    verb = r"(?:find|what is|what's|determine|solve for|compute|calculate|value of)"
    return re.search(rf"{verb} (?:the value of )?\$?{name}(?![A-Za-z])", question, re.IGNORECASE) is not None


def missing_sign(question: str, gold: str, answer: str) -> bool:
    """Whether the answer has the percent sign that the gold of a question for a percentage was given without.

    So 25 and 25% are right for a gold of 25, and its hundredth is not. A gold below 1 may be a share: it stays.
    """
    read = number(gold) if _WRITTEN.search(answer) else None
    return bool(read and abs(read.value) >= 1) and asked(question)
