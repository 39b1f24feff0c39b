"""Golds that no answer could equal, and golds that look odd and are some."""

import pytest

from cgrpo_jax.grading.golds import hopeless

NONE = [
    "?", "??", "x = ?", "-", "...", "$ $", "nan", "NaN", "(nan, 3)", "inf", "-inf", "\\text{inf}", "proof", "Proof.",
    "\\text{not found}", "N/A", "null", "unknown", "See solution.", "https://example.org/a.png", "www.example.org",
    "[asy] draw((0,0)--(1,1)); [/asy]", "\\includegraphics{a.png}", "### 72", "# 72", "\\frac{1}{2", "x^{2}}", "}{",
    "The angles of the triangle add up to two right angles", "It is five times larger than the other one",
    "We show that n must be even", "Five apples were left.", "the value depends on the initial speed of the car",
    "The answer is 42", "Answer: 42", "The sum is 12", "So x is 5.", "Natalia sold 24 clips in May.", "9" * 5000,
    "The proof does not need the axiom of choice", "\\text{The answer is } 4", "\\", "\\,",
]  # fmt: skip
SOME = [
    "5", "x^2", "There is no such integer n", "there are no real solutions", "n is even", "cannot be determined", "6 is it",
 "\\infty", "-\\infty", "∞", "\\emptyset", "∅", "\\{\\}", "(-inf, 3)", "(-\\infty, 2]", "none", "undefined",
    "\\text{does not exist}", "no solution", "all real numbers", "all real numbers except zero", "Infinity", "infinity",
    "\\text{The midpoints form a regular hexagon}", "Alice, Bob, Carol, Dave, Eve and Mallory", "\\left\\{1, 2\\right\\}",
    "f(x)=\\left\\{ x \\text{ if } x > 0 \\right.", "east", "yes", "12 apples", "Tuesday", "\\text{banana}", "Nancy",
    "$f(x)=a x+b$, where $b$ is an arbitrary integer, and $a$ is an arbitrary positive integer with $\\mho(a)=0$",
    "\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}", "y = 2x + 3", "5!", "72 \\%", "\\#5", "monday",
]  # fmt: skip


@pytest.mark.parametrize("gold", NONE)
def test_no_answer_could_equal(gold):
    assert hopeless(gold)


@pytest.mark.parametrize("gold", SOME)
def test_an_answer_could_equal(gold):
    assert hopeless(gold) is None
