"""Finding the answer in a response."""

import time

import pytest

from cgrpo_jax.grading.answers import extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{ {a} {b{c}} }", "{a} {b{c}}"),
        (r"\boxed 7$ more", "7"),
        (r"\boxed{never closes", None),
        (r"\boxed{3} but then \boxed{4", None),
        (r"\boxed{}", None),
        ("The answer is 42.", "42"),
        ("So, the answer is: 9.72 meters.\n\nThat is all.", "9.72 meters"),
        ("The final answer is:\n\n$\\frac12$\n", r"\frac12"),
        ("**Answer:** 5", "5"),
        ("The answer is **-7**", "-7"),
        ("The final answer is 7e37. I hope it is correct.", "7e37"),
        ("The answer is 3.5. So 4 friends share it.", "3.5"),
        ("The answer is", None),
        ("the final answer is $x+1$. I hope it is correct.\nbye", "x+1"),
        (r"\boxed{2}. The final answer is $3$. I hope it is correct.", "3"),
        ("first 3, then 1,234", "1,234"),
        ("it costs -3.5 dollars", "-3.5"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


def test_work_is_linear_and_long_answers_are_none():
    began = time.perf_counter()
    assert extract_answer("\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}") is None
    assert extract_answer("\\boxed{" * 100_000) is None
    for text in ("answer is $x$ " + "a" * 1900 + "1", "answer is 5" + " ab" * 600 + "1", "answer is " * 100_000):
        extract_answer(text)
    (
        extract_answer("\\boxed{1}, " * 100_000),
        extract_answer("</think>" * 100_000),
        extract_answer("answer is 5, " * 100_000),
    )
    assert extract_answer("1" * 1_000_000) == "1" * 2_000  # the tail that is looked at
    assert extract_answer("\\boxed{" + "9" * 3000 + "}") is None
    assert time.perf_counter() - began < 5
