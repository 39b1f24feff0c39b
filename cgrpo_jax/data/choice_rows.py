"""Rows with options become problems: the options behind letters, the answer a letter.

They stand in the order of the data; those of GPQA, whose first one is always right, in a seeded one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data.rows import (
    LISTS,
    QUESTION_COLUMNS,
    Parsed,
    RowError,
    is_chat,
    messages_of,
    named_column,
    other_columns,
    parse_row,
    required,
    text_of,
)
from cgrpo_jax.grading.choices import LETTERS
from cgrpo_jax.records import Problem
from cgrpo_jax.text.prompts import question_messages

GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


OPTION_COLUMNS = ("options", "choices")
RIGHT_COLUMNS = ("answerKey", "answer_index", "answer_idx", "answer", "label", "ground_truth", "final_answer", "target")
_LAST = re.compile(
    r"\b(?:the|these|those) (?:above|preceding|previous|others?|options|choices|answers)\b(?!-)", re.IGNORECASE
)
_BY_LETTER = re.compile(
    r"\b(?:both|neither|either|only|options?|choices?|answers?|statements?) \(?[A-J]\)?(?![\w'])"
    r"|\(?\b[A-J]\)?,? (?:and|or|nor|&) \(?[A-J]\b|\([A-J]\)"
)


def order(options: Sequence[str], seed: str) -> list[int]:
    """A permutation of options that depends on the seed string alone: sorted by SHA-256 of seed and index.

    "All of the above" stays last, and options that name others by their letters stay all where they are.
    """

    def digest(index: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{index}".encode("utf-8", "replace")).digest()

    if any(_BY_LETTER.search(option) for option in options):
        return list(range(len(options)))
    last = [i for i, option in enumerate(options) if _LAST.search(option)]
    return sorted(set(range(len(options))) - set(last), key=digest) + last


def question_text(question: str, options: Sequence[str]) -> str:
    """The question with its options, each on its own line behind its letter."""
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.rstrip(), *lines, "Answer with the letter of the right option."])


def choice_problem(
    question: str, options: Sequence[str], right: int, seed: str | None = None, columns: Mapping[str, Any] | None = None
) -> Problem:
    """A problem from options and the index of the right one; the order follows from the seed, if there is one.

    Raises:
      ValueError: fewer than 2 or more than 26 options, or no such option.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{len(options)} options; 2 to {len(LETTERS)} are possible")
    if not 0 <= right < len(options):
        raise ValueError(f"the right option is number {right} of {len(options)}")
    shown = list(range(len(options))) if seed is None else order(options, seed)
    text = question_text(question, [options[i] for i in shown])
    return Problem(
        question=text,
        answer=LETTERS[shown.index(right)],
        messages=question_messages(text),
        grader="choice",
        entry={"options": [options[i] for i in shown], "order": shown},
        columns=columns or {},
    )


def choices(question: str, options: str, right: str) -> Callable[[Mapping[str, Any], int], Parsed]:
    """The parser of rows with a list of options and the index of the right one; columns by name. The order stays."""

    def parse(row: Mapping[str, Any], number: int) -> Parsed:
        cells, index = required(row, options), required(row, right)
        if not isinstance(cells, LISTS) or not 2 <= len(cells) <= len(LETTERS):
            raise RowError(options, f"{str(cells)[:60]!r} is no list of 2 to {len(LETTERS)} options")
        texts = [text_of(cell, options) for cell in cells]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(texts):
            raise RowError(right, f"{index!r} is no index of the {len(texts)} options")
        asked = text_of(required(row, question), question)
        others = other_columns(row, (question, options, right))
        return Parsed(choice_problem(asked, texts, index, columns=others), question, right)

    return parse


def gpqa(row: Mapping[str, Any], number: int) -> Parsed:
    """A row of GPQA: each option in a column of its own, the right one in the first."""
    texts = [text_of(required(row, column), column).strip() for column in GPQA_OPTIONS]
    question = text_of(required(row, "Question"), "Question").strip()
    others = other_columns(row, ("Question", *GPQA_OPTIONS))
    return Parsed(choice_problem(question, texts, 0, str(number), others), "Question", GPQA_OPTIONS[0])


class Options(NamedTuple):
    """Options that stand in a column of their own."""

    column: str
    texts: list[str]
    labels: list[str]
    numbers: bool  # they are numbers and no texts


def options_of(row: Mapping[str, Any]) -> Options | None:
    """Those of a row: a list, as MMLU has it; {"text": [...], "label": [...]}, as ARC; {"A": ..., "B": ...}.

    None for a row without any. Raises RowError.
    """
    for column in OPTION_COLUMNS:
        cell, labels = row.get(column), list(LETTERS)
        if isinstance(cell, Mapping) and isinstance(cell.get("text"), LISTS):
            labels = [text_of(label, column) for label in cell.get("label") or LETTERS]
            cell = cell["text"]
        elif isinstance(cell, Mapping):
            filled = {str(label): text for label, text in cell.items() if text is not None}
            labels, cell = list(filled), list(filled.values())
        if isinstance(cell, LISTS) and len(cell) > 1:
            if len(cell) > len(LETTERS) or len(labels) < len(cell):
                raise RowError(column, f"{len(cell)} options; 2 to {len(LETTERS)} are possible, each with its label")
            numbers = not any(isinstance(part, str) for part in cell)
            return Options(column, [text_of(part, column) for part in cell], labels[: len(cell)], numbers)
    return None


def _right(answer: Any, column: str, options: Options) -> int:
    """The index of the right option, from its label, its number from 0, or its text. Raises RowError."""
    named = text_of(answer, column).strip()
    as_number = isinstance(answer, int) and not options.numbers and named not in options.labels
    if as_number and 0 <= answer < len(options.texts):
        return answer
    for known, said in ((options.labels, named.strip("(). ")), (options.texts, named)):
        places = [i for i, one in enumerate(known) if one.strip().casefold() == said.casefold()]
        if len(places) == 1:
            return places[0]
    count = len(options.texts)
    raise RowError(column, f"{named[:60]!r} names none of the {count} options in {options.column!r}")


def parse_any_row(row: Mapping[str, Any], cfg: DataConfig) -> Parsed:
    """As `parse_row`; a row whose options stand in a column of their own is asked with them. Raises RowError."""
    options = options_of(row)
    if options is None:
        return parse_row(row, cfg)
    column = named_column(row, cfg.answer_column, RIGHT_COLUMNS)
    right = _right(row[column], column, options)
    asked = "prompt" if is_chat(row.get("prompt")) else named_column(row, cfg.question_column, QUESTION_COLUMNS)
    others = other_columns(row, (asked, options.column, column))
    if is_chat(row[asked]):  # its turns are asked as they are
        messages = messages_of(row[asked], asked)
        problem = choice_problem(messages[-1]["content"], options.texts, right, columns=others)
        problem = dataclasses.replace(problem, question=messages[-1]["content"], messages=messages)
    else:
        problem = choice_problem(text_of(row[asked], asked), options.texts, right, columns=others)
    grader = problem.grader if cfg.grader == "auto" else cfg.grader
    return Parsed(dataclasses.replace(problem, grader=grader), asked, column)
