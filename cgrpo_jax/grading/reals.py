"""Sets of real numbers: intervals, inequalities, set-builders, absolute values and words in one form.

Plain string work; ends of intervals stay text, and only plain numbers are added or negated, as fractions.
"""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

from cgrpo_jax.grading.normalise import number, split_commas, split_top, words
from cgrpo_jax.grading.structure import Collection, Parsed, parse

LOW, HIGH = "-\\infty", "\\infty"
ALL = Collection("()", (LOW, HIGH))
EMPTY = Collection("{}", ())
_ALL_WORDS = re.compile(r"(?:the )?(?:set of )?(?:all |any )?(?:the )?(?:real numbers?|reals?|real values)")
_EMPTY_WORDS = (
    "empty set", "null set", "empty", "no solution", "no solutions", "there is no solution", "there are no solutions",
)  # fmt: skip
_REALS = re.compile(r"\\mathbb ?\{? ?R ?\}?|\\text ?\{ ?R ?\}")
_VARIABLE = r"\\?[A-Za-z]+(?: ?_(?:\w|\{[^{}]{1,20}\}))?(?: ?\( ?[A-Za-z] ?\))?"
_BUILDER = re.compile(rf"\\\{{ ?({_VARIABLE})(?: ?\\in ?(?:{_REALS.pattern}))? ?(?:\||:) ?(.*?) ?\\\}}", re.DOTALL)
_MEMBER = re.compile(rf"({_VARIABLE}) ?\\in(?![a-z]) ?(.*)", re.DOTALL)
_WITHOUT = re.compile(rf"(?:{_REALS.pattern}) ?(?:\\setminus|-|\\) ?\\\{{ ?(.*?) ?\\\}}", re.DOTALL)
_OPERATOR = re.compile(r"\\(?:le|ge|ne)(?![a-z])|<|>")
_ABSOLUTE = re.compile(rf"\| ?({_VARIABLE})(?: ?([-+]) ?([^|]{{1,60}}))? ?\|")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}


