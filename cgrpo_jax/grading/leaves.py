"""Compares two parts without structure: words, numbers, units, bases, equations; math-verify is asked of the rest.

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
_STATED = re.compile(r"\S.*\\text ?\{[^{}]*[A-Za-z]{2,}[^{}]*\} ?[A-Za-z\d\\(<>=+-]")
_CUT = re.compile(r"\S.*\\text ?\{[^{}]*[A-Za-z][^{}]*\} ?[A-Za-z\d\\(<>=+-]")  # math-verify reads as far as a word
_SPECIAL = re.compile(r"\\(?:angle|frac)|\(")
_LABEL = re.compile(r"\\text ?\{ ?(?:\(?[A-H]\)|(?:the )?[a-z ]{1,40}(?<!not )(?:is|are|:)) ?:? ?\} ?", re.IGNORECASE)
_GAP = re.compile(r"(?<=\d) +(?=[\d.])")
# "4 0/0" is no number and no product ("\\log_2 8" is fine); a vector in an expression is not understood there.
# Nor are feet and minutes, and what is expected of a variable is no factor of it.
_NO_SCALARS = re.compile(
    r"(?<![_^\d])\d+ +\d|\[[^\[\]]*,|(?:^|[-+\d)\]}] ?)\([^()]*,|\d ?'|%|(?<![A-Za-z\\])[EPV] ?[(\[] ?[A-Z]"
)
_DRESS = r"\\(?:text|hat|vec|mathbf|boldsymbol)"
_DRESSED = re.compile(rf"{_DRESS} ?\{{ ?[A-Za-z] ?\}}")
_PRODUCT = re.compile(r"\\(?:times|cdot)(?![a-z])")
_PRIMED = re.compile(r"(?<![A-Za-z\\_])([A-Za-z])('{1,4})(?! ?\()")
_UNIT_VECTOR = re.compile(rf"{_DRESS} ?\{{ ?(?:{_DRESS} ?\{{ ?([ijk]) ?\}}|\\?([ijk])(?:math)?) ?\}}")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,} [A-Za-z]{2,}")
_ZEROS = re.compile(r"(?<=\d)\.0+(?!\d)")
_IMAGINARY = re.compile(r"(?<=\d)i(?![A-Za-z])")
_SHORT = re.compile(r"[A-Za-z]{3}|[Nn]o|NO")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:(?: ?: ?| to )\d+(?:\.\d+)?)+")
_COMPARED = re.compile(r"[<>]|\\(?:le|ge|ne|in|notin)(?![a-z])")


def squeezed(text: str) -> str:
    """The text without meaningless spaces, all matrices in round brackets. The space of "7 1/3" becomes "~"."""
    return _GAP.sub("~", text.strip()).replace(" ", "").replace("{bmatrix}", "{pmatrix}")


def said(text: str) -> str:
    """The words of a text in lower case, without the \\text around them."""
    return " ".join(_TEXT.sub(r" \1 ", text).casefold().split()).strip(" .")


def same_leaf(gold: str, answer: str, ask: Ask) -> bool:
    """Two parts that are no collections."""
    if squeezed(gold) == squeezed(answer) or _same_short_word(gold, answer):
        return True
    if _as_ratio(gold) is not None and _as_ratio(gold) == _as_ratio(answer):
        return True
    gold, answer = _unwrapped(gold), _without_label(_unwrapped(answer), gold)
    gold_words, answer_words = words(gold), words(answer)
    if gold_words is not None or answer_words is not None:
        return _same_words(gold, answer)
    if "\\text" in gold + answer and said(gold) == said(answer):
        return True
    if _STATED.match(gold):
        return bool(_STATED.match(answer)) and _same_statement(gold, answer, ask)
    if "\\approx" in gold or "\\approx" in answer:
        return _approximate(gold, answer, ask)
    if "=" in gold or "=" in answer:
        return _equations(gold, answer, ask)
    return _same_value(gold, answer, ask)


def _same_short_word(gold: str, answer: str) -> bool:
    """Yes and yes, odd and Odd; of three letters and no product, as ab and AB are."""
    if gold.casefold() != answer.casefold() or not _SHORT.fullmatch(gold):
        return False
    small = gold.casefold() in ("yes", "no") or not (gold.isupper() or answer.isupper())
    return small and bool(set(gold.casefold()) & set("aeiou")) and bool(set(gold.casefold()) - set("abcxyz"))


def _same_statement(gold: str, answer: str, ask: Ask) -> bool:
    """2n \\text{ for odd } n: the words are the same, and so is what stands between them.

    math-verify reads as far as the words.
    """
    of_gold, of_answer = _TEXT.split(gold), _TEXT.split(answer)
    if [said(word) for word in of_gold[1::2]] != [said(word) for word in of_answer[1::2]]:
        return False
    pairs = [(one.strip(), other.strip()) for one, other in zip(of_gold[::2], of_answer[::2], strict=True)]
    return all(same_leaf(one, other, ask) for one, other in pairs)


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
    counted = number_in_words(gold_words if gold_words is not None else answer_words or "")
    other = number(split_unit(answer if gold_words is not None else gold)[0])
    return bool(counted and other) and counted.value == other.value  # type: ignore[union-attr]


def _singular(word: str) -> str:
    """A word without the s of the plural: "no solutions" says what "no solution" does."""
    return word.removesuffix("s") if len(word) > 3 else word


def _approximate(gold: str, answer: str, ask: Ask) -> bool:
    """An exact value may be followed by its rounding; a question to math-verify checks that it is the rounding."""
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
    if not letters(gold) and not letters(answer):
        return all(same_leaf(of_gold[-1], side, ask) for side in (*of_gold[:-1], *of_answer))
    if len(of_answer) == 1:
        named = is_name(of_gold[0]) or not letters(of_gold[0])
        return named and same_leaf(of_gold[-1], answer, ask)
    if is_name(of_gold[0]) and _head(of_gold[0]) == _head(of_answer[0]):
        renamed = _renamed(of_answer, of_gold[0])
        return renamed is not None and _chain(of_gold[-1], renamed, ask)
    if len(of_gold) != 2 or len(of_answer) != 2 or letters(gold) != letters(answer):
        return False
    if _other_name(of_gold[0], of_answer[0]):
        return False
    gold, answer = _for_math_verify(gold), _for_math_verify(answer)
    return not _PROSE.search(answer) and not any(_unread(text) for text in (gold, answer)) and ask(gold, answer)


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


def _renamed(of_answer: list[str], name: str) -> list[str] | None:
    """f(t) = 2t as f(x) = 2x, where the gold has x and the answer has not; None where f is taken at other values."""
    wanted, own = (_arguments(text) for text in (name, of_answer[0]))
    if not wanted or not own or wanted == own:
        return of_answer
    if len(wanted) != len(own) or not all(re.fullmatch(r"[A-Za-z]", letter) for letter in wanted + own):
        return None
    if not letters(" ".join(of_answer)).isdisjoint(set(wanted) - set(own)):
        return None
    new = dict(zip(own, wanted, strict=True))

    def other(match: re.Match) -> str:
        return new.get(match[0], match[0])

    return [re.sub(r"\\[A-Za-z]+|[A-Za-z]", other, side) for side in of_answer]


def _other_name(gold: str, answer: str) -> bool:
    """Whether the answer names another angle, derivative or value; y = x is x = y, and that is for math-verify."""
    both = [_head(side) for side in (gold, answer)]
    special = [is_name(side) and bool(_SPECIAL.search(side)) for side in (gold, answer)]
    turned = re.sub(r"[A-Z]{2,}$", lambda match: match[0][::-1], both[1])
    return all(special) and both[0] not in (both[1], turned)


def _arguments(name: str) -> list[str]:
    """["x", "t"] of u(x, t)."""
    match = re.search(r"\(([^()]*)\)$", name.replace(" ", ""))
    return match[1].split(",") if match else []


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
    """Rewrites what math-verify misreads: 7i (a variable), \\hbar (nothing), x' (x) and unit vectors (units)."""
    text = _IMAGINARY.sub(" i", _ZEROS.sub("", text))
    if not _PRODUCT.search(text):
        text = _UNIT_VECTOR.sub(lambda match: f" {match[1] or match[2]}_{{97}} ", text)
    text = _PRIMED.sub(lambda match: f"{match[1]}_{{{90 + len(match[2])}}}", text)
    return text.replace("\\hbar", "h_{99}").replace("\\ell", "l_{99}").strip()


def _unread(text: str) -> bool:
    """Whether math-verify would read only a part of it, or something else: products of vectors as those of numbers."""
    vectors = _PRODUCT.search(text) and _DRESSED.search(text)
    return bool(vectors or _NO_SCALARS.search(text) or _CUT.match(text))


def _expressions(gold: str, answer: str, ask: Ask) -> bool:
    """Asks math-verify, unless it would ignore a letter, a word or a gap of the answer."""
    gold, answer = _for_math_verify(gold), _for_math_verify(answer)
    if not gold or not answer:
        return False
    if squeezed(gold) == squeezed(answer):
        return True
    related = bool(RELATION.search(gold)), bool(RELATION.search(answer))
    if related[0] != related[1] or any(_unread(text) for text in (gold, answer)):
        return False
    if not any(related) and letters(gold) != letters(answer):
        return False
    return not _PROSE.search(answer) and _text_words(answer) <= _text_words(gold) and ask(gold, answer)


def _text_words(text: str) -> set[str]:
    """The words and numbers in \\text."""
    return {word for part in _TEXT.findall(text) for word in re.findall(r"[^\W\d_]{2,}|\d+", part.casefold())}
