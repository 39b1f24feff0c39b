"""Rows to imitate: a prompt and the text to learn, from the data's own column or from a file that was generated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data.checking import Log, prompt_fault, report_bad_rows, sift
from cgrpo_jax.data.choice_rows import options_of, question_text
from cgrpo_jax.data.rows import (
    QUESTION_COLUMNS,
    TRACE,
    Parsed,
    is_chat,
    messages_of,
    named_column,
    required,
    solution_text,
    text_of,
)
from cgrpo_jax.data.sources import Problems, open_rows, say_large
from cgrpo_jax.records import Problem
from cgrpo_jax.text.prompts import Task, question_messages


def parse_target_row(row: Mapping[str, Any], cfg: DataConfig, task: Task = question_messages) -> Parsed:
    """A row whose prompt is chat turns (`prompt`) or a question, and whose text stands in `target`.

    `data.answer_column` names another column for the text. Raises RowError naming the column.
    """
    column = cfg.answer_column or TRACE
    target = solution_text(required(row, column), column)
    asked = named_column(row, cfg.question_column, QUESTION_COLUMNS)
    asked = "prompt" if is_chat(row.get("prompt")) else asked
    if is_chat(row[asked]):
        messages = messages_of(row[asked], asked)
        question = messages[-1]["content"]
    else:
        question, options = text_of(row[asked], asked), options_of(row)
        question = question_text(question, options.texts) if options else question
        messages = tuple(task(question))
    return Parsed(Problem(question, target, messages, grader="none"), asked, column)


def load_targets(
    cfg: DataConfig,
    most: int,
    prompt_tokens: Callable[[Problem], int],
    target_tokens: Callable[[Problem], int],
    log: Log = print,
    task: Task = question_messages,
) -> Problems:
    """Opens a source and checks all of it; the text to learn is the `answer` of each.

    Args:
      most: tokens of a text, with its end.
      task: the task prompt of a bare question.
      prompt_tokens, target_tokens: lengths; raise PromptError for text that cannot be encoded safely.

    Raises:
      DataError: no such source, or bad rows (each with file, row and column) and `on_bad_row` is "error".
    """
    of_prompt = functools.partial(prompt_fault, prompt_tokens=prompt_tokens, most=cfg.max_prompt_tokens)

    def fault(problem: Problem) -> str | None:
        length = target_tokens(problem)
        over = f"its text to learn has {length} tokens with its end, sampling.max_new_tokens is {most}"
        return of_prompt(problem) or (over if length > most else None)

    def parse(row: Mapping[str, Any], number: int) -> Parsed:
        return parse_target_row(row, cfg, task)

    say_large(cfg.source, log)
    good, bad = sift(open_rows(cfg), parse, fault, None, log)
    report_bad_rows(bad, len(good), cfg, log)
    kept = [parsed.problem for _, parsed in good]
    return Problems(kept.__getitem__, len(kept))
