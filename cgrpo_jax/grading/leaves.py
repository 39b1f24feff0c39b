"""When two parts without structure are equal: words, numbers, units, bases, equations; the rest is for math-verify.

A text that says two things, "5 = 6", is equal to neither: an optimiser would find it.
"""

from __future__ import annotations

import re
from typing import Protocol

from cgrpo_jax.grading.normalise import (
    NO_UNITS,
    Number,
    letters,
    number,
    number_in_words,
    same_number,
    split_letter_unit,
    split_top,
    split_unit,
    words,
)
from cgrpo_jax.grading.structure import RELATION, is_name, sides


class Ask(Protocol):
    """Asks a worker process: are they equal ("equal"), or is the answer the gold's rounding ("rounded")?"""

    def __call__(self, gold: str, answer: str, how: str = "equal", /) -> bool: ...


BASE = re.compile(r"([0-9A-Za-z]+)_(?:\{ ?(\d{1,2}) ?\}|(\d{1,2}))")
_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_LABEL = re.compile(r"\\text ?\{ ?(?:\(?[A-H]\)|(?:the )?[a-z ]{1,40}(?<!not )(?:is|are|:)) ?:? ?\} ?", re.IGNORECASE)
_GAP = re.compile(r"(?<=\d) +(?=[\d.])")
# "4 0/0" is no number and no product ("\\log_2 8" is fine); a vector in an expression is not understood there.
_NO_SCALARS = re.compile(r"(?<![_^\d])\d+ +\d|\[[^\[\]]*,|(?:^|[-+\d)\]}] ?)\([^()]*,")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,} [A-Za-z]{2,}")
_ZEROS = re.compile(r"(?<=\d)\.0+(?!\d)")
_IMAGINARY = re.compile(r"(?<=\d)i(?![A-Za-z])")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:(?: ?: ?| to )\d+(?:\.\d+)?)+")
_COMPARED = re.compile(r"[<>]|\\(?:le|ge|ne|in|notin)(?![a-z])")


def squeezed(text: str) -> str:
    """Without the spaces that say nothing; that of "7 1/3" stays."""
    return _GAP.sub("~", text.strip()).replace(" ", "")


def said(text: str) -> str:
    """What a text with words says, without \\text, in lower case."""
    return " ".join(_TEXT.sub(r" \1 ", text).casefold().split()).strip(" .")


def same_leaf(gold: str, answer: str, ask: Ask) -> bool:
    """Two parts that are no collections."""
    if squeezed(gold) == squeezed(answer):
        return True
    if _as_ratio(gold) is not None and _as_ratio(gold) == _as_ratio(answer):
        return True
    gold, answer = _unwrapped(gold), _without_label(_unwrapped(answer), gold)
    gold_words, answer_words = words(gold), words(answer)
    if gold_words is not None or answer_words is not None:
        return _same_words(gold, answer)
    if "\\text" in gold + answer and said(gold) == said(answer):
        return True
    if "\\approx" in gold or "\\approx" in answer:
        return _approximate(gold, answer, ask)
    if "=" in gold or "=" in answer:
        return _equations(gold, answer, ask)
    return _same_value(gold, answer, ask)


def _as_ratio(text: str) -> str | None:
    """2:1, from "2 to 1" as well; None for what is no ratio of plain numbers. No value: 1 to 2 is not one half."""
    match = _RATIO.fullmatch(said(text))
    return match[0].replace(" to ", ":").replace(" ", "") if match else None


def _unwrapped(text: str) -> str:
    """The number in \\text{12}."""
    inner = _TEXT.fullmatch(text)
    return inner[1].strip() if inner and number(inner[1]) else text


def _without_label(answer: str, gold: str) -> str:
    """Without "(B)" or "the total is" before a value; "(B)" alone where the gold is a letter itself."""
    label = _LABEL.match(answer)
    if not label or not answer[label.end() :] or re.search(r"\\text|\([A-H]\)", answer[label.end() :]):
        return answer
    if not NO_UNITS.isdisjoint(
        set(re.findall(r"[a-z]+", label[0].casefold())) - {"is", "are", "of", "for", "all", "over"}
    ):
        return answer  # not: 5
    if words(gold) is None:
        return answer[label.end() :]
    return label[0].strip() if len(words(gold) or "") == 1 else answer


