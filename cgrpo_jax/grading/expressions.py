"""Equality of expressions: math-verify's reading and its verdict, and where the values speak against it.

Importing this imports sympy, so only worker processes do, for the first answer that needs it.
"""

from __future__ import annotations

import dataclasses
import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import (
    Basic,
    Derivative,
    Expr,
    Float,
    Integral,
    Limit,
    MatrixBase,
    MatrixExpr,
    Number,
    Product,
    Rational,
    Sum,
    Symbol,
)  # fmt: skip
from sympy.core.relational import Equality, Relational

DIGITS = 120  # of values that are compared


def read(text: str, plain: bool = False) -> list:
    """What math-verify parses, in the form in which it takes a whole text for the answer.

    Unless it is asked for plain, it drops no units: a last letter is one to it, and t^2 + 3t would be t^2 + 3.
    """
    latex = LatexExtractionConfig()
    if not plain:
        latex = dataclasses.replace(
            latex, normalization_config=dataclasses.replace(latex.normalization_config, units=False)
        )
    boxed = text if "\\boxed" in text else f"\\boxed{{{text}}}"
    return parse(boxed, extraction_config=[latex, ExprExtractionConfig()], parsing_timeout=None)


def close(gold, answer, places: int) -> bool:
    """Whether two values agree to so many places, in proportion to their size.

    math-verify's own tolerance is absolute: all that is tiny would be equal.
    """
    gold, answer = gold.evalf(DIGITS), answer.evalf(DIGITS)
    scale = max(abs(gold), abs(answer))
    return bool(scale == 0 or abs(gold - answer) <= scale / 10**places)


def somewhere(symbols, step: int) -> dict:
    """A number for each symbol."""
    return {symbol: Rational(17 + 12 * i, 13 + step * i) for i, symbol in enumerate(sorted(symbols, key=str))}


def nearly_a_multiple(gold, answer) -> bool:
    """Whether two equations are multiples of each other but for something tiny, x = 1/30! and x = 1/31!"""

    def ratio(step: int):
        point = somewhere(gold.free_symbols | answer.free_symbols, step)
        left, right = ((side.lhs - side.rhs).xreplace(point).evalf(DIGITS) for side in (gold, answer))
        return left / right

    first, second = ratio(4), ratio(6)
    return close(first, second, 9) and not close(first, second, DIGITS - 20)


def same_derivatives(gold, answer) -> bool:
    """Whether two things are equal, or equations multiples of each other, where a derivative is a number of its own.

    math-verify finds dy/dx and dx/dy equal: y has no x in it.
    """
    gold, answer = (
        side.replace(lambda part: isinstance(part, Derivative), lambda part: Symbol(str(part)))
        for side in (gold, answer)
    )
    if not isinstance(gold, Equality) or not isinstance(answer, Equality):
        return bool((gold - answer).expand() == 0)
    ratio, symbols = (gold.lhs - gold.rhs) / (answer.lhs - answer.rhs), gold.free_symbols | answer.free_symbols
    ratios = [ratio.xreplace(somewhere(symbols, step)) for step in (4, 6, 7)]
    return all(close(ratios[0], ratio, DIGITS - 20) for ratio in ratios)


def explicit(value, point: dict):
    """An expression, or the entries of one with matrices, with numbers for its variables."""
    value = value.xreplace(point)
    if isinstance(value, (MatrixBase, MatrixExpr)):
        value = value.doit()
        return list(value.as_explicit() if isinstance(value, MatrixExpr) else value)
    return [value]


def doubtful(gold, answer) -> bool:
    """Whether two things that math-verify holds equal differ in value, or have matrices whose values nobody knows."""
    matrices = isinstance(gold, MatrixExpr) or isinstance(answer, MatrixExpr)
    unknown = matrices  # what is said where nobody can tell
    try:
        if gold.has(Sum, Product, Integral, Limit):  # no value can be had soon
            return matrices
        if gold.has(Derivative) or answer.has(Derivative):
            unknown = True
            return not same_derivatives(gold, answer)
        decimals = gold.has(Float) or answer.has(Float)
        if isinstance(gold, Relational) and isinstance(answer, Relational):
            return not decimals and nearly_a_multiple(gold, answer)
        kinds = (Expr, MatrixBase, MatrixExpr)
        if not isinstance(gold, kinds) or not isinstance(answer, kinds):
            return False
        point = somewhere(gold.free_symbols | answer.free_symbols, 4)
        places = 5 if decimals else DIGITS - 20  # a decimal is rounded
        pairs = list(zip(explicit(gold, point), explicit(answer, point), strict=True))
        return not all(close(one, other, places) for one, other in pairs if isinstance(one, Basic))
    except MemoryError:
        raise
    except Exception:  # a sum without a value here, say: math-verify has looked at it as a whole
        return unknown


def equal(golds: list, answers: list) -> bool:
    """What math-verify says, where the values do not speak against it."""
    pairs = ((gold, answer) for gold in golds for answer in answers)
    return any(verify(gold, answer, timeout_seconds=None) and not doubtful(gold, answer) for gold, answer in pairs)


def rounds(exact: list, decimal: str) -> bool:
    """Whether a decimal is the rounding of an exact value to as many places as it has."""
    values = [value for value in exact if isinstance(value, Expr) and value.is_number]
    try:
        places = len(decimal.partition(".")[2])
        return any(2 * abs(value.evalf(40) - Rational(decimal)) <= Rational(1, 10**places) for value in values)
    except (TypeError, ValueError):  # no plain decimal, or no real number
        return False


def whole(text: str, parsed: list) -> list:
    """What was parsed, unless it is a number out of a text that has more in it.

    Of a text that it cannot read as a whole math-verify takes a last number or fraction.
    """
    named = r"\\(?:text|mathrm|begin|end) ?\{[^{}]*\}"
    rest = re.sub(rf"{named}|\\(?!alpha|beta|gamma|delta|theta|lambda|mu|omega)[A-Za-z]+", " ", text)
    written = [abs(Rational(digits)) for digits in re.findall(r"\d+(?:\.\d+)?|\.\d+", rest)]
    variables = re.search(r"[A-Za-df-hj-z]", rest)

    def picked_out(value) -> bool:
        if not isinstance(value, Number):
            return False
        fraction = isinstance(value, Rational) and value.q > 1
        return bool(variables or (len(written) > 2 if fraction else len(written) > 1 and abs(value) in written))

    def cut(value) -> bool:
        return isinstance(value, str) and len(re.findall(r"\w", value)) < len(re.findall(r"\w", text))

    return [value for value in parsed if not picked_out(value) and not cut(value)]


def holds(text: str, gold: list, answer: str, how: str) -> bool:
    """What math-verify says of a gold and an answer.

    Args:
      gold: what `read` made of `text`; nothing where it cannot be read.
      how: equal (in value, too), plain (math-verify's own verdict), rounded (is the answer, a plain decimal, the
        rounding of the gold?) or read (can the gold be read? the answer is ignored).
    """
    if not gold or how == "read":
        return bool(gold)
    if how == "rounded":
        return rounds(gold, answer)
    parsed = read(answer, how == "plain")
    if how == "plain":
        return bool(verify(gold, parsed, timeout_seconds=None))
    return equal(whole(text, gold), whole(answer, parsed))
