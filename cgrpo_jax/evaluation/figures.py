"""The figures of a task, from its graded answers, and the file that holds each verdict."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cgrpo_jax.data.tasks import Named
from cgrpo_jax.evaluation.identity import problem_digest
from cgrpo_jax.evaluation.intervals import cluster_problems, summarise
from cgrpo_jax.evaluation.sample import accuracies
from cgrpo_jax.grading import rewards
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.records import Attempt
from cgrpo_jax.workdir.places import writing


def write_grades(path: pathlib.Path, task: Sequence[Named], attempts_PG: Sequence[Sequence[Attempt]]) -> None:
    """One line an answer: what was found in the text, and the verdict."""
    with writing(path), path.open("w", encoding="utf-8") as file:
        for named, row in zip(task, attempts_PG, strict=True):
            for g, attempt in enumerate(row):
                record = {
                    "id": named.id, "sample": g, "gold": named.problem.answer, "answer": attempt.extracted,
                    "correct": attempt.correct, "status": attempt.status, "question": named.problem.question,
                    "text": attempt.text, "tokens": len(attempt.completion.ids),
                    "finished": attempt.completion.finished,
                }  # fmt: skip
                file.write(json.dumps(record) + "\n")


def entry(
    task: Sequence[Named], attempts_PG: Sequence[Sequence[Attempt]], verifier: Verifier, seed: int
) -> dict[str, Any]:
    """A task's figures for `results.json`; answers vote by equivalence (options by their letter)."""

    def same(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [verdict.correct for verdict in verifier.compare(pairs)]

    def of(value: Callable[[Attempt], Any]) -> np.ndarray:
        return np.array([[value(attempt) for attempt in row] for row in attempts_PG])

    pairs = [(one.problem, a.extracted) for one, row in zip(task, attempts_PG, strict=True) for a in row]
    votes = iter(rewards.votes(pairs, verifier))
    of_task = summarise(
        [named.id for named in task],
        [problem_digest(named.problem) for named in task],
        correct_PG=of(lambda a: a.correct),
        cluster_PG=cluster_problems([[next(votes) for _ in row] for row in attempts_PG], same),
        length_PG=of(lambda a: len(a.completion.ids)),
        finished_PG=of(lambda a: a.completion.finished),
        answered_PG=of(lambda a: a.extracted is not None),
        judged_PG=of(lambda a: a.status == "ok"),
        seed=seed,
    )
    return of_task | _of_sources(task, attempts_PG)


def _of_sources(task: Sequence[Named], attempts_PG: Sequence[Sequence[Attempt]]) -> dict[str, Any]:
    """pass@1 and its interval of each set of which the task's file has rows; nothing of a file of one."""
    problems = [named.problem for named in task]
    values, sources = accuracies(problems, attempts_PG, ""), sorted({problem.tag for problem in problems} - {""})
    figures = {
        source: {f"pass@1{end}": values[f"/pass@1/{source}{end}"] for end in ("", "/low", "/high")}
        | {"problems": len({problem_digest(problem) for problem in problems if problem.tag == source})}
        for source in sources
    }
    return {"sources": figures} if figures else {}