def _same_words(gold: str, answer: str) -> bool:
    """A bare letter may answer "(C)", and a number its word; text and mathematics are never equal otherwise."""
    gold_words, answer_words = words(gold), words(answer)
    bare_gold, bare_answer = (text.strip("() .").casefold() for text in (gold, answer))
    if bare_gold and _singular(gold_words or bare_gold) == _singular(answer_words or bare_answer):
        return True
    if gold_words is not None and answer_words is not None:
        return False
    counted = number_in_words(gold_words if gold_words is not None else answer_words or "")
    other = number(split_unit(answer if gold_words is not None else gold)[0])
    return bool(counted and other) and counted.value == other.value  # type: ignore[union-attr]


def _singular(word: str) -> str:
    """No solutions are no solution."""
    return word.removesuffix("s") if len(word) > 3 else word


def _approximate(gold: str, answer: str, ask: Ask) -> bool:
    """An exact value may be followed by its rounding: math-verify's process checks that it is one."""
    of_gold, of_answer = (split_top(text, "\\approx") for text in (gold, answer))
    if len(of_gold) == len(of_answer) == 1:
        return False  # a sign inside brackets
    of_gold = [side for side in of_gold if side and not is_name(side)]
    of_answer = [side for side in of_answer if side]
    if len(of_answer) > 1 and is_name(of_answer[0]):
        of_answer = of_answer[1:]
    if len(of_answer) == 1:
        return any(same_leaf(side, of_answer[0], ask) for side in of_gold)
    if len(of_answer) != 2 or not number(of_answer[1]):
        return False
    exact = sides(of_answer[0])
    if is_name(exact[0]) and len(exact) > 1:
        exact = exact[1:]
    if not all(same_leaf(side, exact[-1], ask) for side in exact[:-1]):
        return False
    if not any(same_leaf(side, part, ask) for side in of_gold for part in (exact[-1], of_answer[1])):
        return False
    return ask(_for_math_verify(exact[-1]), of_answer[1], "rounded")


def _equations(gold: str, answer: str, ask: Ask) -> bool:
    """At least one of the two has an equality sign. What it claims must all fit: 3 = 6 is not 6."""
    of_gold, of_answer = _name_first(sides(gold)), _name_first(sides(answer))
    claims = of_answer[1:] if is_name(of_answer[0]) else of_answer
    if not all(of_gold) or not all(of_answer) or _COMPARED.search(" ".join(claims)):
        return False
    if len(of_gold) == len(of_answer) == 1:  # what is equal stands inside brackets
        return _same_value(gold, answer, ask)
    if len(of_gold) == 1:
        return _chain(gold, of_answer, ask)
    if len(of_answer) == 1:
        named = is_name(of_gold[0]) or not letters(of_gold[0])
        return named and same_leaf(of_gold[-1], answer, ask)
    if is_name(of_gold[0]) and _head(of_gold[0]) == _head(of_answer[0]):
        return _chain(of_gold[-1], _renamed(of_answer, of_gold[0]), ask)
    if len(of_gold) != 2 or len(of_answer) != 2 or letters(gold) != letters(answer):
        return False
    return not _PROSE.search(answer) and ask(_for_math_verify(gold), _for_math_verify(answer))


def _chain(gold: str, of_answer: list[str], ask: Ask) -> bool:
    """x = 2 + 3 = 5: after a name, or a sum of names that is worked out, every side is the gold."""
    first, rest = of_answer[0], of_answer[1:]
    if not is_name(first):
        worked_out = len(rest) > 1 and letters(first) and not letters(rest[0])
        if not worked_out or squeezed(rest[0]) == squeezed(rest[1]):
            return all(same_leaf(gold, side, ask) for side in of_answer)
    on_the_way = all(_symbolic(side, gold) or same_leaf(gold, side, ask) for side in rest[:-1])
    return on_the_way and same_leaf(gold, rest[-1], ask)


def _symbolic(side: str, gold: str) -> bool:
    """A formula on the way to a number, as in A = \\pi r^2 = 4\\pi; it names no value."""
    return not letters(gold) and bool(letters(side)) and not is_name(side) and not split_unit(side)[1]


def _name_first(of_text: list[str]) -> list[str]:
    """5 = x as x = 5."""
    return of_text[::-1] if len(of_text) == 2 and is_name(of_text[1]) and not is_name(of_text[0]) else of_text


