"""Grades TheoremQA by the type of the gold: integer, float, bool, option, list of integer, list of float.

A problem's `entry` holds {"answer_type": ..., "answer": the gold as JSON}. The tolerance of floats, 4 % of the gold, is
that of the official grader (TIGER-AI-Lab/TheoremQA, number_utils.py, within_eps, commit acfc968). Stricter than it:
integers must be equal (it rounds the answer, so that 0.3 is 0), lists have an order (it sorts both), "no" in a word is
no False. Numbers are read by normalise.number, never evaluated; other expressions are compared by math-verify.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from cgrpo_jax.grading.choices import chosen
from cgrpo_jax.grading.normalise import clean, number, split_commas, split_unit

TOLERANCE = Fraction(4, 100)
TYPES = ("integer", "float", "bool", "option", "list of integer", "list of float")
_TRUE, _FALSE = ("true", "yes"), ("false", "no")
_PREFIX = re.compile(r"\\?[A-Za-z]+(?:_\w|_\{[^{}]*\})? ?(?:=|\\approx) ?")
_TERM = r"(?P<sign>-?) ?{}(?P<m>[\d.]*) ?(?:\*|\\cdot)? ?(?:\\pi|\\sqrt ?(?:\{{ ?(?P<r>[\d.]+) ?\}}|(?P<s>\d)))"
_IRRATIONAL = re.compile(_TERM.format("") + r" ?(?:/ ?(?P<d>\d{1,30}))?")
_OVER = re.compile(_TERM.format(r"\\frac ?\{ ?") + r" ?\} ?\{ ?(?P<d>\d{1,30}) ?\}")
PI = Fraction("3.14159265358979323846")


def value(text: str) -> Fraction | None:
    """A plain number, also with a unit or percent sign, or a multiple of pi or of a square root; else None."""
    text = without_name(text)
    plain, unit = split_unit(text)
    read = number(plain)
    if read:
        return read.value / 100 if unit == "percent" else read.value
    match = _IRRATIONAL.fullmatch(plain) or _OVER.fullmatch(plain)
    factor = number(match["m"] or "1") if match else None
    if not match or not factor or int(match["d"] or "1") == 0:
        return None
    root = number(match["r"] or match["s"]) if match["r"] or match["s"] else None
    if (match["r"] and not root) or (root and root.value > 10**30):
        return None
    irrational = Fraction(math.sqrt(root.value)) if root else PI
    return (-1 if match["sign"] else 1) * factor.value * irrational / int(match["d"] or "1")


def without_name(text: str) -> str:
    """Without "x =" or "x \\approx" in front; of "exact \\approx decimal" the decimal."""
    match = _PREFIX.match(text)
    text = text[match.end() :] if match else text
    return text.rpartition("\\approx")[2].strip() or text


def _close(gold: float | int, answer: Fraction | None, exact: bool) -> bool:
    target = Fraction(str(gold))
    return answer is not None and (answer == target if exact else abs(answer - target) <= TOLERANCE * abs(target))


def _values(text: str, count: int) -> list[Fraction | None]:
    """The parts of a list; it may stand in any one pair of brackets."""
    text = without_name(text)
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
            break
    parts = [part for part in split_commas(text, True) if part] if count != 1 else [text]
    return [value(part) for part in parts]


def judge(kind: str, gold: Any, answer: str) -> bool | None:
    """The verdict on one answer; None where its number is none that is read here (math-verify is asked then)."""
    text = clean(answer)
    if kind == "bool":
        word = text.replace("\\text", "").strip("{}() .").casefold()
        return word in (_TRUE if gold else _FALSE)
    if kind == "option":
        return chosen(answer, [""] * 6) == gold.strip("() ").upper()
    if kind in ("integer", "float"):
        read = value(text)
        return None if read is None else _close(gold, read, kind == "integer")
    values = _values(text, len(gold))
    if len(values) != len(gold):
        return False
    if any(read is None for read in values):
        return None
    return all(_close(target, read, kind == "list of integer") for target, read in zip(gold, values, strict=True))


def spelled(gold: Any) -> str:
    """A gold as text, for answers whose numbers are not read here."""
    return f"({', '.join(map(str, gold))})" if isinstance(gold, list) else str(gold)
