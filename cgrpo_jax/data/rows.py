"""One row of any supported schema becomes a problem, or an error that names its column."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.grading.answers import boxed
from cgrpo_jax.grading.functions import GRADER
from cgrpo_jax.process.calling import FAULTS, one_line
from cgrpo_jax.records import Message, Problem
from cgrpo_jax.text.prompts import INSTRUCTION, Task, question_messages

QUESTION_COLUMNS = ("question", "problem", "query", "prompt")
ANSWER_COLUMNS = ("answer", "ground_truth", "final_answer", "target", "solution")
TRACE = "target"  # the column of a stronger model's solutions
SOLUTION_COLUMNS = ("solution", TRACE, "answer")  # of a worked solution, in the order in which they are looked for
NAMED = 12  # columns in a message
ROLES = ("system", "user", "assistant")
LISTS = (list, tuple, np.ndarray)


class RowError(ValueError):
    """One bad cell."""

    def __init__(self, column: str, message: str):
        super().__init__(f"column {column!r}: {message}")


class Parsed(NamedTuple):
    """A row, and which of its columns the question and the answer came from."""

    problem: Problem
    question_column: str
    answer_column: str


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


def column_mends(row: Mapping[str, Any], cfg: DataConfig) -> list[str]:
    """Options that name a column for what a row has under no usual name: the first one asks, the last one answers."""
    there = [str(name) for name, value in row.items() if value is not None]
    wanted: list[tuple[str, str, Sequence[str], int]] = [("question_column", cfg.question_column, QUESTION_COLUMNS, 0)]
    if not isinstance(row.get("reward_model"), Mapping):
        wanted.append(("answer_column", cfg.answer_column, ANSWER_COLUMNS, -1))
    mends = []
    for option, named, usual, place in wanted:
        try:
            named_column(row, named, usual)
        except RowError:
            mends += [f"--config.data.{option}={there[place]}"] if there else []
    return mends


def is_chat(value: Any) -> bool:
    """Whether a cell holds turns. A list of one text is that text."""
    return isinstance(value, LISTS) and not (len(value) == 1 and isinstance(value[0], str))


def _gold(text: str) -> str:
    """A worked solution keeps the answer in a box; GSM8K keeps it behind ####, which is a heading elsewhere."""
    if "\\boxed" in text:
        text = boxed(text) or ""
    elif "####" in text:
        text = text.rsplit("####", 1)[1]
    return text.strip()


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


def _answer(row: Mapping[str, Any], cfg: DataConfig) -> tuple[Any, str]:
    """The cell with the answer, and its column."""
    reward_model = row.get("reward_model")
    if isinstance(reward_model, Mapping) and reward_model.get("ground_truth") is not None and not cfg.answer_column:
        return reward_model["ground_truth"], "reward_model.ground_truth"
    column = named_column(row, cfg.answer_column, ANSWER_COLUMNS)
    return row[column], column


def _others(row: Mapping[str, Any], question_columns: Collection[str], answer_column: str, gold: str) -> dict[str, Any]:
    """As `other_columns`, and of `reward_model` what it holds beside question and answer.

    The answer's column stays where it holds more than the answer: a worked solution, whose box or #### has the gold.
    """
    cell = row.get(answer_column)
    worked = isinstance(cell, str) and cell.strip() != gold
    columns = other_columns(row, {*question_columns} if worked else {*question_columns, answer_column})
    if answer_column == "reward_model.ground_truth":
        columns["reward_model"] = other_columns(row["reward_model"], ("question", "ground_truth"))
    return columns


def asked_by(problem: Problem, task: Task) -> Problem:
    """The problem under another task prompt than the paper's; a row's own chat turns stay. Raises RowError."""
    if task is question_messages or problem.messages != question_messages(problem.question):
        return problem
    try:
        return dataclasses.replace(problem, messages=tuple(task(problem.question)))
    except FAULTS as error:  # of somebody's function
        raise RowError("question", f"texts.task: {one_line(error)}") from error


def scored_by_functions(problem: Problem, row: Mapping[str, Any], chat: bool = False) -> Problem:
    """The problem as `reward.fn` is given it: with all columns of its row. Raises RowError."""
    return dataclasses.replace(problem, grader=GRADER, row=other_columns(row, ()), chat=chat)


def _own_gold(row: Mapping[str, Any], cfg: DataConfig) -> tuple[str, str]:
    """The gold answer and its column; both "" where the row has none, or none that is text."""
    try:
        answer, column = _answer(row, cfg)
        return _gold(text_of(answer, column)), column
    except RowError:
        return "", ""


def parse_own_row(
    row: Mapping[str, Any],
    cfg: DataConfig,
    answerless: bool,
    parse: Callable[[Mapping[str, Any], DataConfig], Parsed],
) -> Parsed:
    """As `parse`, of a problem that `reward.fn` scores.

    Args:
      answerless: a row needs no answer, for nobody is shown one.
    """
    if not answerless:
        parsed = parse(row, cfg)
    else:
        gold, column = _own_gold(row, cfg)
        parsed = _asked(row, cfg, gold, column)
    return parsed._replace(problem=scored_by_functions(parsed.problem, row, is_chat(row.get("prompt"))))


def parse_row(row: Mapping[str, Any], cfg: DataConfig) -> Parsed:
    """One row of any supported schema. Raises RowError naming the column.

    The authors' schema has `prompt` (chat turns), `reward_model.ground_truth` and sometimes `reward_model.question`;
    without the latter the bare question is the last user turn less the task instruction.
    """
    answer, answer_column = _answer(row, cfg)
    gold = _gold(text_of(answer, answer_column))
    if not gold:
        raise RowError(answer_column, "no final answer in it")
    return _asked(row, cfg, gold, answer_column)


def _asked(row: Mapping[str, Any], cfg: DataConfig, gold: str, answer_column: str) -> Parsed:
    """The problem of a row whose gold answer is known."""
    grader = "math" if cfg.grader == "auto" else cfg.grader
    column = named_column(row, cfg.question_column, QUESTION_COLUMNS)
    turns_column = "prompt" if is_chat(row.get("prompt")) else column
    others = _others(row, {column, turns_column}, answer_column, gold)
    if not is_chat(row[turns_column]):
        question = text_of(row[column], column)
        problem = Problem(question, gold, question_messages(question), grader, columns=others)
        return Parsed(problem, column, answer_column)
    messages = messages_of(row[turns_column], turns_column)
    reward_model = row.get("reward_model")
    own = reward_model.get("question") if isinstance(reward_model, Mapping) else None
    own = own or (row[column] if isinstance(row[column], str) else None)
    question = text_of(own or messages[-1]["content"].removesuffix(INSTRUCTION).strip(), "question")
    return Parsed(Problem(question, gold, messages, grader, columns=others), turns_column, answer_column)
