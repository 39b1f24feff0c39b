"""Rows become problems: a question with an answer, a question with options, a text to imitate, TheoremQA.

Options stand in the order of the data; those of GPQA, whose first one is always right, in a seeded order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data.cells import (
    LISTS,
    TRACE,
    RowError,
    is_chat,
    messages_of,
    named_column,
    other_columns,
    required,
    solution_text,
    text_of,
)
from cgrpo_jax.grading.answers import boxed
from cgrpo_jax.grading.choices import LETTERS
from cgrpo_jax.grading.functions import GRADER
from cgrpo_jax.grading.theoremqa import TYPES
from cgrpo_jax.process.calling import FAULTS, one_line
from cgrpo_jax.records import Message, Problem
from cgrpo_jax.text.prompts import INSTRUCTION, TaskPrompt, question_messages

QUESTION_COLUMNS = ("question", "problem", "query", "prompt")
ANSWER_COLUMNS = ("answer", "ground_truth", "final_answer", "target", "solution")
GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
THEOREMQA_COLUMNS = ("question", "answer", "answer_type")
OPTION_COLUMNS = ("options", "choices")
RIGHT_COLUMNS = ("answerKey", "answer_index", "answer_idx", "answer", "label", "ground_truth", "final_answer", "target")
# Options that keep their place when the others are shuffled.
_LAST = re.compile(
    r"\b(?:the|these|those) (?:above|preceding|previous|others?|options|choices|answers)\b(?!-)", re.IGNORECASE
)
_BY_LETTER = re.compile(
    r"\b(?:both|neither|either|only|options?|choices?|answers?|statements?) \(?[A-J]\)?(?![\w'])"
    r"|\(?\b[A-J]\)?,? (?:and|or|nor|&) \(?[A-J]\b|\([A-J]\)"
)


class Parsed(NamedTuple):
    """A row, and which of its columns the question and the answer came from."""

    problem: Problem
    question_column: str
    answer_column: str


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


def _gold(text: str) -> str:
    """A worked solution keeps the answer in a box; GSM8K keeps it behind ####, which is a heading elsewhere."""
    if "\\boxed" in text:
        text = boxed(text) or ""
    elif "####" in text:
        text = text.rsplit("####", 1)[1]
    return text.strip()


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


def asked_by(problem: Problem, task: TaskPrompt) -> Problem:
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


def parse_own_row(row: Mapping[str, Any], cfg: DataConfig, answerless: bool) -> Parsed:
    """As `parse_row`, for a problem that `reward.fn` scores. Raises RowError.

    Args:
      answerless: a row needs no answer, because nobody is shown one; an answer that is no text counts as none.
    """
    if answerless:
        try:
            answer, column = _answer(row, cfg)
            gold = _gold(text_of(answer, column))
        except RowError:
            gold, column = "", ""
        parsed = _asked(row, cfg, gold, column)
    else:
        parsed = parse_row(row, cfg)
    return parsed._replace(problem=scored_by_functions(parsed.problem, row, is_chat(row.get("prompt"))))


def parse_row(row: Mapping[str, Any], cfg: DataConfig) -> Parsed:
    """One row of any supported schema. Raises RowError naming the column.

    The authors' schema has `prompt` (chat turns), `reward_model.ground_truth` and sometimes `reward_model.question`;
    without the latter the bare question is the last user turn less the task instruction. Where a column of its own
    holds options, the question is asked with them and the answer is a letter.
    """
    if options := options_of(row):
        return _asked_with_options(row, cfg, options)
    answer, answer_column = _answer(row, cfg)
    gold = _gold(text_of(answer, answer_column))
    if not gold:
        raise RowError(answer_column, "no final answer in it")
    return _asked(row, cfg, gold, answer_column)


def _question(row: Mapping[str, Any], cfg: DataConfig) -> tuple[str, str, tuple[Message, ...] | None]:
    """The column that asks, its text (of chat turns the last one's), and the chat turns, if it holds any."""
    column = "prompt" if is_chat(row.get("prompt")) else named_column(row, cfg.question_column, QUESTION_COLUMNS)
    if not is_chat(row[column]):
        return column, text_of(row[column], column), None
    messages = messages_of(row[column], column)
    return column, messages[-1]["content"], messages


