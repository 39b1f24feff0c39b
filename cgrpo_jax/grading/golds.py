"""Golds that no answer could equal: what stands in the place of an answer, and is none. Plain string work."""

from __future__ import annotations

import re

from cgrpo_jax.grading.answers import MAX_ANSWER

_INSTEAD = frozenset(
    (
        "proof", "see proof", "see the proof", "solution", "see solution", "see the solution", "see above", "answer",
        "see below", "not found", "answer not found", "no answer", "no answer found", "no final answer", "n/a", "na",
        "nan", "null", "not available", "not provided", "none provided", "not given", "unknown", "unanswered", "todo",
        "tbd", "missing", "error", "inf", "-inf", "+inf", "image", "figure", "see figure", "see the figure", "omitted",
        "proof omitted", "proven", "q.e.d", "qed", "see explanation", "see attached", "undetermined answer",
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
