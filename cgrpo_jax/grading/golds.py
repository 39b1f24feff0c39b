"""Gold answers that no answer could equal, and those that lack a percent sign. Plain string work."""

from __future__ import annotations

import re

from cgrpo_jax.grading.answers import MAX_ANSWER
from cgrpo_jax.grading.normalise import COUNTS, SCALES, SHARES, number

# Words that stand where an answer is missing: whoever repeats one of them earns nothing.
NO_ANSWERS = frozenset(
    (
        "proof", "proved", "see proof", "proof omitted", "see solution", "see the solution", "see explanation",
        "omitted", "not found", "not available", "not given", "not provided", "no answer", "no answer found",
        "answer not found", "unknown", "unanswered", "missing", "null", "nan", "error", "todo", "tbd", "n/a", "na",
        "qed", "?", "",
    )
)  # fmt: skip
# Only a gold of a data file is questioned for these: to a question about words one of them may be the answer.
_INSTEAD = NO_ANSWERS | frozenset(
    (
        "see the proof", "solution", "see above", "answer", "see below", "no final answer", "none provided", "inf",
        "-inf", "+inf", "image", "figure", "see figure", "see the figure", "proven", "q.e.d", "see attached",
        "undetermined answer",
    )
)  # fmt: skip
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox) ?\{([^{}]*)\}")
_NOT_A_NUMBER = re.compile(r"(?<![A-Za-z\\])nan(?![A-Za-z])", re.IGNORECASE)
_ADDRESS = re.compile(r"https?://|www\.|file://", re.IGNORECASE)
_PICTURE = re.compile(r"\[/?asy\]|\\includegraphics|\\begin ?\{tikzpicture\}|<(?:image|img)\b|!\[", re.IGNORECASE)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_MATHEMATICS = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\[A-Za-z]+|\\.")
_SAID = re.compile(r"\banswer (?:is|was|will be|=)|\banswer:", re.IGNORECASE)
_NEGATIVE = re.compile(r"\b(?:no|none|not|never|cannot|nothing)\b", re.IGNORECASE)
_SYMBOL = re.compile(r"\d+(?:[.,/]\d+)*|\b[A-Za-z]\b")
_WORD = re.compile(r"[^\W\d_]{2,}|\b[aI]\b")
_VERB = re.compile(
    r"\b(?:is|are|was|were|be|can|cannot|has|have|had|must|will|would|should|does|do|follows?|holds?|exists?|shows?|"
    r"proves?|depends?|equals?|means?|gives?|we|because|since|therefore|hence)\b",
    re.IGNORECASE,
)
_SIGN = r"(?:per ?cent(?:age)?s?\b|\\?%)"
_UP_TO_SIX = r"(?:(?!(?:so|such|that|when|if|after|before|with|whose|where|by|for|at)\b)[a-z'’-]+ +){0,6}?"
# "what percent", "find the new win percentage", "as a percentage", "to the nearest tenth of a percent".
_ASKED = re.compile(
    rf"\b(?:what(?:['’]s)?|which|find|calculate|compute|determine|estimate|give|state|evaluate) +"
    rf"({_UP_TO_SIX}){_SIGN}|\bhow (?:many|much) {_SIGN}"
    rf"|\b(?:as|in|to) (?:the )?(?:a |an )?(?:(?:nearest|closest|whole|decimal|integer|exact) )*()"
    rf"(?:(?:tenth|hundredth|half|quarter)s? (?:of )?(?:a |one )?)?{_SIGN}",
    re.IGNORECASE,
)
# "x percent of 60 is 15": the percentage has a name, and is asked for by it.
_NAMED = re.compile(rf"(?<![A-Za-z\\])([A-Za-z])\$? *{_SIGN}")
_WRITTEN = re.compile(r"%|per ?cent", re.IGNORECASE)
_COUNTED = frozenset((*COUNTS, *SCALES, *SHARES))


def _braces_close(text: str) -> bool:
    depth = 0
    for match in _BRACE.finditer(text):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth < 0:
            return False
    return depth == 0


def _sentence(text: str) -> bool:
    """Bare prose that begins with a word: four words and a full stop, four with a verb and a number, five with a verb
    (but "there is no such n" may be an answer), or seven in a row. "The answer is" in front of it is always one."""
    if _SAID.search(text):
        return True
    prose = _MATHEMATICS.sub(" ", text).strip()
    if text[:1] in "$\\" or not prose[:1].isalpha() or not _WORD.match(prose):
        return False
    verb, count = bool(_VERB.search(prose)), max(len(_WORD.findall(part)) for part in re.split(r"[,;]", prose))
    symbols = _SYMBOL.findall(prose)
    if count >= 7 or (count >= 4 and prose[-1] in ".!") or (verb and count >= 5 and not _NEGATIVE.search(prose)):
        return True
    return verb and any(symbol[0].isdigit() for symbol in symbols) and count + len(symbols) >= 4


def hopeless(gold: str) -> str | None:
    """Why no answer could equal this gold, in a few words; None where one could (as far as plain text says)."""
    gold = gold.strip()
    said = " ".join(_TEXT.sub(r"\1", gold).split()).strip("$ .!").casefold()
    if len(gold) > MAX_ANSWER:
        return f"longer than the {MAX_ANSWER} characters of an answer"
    if "?" in gold or not (re.search(r"[^\W_]|[∞∅]", gold) or "\\{" in gold):
        return "no answer in it"
    if said in _INSTEAD or _NOT_A_NUMBER.search(gold):
        return "a word in the place of an answer"
    if _ADDRESS.search(gold):
        return "an address"
    if _PICTURE.search(gold):
        return "a picture"
    if gold.startswith("#"):
        return "a heading"
    if not _braces_close(gold):
        return "a brace that is not closed"
    return "a sentence" if _sentence(gold) else None


def missing_sign(question: str, gold: str, answer: str) -> bool:
    """Whether the answer has the percent sign that the gold of a question for a percentage was given without.

    So 25 and 25% are right for a gold of 25, and its hundredth is not. A gold below 1 may be a share: it stays.
    """
    read = number(gold) if _WRITTEN.search(answer) else None
    return bool(read and abs(read.value) >= 1) and _asks_for_percentage(question)


def _asks_for_percentage(question: str) -> bool:
    """Whether the answer is a percentage; not where the question only speaks of one, as in "25 percent of n"."""
    for match in _ASKED.finditer(question):
        before = re.split(r"[ -]", (match[1] or "").strip().casefold())[-1]
        if before not in _COUNTED:
            return True
    verb = r"(?:find|what is|what's|determine|solve for|compute|calculate|value of)"
    return any(
        re.search(rf"{verb} (?:the value of )?\$?{name}(?![A-Za-z])", question, re.IGNORECASE)
        for name in set(_NAMED.findall(question))
    )