def _text(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    if value.denominator == 1:
        return str(value)
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _negative(text: str) -> str | None:
    read = number(text)
    if read:
        return _text(-read.value)
    return None if text.startswith("-") else f"-{text}" if not re.search(r"[-+]", text) else f"-({text})"


def _shifted(center: Fraction, text: str, sign: int) -> str | None:
    read = number(text)
    if read:
        return _text(center + sign * read.value)
    return None if center else text if sign > 0 else _negative(text)


def _ray(operator: str, end: str) -> Collection:
    """What `x operator end` says."""
    if operator == "\\ne":
        return Collection("union", (Collection("()", (LOW, end)), Collection("()", (end, HIGH))))
    if operator in ("<", "\\le"):
        return Collection("(]" if operator == "\\le" else "()", (LOW, end))
    return Collection("[)" if operator == "\\ge" else "()", (end, HIGH))


def _about(middle: str, operator: str, end: str) -> tuple[Collection, str] | None:
    """What `middle operator end` says, where the middle is a variable or the distance of one from a number."""
    if re.fullmatch(_VARIABLE, middle):
        return _ray(operator, end), middle
    match = _ABSOLUTE.fullmatch(middle)
    shift = number(match[3]) if match and match[3] else None
    if not match or (match[3] and not shift):
        return None
    center = shift.value * (1 if match[2] == "-" else -1) if shift else Fraction(0)
    low, high = _shifted(center, end, -1), _shifted(center, end, 1)
    distance = number(end)
    if low is None or high is None or operator == "\\ne" or (distance and distance.value < 0):
        return None
    closed = "\\" in operator
    if operator in ("<", "\\le"):
        return Collection("[]" if closed else "()", (low, high)), match[1]
    outer = Collection("(]" if closed else "()", (LOW, low)), Collection("[)" if closed else "()", (high, HIGH))
    return Collection("union", outer), match[1]


def _comparison(text: str) -> tuple[Collection, str] | None:
    """x < 3; 3 < x; |x - 2| <= 5; 1 < x <= 2; the set and its variable."""
    operators = [match[0] for match in _OPERATOR.finditer(text)]
    parts = [part.strip() for part in _OPERATOR.split(text)]
    if len(operators) == 1 and all(parts):
        first, second = parts
        forwards = _about(first, operators[0], second) if first not in second else None
        return forwards or (_about(second, _FLIPPED[operators[0]], first) if second not in first else None)
    if len(operators) != 2 or not all(parts) or not re.fullmatch(_VARIABLE, parts[1]):
        return None
    low, name, high = parts
    if {operators[0], operators[1]} <= {">", "\\ge"}:
        low, high, operators = high, low, [_FLIPPED[operators[1]], _FLIPPED[operators[0]]]
    if not {operators[0], operators[1]} <= {"<", "\\le"}:
        return None
    kind = ("[" if operators[0] == "\\le" else "(") + ("]" if operators[1] == "\\le" else ")")
    return Collection(kind, (low, high)), name


def _overlap(parts: list[str], depth: int) -> tuple[Collection, str | None] | None:
    """x > 1 and x < 3."""
    read = [real_set(part, depth + 1) for part in parts]
    if len(read) != 2 or not read[0] or not read[1] or read[0][1] != read[1][1]:
        return None
    rays = sorted((part[0] for part in read if part), key=_is_below)
    upper, lower = rays[1], rays[0]
    if not _is_below(upper) or _is_below(lower) or len(lower.parts) != 2 or lower.parts[1] != HIGH:
        return None
    return Collection(lower.kind[0] + upper.kind[1], (lower.parts[0], upper.parts[1])), read[0][1]


def _is_below(ray: Collection) -> bool:
    return ray.kind != "union" and ray.parts[:1] == (LOW,)


def _without(points: str) -> Collection | None:
    """All real numbers but these: intervals between them."""
    read = [number(part) for part in split_commas(points, True)]
    if not all(read) or len(read) > 8:
        return None
    values = [_text(value) for value in sorted(point.value for point in read if point)]
    ends = [LOW, *values, HIGH]
    return Collection("union", tuple(Collection("()", pair) for pair in itertools.pairwise(ends)))


def real_set(text: str, depth: int = 0) -> tuple[Collection, str | None] | None:
    """The set that a text describes and the variable it is said of; None for what is no such description."""
    text, said = text.strip(), words(text) or ""
    if _REALS.fullmatch(text) or _ALL_WORDS.fullmatch(said):
        return ALL, None
    if text == "\\emptyset" or said in _EMPTY_WORDS:
        return EMPTY, None
    if depth > 2 or len(text) > 400:
        return None
    builder, member, without = (pattern.fullmatch(text) for pattern in (_BUILDER, _MEMBER, _WITHOUT))
    united, common = split_top(text, "\\cup"), split_top(text, "\\cap")
    if builder:
        return _built(builder[1], builder[2], depth)
    if member:
        inner = real_set(member[2], depth + 1)
        found = inner[0] if inner else parse(member[2], 1, True)
        return (found, member[1]) if isinstance(found, Collection) and is_set(found) else None
    if without:
        rest = _without(without[1])
        return (rest, None) if rest else None
    if len(united) > 1:
        read = [part for part in (real_set(part, depth + 1) for part in united) if part]
        agree = len(read) == len(united) and len({name for _, name in read}) == 1
        return (Collection("union", tuple(part for part, _ in read)), read[0][1]) if agree else None
    return _overlap(common, depth) if len(common) == 2 else _comparison(text)


def _built(variable: str, conditions: str, depth: int) -> tuple[Collection, str | None] | None:
    """What a set-builder holds; that its elements are real goes without saying."""
    parts = [part for part in split_commas(conditions, True) if part and not _is_real(part, variable)]
    if len(parts) not in (1, 2):
        return None
    inner = _overlap(parts, depth) if len(parts) == 2 else real_set(parts[0], depth + 1)
    return (inner[0], None) if inner and inner[1] in (None, variable) else None


def _is_real(condition: str, name: str) -> bool:
    match = _MEMBER.fullmatch(condition)
    return bool(match and match[1] == name and _REALS.fullmatch(match[2]))


def is_set(parsed: Parsed) -> bool:
    """Whether it may be a set of real numbers as it stands: an interval, a union or nothing."""
    if isinstance(parsed, str) or parsed.names:
        return False
    interval = parsed.kind in ("()", "[]") and len(parsed.parts) == 2
    return interval or parsed.kind in ("union", "(]", "[)") or parsed == EMPTY
