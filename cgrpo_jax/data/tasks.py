"""Evaluation tasks: where the rows of each are, and how a row becomes a problem. A new one is a short record."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data.cells import RowError
from cgrpo_jax.data.checking import Fault, Log, Numbered, Parsable, Parse, checked_rows
from cgrpo_jax.data.files import local_file
from cgrpo_jax.data.rows import Parsed, asked_by, choice_row, gpqa_row, parse_row, theoremqa_row
from cgrpo_jax.data.sources import open_rows
from cgrpo_jax.errors import DataError
from cgrpo_jax.process.calling import FAULTS, function_of, one_line
from cgrpo_jax.records import Problem
from cgrpo_jax.text.prompts import TaskPrompt, question_messages

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function


@dataclasses.dataclass(frozen=True)
class Task:
    """A public test set. Columns named "" are looked for under the usual names."""

    source: str = ""  # hub id[:config]; "": only from a local file
    split: str = "test"
    revision: str = "main"  # of the hub id
    question: str = ""
    answer: str = ""
    tag: str = ""  # of its rows in the authors' validation file (column data_source); "": it has none there
    parse: Parse | None = None  # of rows with another shape
    sample: int = 0  # so many rows, drawn with a fixed seed; 0: all


# Revisions are those of the hub's main branch unless a commit is given as NAME@REVISION.
TASKS: dict[str, Task] = {
    "math500": Task("HuggingFaceH4/MATH-500", question="problem", answer="answer", tag="math"),
    "minerva_math": Task("math-ai/minervamath", question="question", answer="answer", tag="minerva"),
    "olympiadbench": Task("math-ai/olympiadbench", question="question", answer="final_answer", tag="olympiad_bench"),
    "amc23": Task("math-ai/amc23", question="question", answer="answer", tag="amc"),
    "aime24": Task("HuggingFaceH4/aime_2024", "train", question="problem", answer="answer", tag="aime"),
    "aime25": Task("math-ai/aime25", question="problem", answer="answer"),
    "theoremqa": Task("TIGER-Lab/TheoremQA", parse=theoremqa_row),
    "gpqa_diamond": Task("Idavidrein/gpqa:gpqa_diamond", "train", parse=gpqa_row),
    "mmlu_pro": Task("TIGER-Lab/MMLU-Pro", parse=choice_row),
    "mmlu_stem": Task("TIGER-Lab/MMLU-STEM", parse=choice_row),
    "gsm8k": Task("openai/gsm8k:main", question="question", answer="answer"),
    "validation": Task(),  # the authors' 2,019 rows
    "validation500": Task(sample=500),
}


class NamedProblem(NamedTuple):
    """A problem with the name it has in its task: the number of its row."""

    id: str
    problem: Problem


def parse_names(names: str) -> list[tuple[str, str]]:
    """`"gsm8k,aime24=my.jsonl,math500@COMMIT"` -> [(name, path or "@revision" or "")].

    Any name may have a file, or a function that yields its rows: `mine=package.module:function`.
    """
    found = []
    for item in filter(None, (part.strip() for part in names.split(","))):
        name, equals, path = item.partition("=")
        name, at, revision = (name, "", "") if equals else name.partition("@")
        if equals and not path:
            raise DataError(f"eval.tasks: {item!r} names no file")
        if not equals and name not in TASKS:
            raise DataError(
                f"eval.tasks: no task {name!r}; known: {', '.join(TASKS)}; or NAME=FILE, NAME=package.module:function"
            )
        if not equals and not TASKS[name].source:
            raise DataError(f"eval.tasks: {name} is read from a local file: {name}=FILE")
        found.append((name, path if equals else at + revision))
    if len({name for name, _ in found}) != len(found):
        raise DataError(f"eval.tasks = {names!r} names a task twice")
    return found


def _own_rows(name: str, path: str) -> list[tuple[int, Mapping[str, Any]]]:
    """Numbered rows of somebody's function. Raises DataError, in a line, where there are none."""
    try:
        rows = list(function_of(path)())
        if not rows or not all(isinstance(row, Mapping) for row in rows):
            raise TypeError("rows are needed, as {'question': ..., 'answer': ...}")
    except FAULTS as error:  # of somebody's function
        raise DataError(f"eval.tasks: {name}={path}: {one_line(error)}") from error
    return list(enumerate(rows, 1))


