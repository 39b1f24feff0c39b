"""Accuracy on held-out problems, by the engine and the graders of training: what every evaluation asks and counts."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cgrpo_jax.data.tasks import NamedProblem
from cgrpo_jax.evaluation.intervals import average_copies, cluster_problems, summarise, wilson
from cgrpo_jax.evaluation.store import Answers, nonfinite_tokens, problem_digest
from cgrpo_jax.grading import rewards
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.records import Attempt, Completion, Kind, Name, Problem, Request
from cgrpo_jax.rollout.stories import Sample, Stories, Story
from cgrpo_jax.text.tokenizer import Tokenizer
from cgrpo_jax.workdir.places import writing


class Exam:
    """The problems of one or several tasks, each asked `samples` times, and the answers that have been sampled.

    All tasks share one queue, so that the engine does not run empty at the end of each.

    Args:
      answers: on disk. What is stored there is not sampled again, and each new answer is added as it ends.
      answered: called for each answer, also for those that were stored.

    Raises:
      DataError: stored answers are to other prompts.
      CheckpointError: a stored answer has log-probabilities that are not finite.
    """

    def __init__(
        self,
        tasks: Sequence[Sequence[Problem]],
        samples: int,
        tokenizer: Tokenizer,
        answers: Answers | None = None,
        answered: Callable[[], None] = lambda: None,
    ):
        self.tasks, self.samples, self.tokenizer = tasks, samples, tokenizer
        self.answers, self.answered = answers, answered
        prompts_OP = [[tokenizer.encode_chat(problem.messages) for problem in task] for task in tasks]
        self.known: dict[Name, Completion] = answers.known(prompts_OP) if answers else {}
        self.names = [
            Name(Kind.EVALUATION, p, g, task=t)
            for t, prompts in enumerate(prompts_OP)
            for p in range(len(prompts))
            for g in range(samples)
        ]
        asked = [name for name in self.names if name not in self.known]
        self.requests = [Request(name, prompts_OP[name.task][name.problem]) for name in asked]
        for _ in range(len(self.names) - len(asked)):
            answered()

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt whose answer is not known yet; 0 where all are known."""
        return max((len(request.prompt_ids) for request in self.requests), default=0)

    def stories(self) -> Stories:
        """A story for each answer that is not known yet.

        While they run they raise CheckpointError where a new answer has log-probabilities that are not finite.
        """
        if self.requests and self.answers:
            self.answers.begin(len(self.names) - len(self.requests), len(self.names))
        return Stories([self._answer(request) for request in self.requests])

    def _answer(self, request: Request) -> Story:
        (completion,) = yield Sample([request], last=True)
        self.known[request.name] = completion
        if self.answers:
            self.answers.add(request, completion, self.tokenizer.decode(completion.ids))
        self.answered()

    def graded(self, score: Callable[..., list[Attempt]]) -> list[list[list[Attempt]]]:
        """The answers to each problem of each task, once all are known: `score` is given (problem, answer, text)."""
        answers = [(self.tasks[name.task][name.problem], self.known[name]) for name in self.names]
        attempts = iter(score([(problem, answer, self.tokenizer.decode(answer.ids)) for problem, answer in answers]))
        return [[list(itertools.islice(attempts, self.samples)) for _ in task] for task in self.tasks]


def accuracies(problems: Sequence[Problem], attempts_PG: Sequence[Sequence[Attempt]], name: str) -> dict[str, float]:
    """Metrics of an evaluation: pass@1 (the mean over samples) of all problems and of each tag, length, truncation.

    pass@1 and its 95 % interval are over distinct problems: the copies of one are averaged first. `no_verdict`, the
    share of answers whose grading ended at a limit (they count as wrong), and `nonfinite`, the number of sampled tokens
    whose log-probability is not finite, are there only where they are not 0.
    """
    values: dict[str, float] = {}
    content_P = [problem_digest(problem) for problem in problems]
    correct_P = np.array([[attempt.correct for attempt in row] for row in attempts_PG], float).mean(axis=1)
    for tag in ["", *sorted({problem.tag for problem in problems} - {""})]:
        chosen = [p for p, problem in enumerate(problems) if tag in ("", problem.tag)]
        correct_Z = average_copies(correct_P[chosen], [content_P[p] for p in chosen])
        mean = float(correct_Z.mean())
        key = f"{name}/pass@1" + (f"/{tag}" if tag else "")
        values[key] = mean
        values[f"{key}/low"], values[f"{key}/high"] = wilson(mean, len(correct_Z))
    completions = [attempt.completion for row in attempts_PG for attempt in row]
    values[f"{name}/length"] = float(np.mean([len(c.ids) for c in completions]))
    values[f"{name}/truncated"] = float(np.mean([not c.finished for c in completions]))
    if unjudged := sum(attempt.status != "ok" for row in attempts_PG for attempt in row):
        values[f"{name}/no_verdict"] = unjudged / len(completions)
    if nonfinite := nonfinite_tokens(completions):
        values[f"{name}/nonfinite"] = float(nonfinite)
    return values


def write_grades(path: pathlib.Path, task: Sequence[NamedProblem], attempts_PG: Sequence[Sequence[Attempt]]) -> None:
    """Writes a line for each answer to a task: the answer that was found in its text, and the verdict."""
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


def task_entry(
    task: Sequence[NamedProblem], attempts_PG: Sequence[Sequence[Attempt]], verifier: Verifier, seed: int
) -> dict[str, Any]:
    """A task's entry of `results.json`. For maj@G, answers that the verifier finds equivalent are one answer."""

    def same(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [verdict.correct for verdict in verifier.compare(pairs)]

    def of(value: Callable[[Attempt], Any]) -> np.ndarray:
        return np.array([[value(attempt) for attempt in row] for row in attempts_PG])

    problems = [named.problem for named in task]
    content_P = [problem_digest(problem) for problem in problems]
    pairs = [(problem, a.extracted) for problem, row in zip(problems, attempts_PG, strict=True) for a in row]
    votes = iter(rewards.votes(pairs, verifier))
    entry = summarise(
        [named.id for named in task],
        content_P,
        correct_PG=of(lambda a: a.correct),
        cluster_PG=cluster_problems([[next(votes) for _ in row] for row in attempts_PG], same),
        length_PG=of(lambda a: len(a.completion.ids)),
        finished_PG=of(lambda a: a.completion.finished),
        answered_PG=of(lambda a: a.extracted is not None),
        judged_PG=of(lambda a: a.status == "ok"),
        seed=seed,
    )
    values = accuracies(problems, attempts_PG, "")
    sources = {
        source: {f"pass@1{end}": values[f"/pass@1/{source}{end}"] for end in ("", "/low", "/high")}
        | {"problems": len({of for of, problem in zip(content_P, problems, strict=True) if problem.tag == source})}
        for source in sorted({problem.tag for problem in problems} - {""})  # sets of which the task's file has rows
    }
    return entry | ({"sources": sources} if sources else {})
