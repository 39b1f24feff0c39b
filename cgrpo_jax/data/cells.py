"""Cells of a row: text, chat turns and worked solutions; a bad cell is an error that names its column."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cgrpo_jax.records import Message, Problem

TRACE = "target"  # the column of a stronger model's solutions
SOLUTION_COLUMNS = ("solution", TRACE, "answer")  # of a worked solution, in the order in which they are looked for
NAMED = 12  # columns in a message
ROLES = ("system", "user", "assistant")
LISTS = (list, tuple, np.ndarray)


class RowError(ValueError):
    """One bad cell."""

    def __init__(self, column: str, message: str):
        super().__init__(f"column {column!r}: {message}")


def _missing(row: Mapping[str, Any], column: str) -> RowError:
    """Names the columns that are there."""
    names = [str(name) for name, value in row.items() if value is not None]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return RowError(column, f"missing; there: {', '.join(names[:NAMED]) or 'none'}{more}")


def required(row: Mapping[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise _missing(row, column)
    return row[column]


def plain(value: np.generic) -> Any:
    """A scalar of numpy as Python has it; of a short float the shortest decimal, 0.1 and not 0.10000000149."""
    short = isinstance(value, np.floating) and value.dtype.itemsize < 8
    return float(str(value)) if short else value.item()


def text_of(value: Any, column: str) -> str:
    """Text, or a number as text, also as the one element of a list.

    It is neither empty nor NaN nor infinite (so a table may write a missing number), nor is it half a character.
    """
    if isinstance(value, LISTS) and len(value) == 1:
        value = value[0]
    value = plain(value) if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(column, f"text or a number is needed, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(column, f"{value} is no number")
    if not str(value).strip():
        raise RowError(column, "empty")
    return _whole_characters(str(value), column)


def _whole_characters(text: str, column: str) -> str:
    """The text itself. Raises RowError where it has no form in UTF-8, which every tokenizer needs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"byte {code - 0xDC00:#04x} is no UTF-8" if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"
        raise RowError(column, f"{what} (character {error.start + 1})") from None
    return text


def _json_like(value: Any) -> Any:
    """A cell in the types of JSON; dates and decimals as text. Raises TypeError for what has no such form."""
    if isinstance(value, Mapping):
        return {str(key): _json_like(part) for key, part in value.items()}
    if isinstance(value, LISTS):
        return [_json_like(part) for part in value]
    if isinstance(value, np.generic):
        return _json_like(plain(value))
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)):
        return str(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def other_columns(row: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    """The row's columns that made neither question nor answer; without those that JSON cannot hold, as images."""
    columns = {}
    for name, value in row.items():
        if name not in used:
            try:
                columns[name] = _json_like(value)
            except TypeError:
                continue
            except RecursionError:
                raise RowError(name, "too many lists within lists") from None
    return columns


def messages_of(value: Any, column: str) -> tuple[Message, ...]:
    turns = list(value)
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            raise RowError(column, f"a chat turn needs a 'role' of {', '.join(ROLES)}")
        if not isinstance(turn.get("content"), str):
            raise RowError(column, "a chat turn needs text as its 'content'")
        _whole_characters(turn["content"], column)
    if not turns or turns[-1]["role"] != "user":
        raise RowError(column, "the last chat turn must be the user's")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def named_column(row: Mapping[str, Any], named: str, usual: Sequence[str]) -> str:
    """The column of that name, else the first of the usual names; those may be spelt `Question` or `ANSWER`, too."""
    for column in (named,) if named else usual:
        if row.get(column) is not None:
            return column
    if not named:
        spelt = {str(name).lower(): name for name, value in row.items() if value is not None}
        for column in usual:
            if column in spelt:
                return spelt[column]
    raise _missing(row, named or "/".join(usual))


def is_chat(value: Any) -> bool:
    """Whether a cell holds turns. A list of one text is that text."""
    return isinstance(value, LISTS) and not (len(value) == 1 and isinstance(value[0], str))


def trace_of(problem: Problem) -> str:
    """The stronger model's solution that the data hold. Raises RowError."""
    return solution_text(problem.columns.get(TRACE), TRACE)


class Worked(NamedTuple):
    """A worked solution of the data, and the column that it stands in."""

    column: str
    text: str


def worked_solution(problem: Problem) -> Worked | None:
    """What a critic may be shown as the solution; None where the data hold none, or the bare answer."""
    spelt = {name.lower(): name for name in problem.columns}
    for column in [spelt[name] for name in SOLUTION_COLUMNS if name in spelt]:
        try:
            text = solution_text(problem.columns[column], column)
        except RowError:
            continue
        if text.strip() != problem.answer:
            return Worked(column, text)
    return None


def solution_text(value: Any, column: str) -> str:
    """A text that may be learnt: text, or the assistant's turn of a chat. Raises RowError."""
    if isinstance(value, LISTS) and is_chat(value):
        turns = [turn for turn in value if isinstance(turn, Mapping) and turn.get("role", "assistant") == "assistant"]
        value = turns[-1].get("content") if turns else None
    if value is None:
        raise RowError(column, "no solution in it (what is the answer's column cannot be this one: data.answer_column)")
    return text_of(value, column)