def _asked(row: Mapping[str, Any], cfg: DataConfig, gold: str, answer_column: str) -> Parsed:
    """The problem of a row without options whose gold answer is known."""
    column = named_column(row, cfg.question_column, QUESTION_COLUMNS)
    asked, question, messages = _question(row, cfg)
    others = _others(row, {column, asked}, answer_column, gold)
    if messages:
        reward_model = row.get("reward_model")
        own = reward_model.get("question") if isinstance(reward_model, Mapping) else None
        own = own or (row[column] if isinstance(row[column], str) else None)
        question = text_of(own or question.removesuffix(INSTRUCTION).strip(), "question")
    grader = "math" if cfg.grader == "auto" else cfg.grader
    problem = Problem(question, gold, messages or question_messages(question), grader, columns=others)
    return Parsed(problem, asked, answer_column)


def parse_target_row(row: Mapping[str, Any], cfg: DataConfig, task: TaskPrompt = question_messages) -> Parsed:
    """A row to imitate: chat turns (`prompt`) or a question, and the text to learn, `answer`, in the column `target`.

    `data.answer_column` names another column for the text. Raises RowError naming the column.
    """
    column = cfg.answer_column or TRACE
    target = solution_text(required(row, column), column)
    asked, question, messages = _question(row, cfg)
    if not messages and (options := options_of(row)):
        question = question_text(question, options.texts)
    return Parsed(Problem(question, target, messages or tuple(task(question)), grader="none"), asked, column)


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


def choice_row(row: Mapping[str, Any], number: int) -> Parsed:
    """A row of MMLU or MMLU-Pro: a list of options and the index of the right one. The order stays."""
    options, right = named_column(row, "", OPTION_COLUMNS), named_column(row, "", RIGHT_COLUMNS)
    cells, index = row[options], row[right]
    if not isinstance(cells, LISTS) or not 2 <= len(cells) <= len(LETTERS):
        raise RowError(options, f"{str(cells)[:60]!r} is no list of 2 to {len(LETTERS)} options")
    texts = [text_of(cell, options) for cell in cells]
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(texts):
        raise RowError(right, f"{index!r} is no index of the {len(texts)} options")
    question, others = text_of(required(row, "question"), "question"), other_columns(row, ("question", options, right))
    return Parsed(choice_problem(question, texts, index, columns=others), "question", right)


def gpqa_row(row: Mapping[str, Any], number: int) -> Parsed:
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


def _asked_with_options(row: Mapping[str, Any], cfg: DataConfig, options: Options) -> Parsed:
    """The problem of a row whose options stand in a column of their own. Chat turns are asked as they are."""
    column = named_column(row, cfg.answer_column, RIGHT_COLUMNS)
    right = _right(row[column], column, options)
    asked, question, messages = _question(row, cfg)
    others = other_columns(row, (asked, options.column, column))
    problem = choice_problem(question, options.texts, right, columns=others)
    if messages:
        problem = dataclasses.replace(problem, question=question, messages=messages)
    grader = problem.grader if cfg.grader == "auto" else cfg.grader
    return Parsed(dataclasses.replace(problem, grader=grader), asked, column)


def theoremqa_row(row: Mapping[str, Any], number: int = 0) -> Parsed:
    """A row of TheoremQA, from the hub (whose columns are capitalised) or a local file: the gold by its type.

    Raises:
      RowError: a missing cell, an unknown type, or an answer that is not of its type.
    """
    row = {name.lower(): value for name, value in row.items()}
    question, answer, kind = (required(row, column) for column in THEOREMQA_COLUMNS)
    question = text_of(question, "question")
    if kind not in TYPES:
        raise RowError("answer_type", f"{kind!r} is none of {', '.join(TYPES)}")
    answer = _typed(answer, kind)
    gold = answer if isinstance(answer, str) else json.dumps(answer)
    if kind == "bool":
        question += "\nAnswer \\boxed{True} or \\boxed{False}."
    entry = {"answer_type": kind, "answer": answer}
    others = other_columns(row, THEOREMQA_COLUMNS)
    problem = Problem(question, gold, question_messages(question), "theoremqa", entry=entry, columns=others)
    return Parsed(problem, "question", "answer")


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
