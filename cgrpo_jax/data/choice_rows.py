"""Rows with options become problems: the options in a seeded order behind letters, the answer a letter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cgrpo_jax.data.rows import LISTS, Parsed, RowError, other_columns, required, text_of
from cgrpo_jax.grading.choices import LETTERS
from cgrpo_jax.records import Problem
from cgrpo_jax.text.prompts import question_messages

GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def order(count: int, seed: str) -> list[int]:
    """A permutation of `count` options that depends on the seed string alone: sorted by SHA-256 of seed and index."""

    def digest(index: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{index}".encode("utf-8", "replace")).digest()

    return sorted(range(count), key=digest)


def question_text(question: str, options: Sequence[str]) -> str:
    """The question with its options, each on its own line behind its letter."""
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.rstrip(), *lines, "Answer with the letter of the right option."])


def choice_problem(
    question: str, options: Sequence[str], right: int, seed: str, columns: Mapping[str, Any] | None = None
) -> Problem:
    """A problem from options and the index of the right one; the order follows from the seed.

    Raises:
      ValueError: fewer than 2 or more than 26 options, or no such option.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{len(options)} options; 2 to {len(LETTERS)} are possible")
    if not 0 <= right < len(options):
        raise ValueError(f"the right option is number {right} of {len(options)}")
    shown = order(len(options), seed)
    text = question_text(question, [options[i] for i in shown])
    return Problem(
        question=text,
        answer=LETTERS[shown.index(right)],
        messages=question_messages(text),
        grader="choice",
        entry={"options": [options[i] for i in shown], "order": shown, "seed": seed},
        columns=columns or {},
    )


def choices(question: str, options: str, right: str) -> Callable[[Mapping[str, Any], int], Parsed]:
    """The parser of rows with a list of options and the index of the right one; columns by name."""

    def parse(row: Mapping[str, Any], number: int) -> Parsed:
        cells, index = required(row, options), required(row, right)
        if not isinstance(cells, LISTS) or not 2 <= len(cells) <= len(LETTERS):
            raise RowError(options, f"{str(cells)[:60]!r} is no list of 2 to {len(LETTERS)} options")
        texts = [text_of(cell, options) for cell in cells]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(texts):
            raise RowError(right, f"{index!r} is no index of the {len(texts)} options")
        asked = text_of(required(row, question), question)
        others = other_columns(row, (question, options, right))
        return Parsed(choice_problem(asked, texts, index, str(number), others), question, right)

    return parse


def gpqa(row: Mapping[str, Any], number: int) -> Parsed:
    """A row of GPQA: each option in a column of its own, the right one in the first."""
    texts = [text_of(required(row, column), column).strip() for column in GPQA_OPTIONS]
    question = text_of(required(row, "Question"), "Question").strip()
    others = other_columns(row, ("Question", *GPQA_OPTIONS))
    return Parsed(choice_problem(question, texts, 0, str(number), others), "Question", GPQA_OPTIONS[0])