def load_task(
    name: str,
    where: str,
    limit: int,
    cfg: DataConfig,
    fault: Fault,
    log: Log,
    parsable: Parsable | None = None,
    task_prompt: TaskPrompt = question_messages,
) -> list[NamedProblem]:
    """The first `limit` problems of a task (0: all).

    Args:
      where: of `parse_names`.
      cfg: for `on_bad_row` and `grader`.
      fault: what is wrong with a problem, if anything.
      parsable: which golds the verifier can read, as in training; what it says is kept on disk. None: not asked.
      task_prompt: as in training, see `asked_by`.

    Raises:
      DataError: the source cannot be read, or bad rows and `on_bad_row` is "error".
    """
    task = TASKS.get(name, Task())
    local = bool(where) and not where.startswith("@")
    source = DataConfig(
        source=where if local else task.source,
        split=task.split,
        revision=where[1:] or task.revision if not local else task.revision,
        question_column=task.question,
        answer_column=task.answer,
        on_bad_row=cfg.on_bad_row,
        grader=cfg.grader,
        max_prompt_tokens=cfg.max_prompt_tokens,
    )
    own = local and FUNCTION.fullmatch(where) and local_file(where) is None
    opened = _own_rows(name, where) if own else open_rows(source, log)
    rows, sources_of = _of_task(name, where, opened), _sources(opened)
    if task.sample and task.sample < len(rows):
        chosen = np.random.default_rng(0).choice(len(rows), task.sample, replace=False)
        rows = [rows[i] for i in sorted(chosen)]

    def parse(row: Mapping[str, Any], number: int) -> Parsed:
        parsed = task.parse(row, number) if task.parse else parse_row(_joined(row), _columns(row, source))
        problem = asked_by(graded_by(parsed.problem, source.grader), task_prompt)
        if len(sources_of) > 1 and not task.source:  # each source has its accuracy
            problem = dataclasses.replace(problem, tag=_source(row))
        return parsed._replace(problem=problem)

    good = checked_rows(itertools.islice(rows, limit or None), parse, fault, parsable, source, log)
    return [NamedProblem(str(number), parsed.problem) for number, parsed in good]


def graded_by(problem: Problem, grader: str) -> Problem:
    """With data.grader=math_verify TheoremQA is graded as mathematics are, without its own types and tolerance of 4 %.

    Choices stay with the grader of choices: the release has none for them.
    """
    if problem.grader != "theoremqa" or problem.entry is None or grader == "auto":
        return problem
    return dataclasses.replace(problem, grader=grader, answer=str(problem.entry["answer"]))  # True, not true


def _source(row: Mapping[str, Any] | RowError) -> str:
    """What a row says of where it is from; "" for nothing."""
    value = "" if isinstance(row, RowError) else row.get("data_source")
    return value if isinstance(value, str) else ""


def _sources(rows: Sequence[Numbered]) -> list[str]:
    return sorted({_source(row) for _, row in rows} - {""})


def _of_task(name: str, where: str, rows: Sequence[Numbered]) -> Sequence[Numbered]:
    """Of a file that holds several tasks, the rows of this one. Raises DataError where it has none of them."""
    task, found = TASKS.get(name, Task()), _sources(rows)
    if not task.source or len(found) < 2:  # any file of its own, or a file of one set
        return rows
    if not task.tag or task.tag not in found:
        raise DataError(
            f"eval.tasks: {name}={where}: its rows are of {', '.join(found)} (column data_source), and none of {name}; "
            f"another name before the = evaluates them all, as in mine={where}"
        )
    return [(number, row) for number, row in rows if isinstance(row, RowError) or _source(row) == task.tag]


def _joined(row: Mapping[str, Any]) -> dict[str, Any]:
    """OlympiadBench lists its final answers: several are one answer, with commas."""
    final = row.get("final_answer")
    return {**row, "final_answer": ", ".join(map(str, final))} if isinstance(final, list) else dict(row)


def _columns(row: Mapping[str, Any], cfg: DataConfig) -> DataConfig:
    """A task's own columns where the row has them, else the usual names (a local file may spell them otherwise)."""
    own = [column if row.get(column) is not None else "" for column in (cfg.question_column, cfg.answer_column)]
    return dataclasses.replace(cfg, question_column=own[0], answer_column=own[1])