def _renamed(of_answer: list[str], name: str) -> list[str]:
    """f(t) = 2t as f(x) = 2x, where the gold has x and the answer has not."""
    wanted, own = (re.search(r"\( ?([A-Za-z]) ?\)$", text) for text in (name, of_answer[0]))
    if not wanted or not own or wanted[1] in letters(" ".join(of_answer)):
        return of_answer

    def other(match: re.Match) -> str:
        return wanted[1] if match[0] == own[1] else match[0]

    return [re.sub(r"\\[A-Za-z]+|[A-Za-z]", other, side) for side in of_answer]


def _head(name: str) -> str:
    """The name without its arguments."""
    return re.sub(r"\([^()]*\)$|[ {}]", "", name.replace(" ", ""))


def _units(gold: str, answer: str) -> tuple[tuple[str, str | None], tuple[str, str | None]]:
    """(value, unit) of both. A letter behind a number is a unit only where the other one has a unit."""
    of_gold, of_answer = split_unit(gold), split_unit(answer)
    if of_gold[1] and not of_answer[1]:
        of_answer = split_letter_unit(answer)
    elif of_answer[1] and not of_gold[1]:
        of_gold = split_letter_unit(gold)
    return of_gold, of_answer


def _same_value(gold: str, answer: str, ask: Ask) -> bool:
    """Two values: numbers in bases, with units, or expressions."""
    (gold, gold_unit), (answer, answer_unit) = _units(gold, answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return False
    gold_base, answer_base = BASE.fullmatch(gold), BASE.fullmatch(answer)
    if gold_base and gold_base[1].isdigit():
        base = gold_base[2] or gold_base[3]
        digits, other_base = (answer_base[1], answer_base[2] or answer_base[3]) if answer_base else (answer, base)
        return digits.lstrip("0") == gold_base[1].lstrip("0") and other_base == base
    gold_number, answer_number = number(gold), number(answer)
    if gold_number and answer_number:
        return _same_with_percent(gold_number, gold_unit, answer_number, answer_unit)
    if gold_number and answer_base and answer_base[1].isdigit():
        return _in_base(answer_base) == gold_number.value
    if answer_unit == "percent" and gold_unit != "percent":
        answer = f"\\frac{{{answer}}}{{100}}"
    return _expressions(gold, answer, ask)


def _same_with_percent(gold: Number, gold_unit: str | None, answer: Number, answer_unit: str | None) -> bool:
    """A percent sign of the gold may be left out, or its hundredths written; one that is only in the answer counts."""
    hundredths = Number(answer.value / 100, None)
    if answer_unit == "percent" and gold_unit != "percent":
        return same_number(gold, hundredths)
    if same_number(gold, answer):
        return True
    return gold_unit == "percent" and answer_unit is None and gold.value == 100 * answer.value


def _in_base(match: re.Match) -> int | None:
    base = int(match[2] or match[3])
    return int(match[1], base) if 2 <= base <= 10 and all(int(digit) < base for digit in match[1]) else None


def _for_math_verify(text: str) -> str:
    """As it reads best: 7i is seven and a variable there, and \\hbar nothing at all."""
    text = _IMAGINARY.sub(" i", _ZEROS.sub("", text))
    return text.replace("\\hbar", "h_{99}").replace("\\ell", "l_{99}").strip()


def _expressions(gold: str, answer: str, ask: Ask) -> bool:
    """What math-verify is asked: only where it would not drop a letter, a word or a gap of the answer as a trifle."""
    gold, answer = _for_math_verify(gold), _for_math_verify(answer)
    if not gold or not answer:
        return False
    if squeezed(gold) == squeezed(answer):
        return True
    related = bool(RELATION.search(gold)), bool(RELATION.search(answer))
    if related[0] != related[1] or any(_NO_SCALARS.search(text) for text in (gold, answer)):
        return False
    if not any(related) and letters(gold) != letters(answer):
        return False
    if _PROSE.search(answer) or not set(said_words(answer)) <= set(said_words(gold)):
        return False
    return ask(gold, answer)


def said_words(text: str) -> list[str]:
    """The words and numbers in \\text."""
    return [word for part in _TEXT.findall(text) for word in re.findall(r"[^\W\d_]{2,}|\d+", part.casefold())]
