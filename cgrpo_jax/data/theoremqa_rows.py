"""Rows of TheoremQA become problems: the gold by its type, as the grader reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from cgrpo_jax.data.rows import Parsed, RowError, other_columns, required, text_of
from cgrpo_jax.grading.theoremqa import TYPES
from cgrpo_jax.records import Problem
from cgrpo_jax.text.prompts import question_messages

COLUMNS = ("question", "answer", "answer_type")


def theoremqa(row: Mapping[str, Any], number: int) -> Parsed:
    """A row of the hub or of a local file; the hub's columns are capitalised."""
    lower = {name.lower(): value for name, value in row.items()}
    return Parsed(theoremqa_problem(lower), "question", "answer")


def theoremqa_problem(row: Mapping[str, Any]) -> Problem:
    """A problem from a row (question, answer, answer_type).

    Raises:
      RowError: a missing cell, an unknown type, or an answer that is not of its type.
    """
    question, answer, kind = (required(row, column) for column in COLUMNS)
    question = text_of(question, "question")
    if kind not in TYPES:
        raise RowError("answer_type", f"{kind!r} is none of {', '.join(TYPES)}")
    answer = _typed(answer, kind)
    gold = answer if isinstance(answer, str) else json.dumps(answer)
    if kind == "bool":
        question += "\nAnswer \\boxed{True} or \\boxed{False}."
    entry = {"answer_type": kind, "answer": answer}
    others = other_columns(row, COLUMNS)
    return Problem(question, gold, question_messages(question), "theoremqa", entry=entry, columns=others)


def _typed(answer: Any, kind: str) -> Any:
    """The answer by its type; the hub spells each as text."""
    typed = answer
    if isinstance(answer, str) and kind != "option":
        try:
            typed = {"True": True, "False": False}.get(answer) if kind == "bool" else json.loads(answer)
        except json.JSONDecodeError:
            typed = None
    if not _is_of_type(typed, kind):
        raise RowError("answer", f"{answer!r} is no {kind}")
    return typed


def _is_of_type(answer: Any, kind: str) -> bool:
    if kind.startswith("list of "):
        return isinstance(answer, list) and all(_is_of_type(part, kind.removeprefix("list of ")) for part in answer)
    if kind in ("bool", "option"):
        return isinstance(answer, bool if kind == "bool" else str)
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    return whole or (kind == "float" and isinstance(answer, float) and math.isfinite(answer))
