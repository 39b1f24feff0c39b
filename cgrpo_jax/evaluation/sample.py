"""Accuracy on held-out problems, by the same engine and graders as training: the one path of every evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cgrpo_jax.evaluation.identity import problem_digest
from cgrpo_jax.evaluation.intervals import average_copies, wilson
from cgrpo_jax.evaluation.store import Answers, Stored, checksum
from cgrpo_jax.records import Attempt, Completion, Kind, Name, Problem, Request
from cgrpo_jax.rollout.collect import Score
from cgrpo_jax.rollout.stories import Sample, Stories, Story
from cgrpo_jax.text.tokenizer import Tokenizer


def nonfinite_tokens(completions: Iterable[Completion]) -> int:
    """Sampled tokens whose log-probability is NaN or infinite: the model's numbers are broken there."""
    return sum(int(np.count_nonzero(~np.isfinite(completion.logp))) for completion in completions)


class Exam:
    """The problems of one or several tasks, each asked `samples` times, and the answers as they come.

    All tasks share one queue, so that none waits for its longest answers.

    Args:
      answers: what was sampled before and need not be again; it is given each new answer as it ends.
      answered: called for each answer, those that are known included.

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
        self.tasks, self.samples, self.tokenizer, self.answers, self.answered = (
            tasks, samples, tokenizer, answers, answered,
        )  # fmt: skip
        self.names = [(t, p, g) for t, task in enumerate(tasks) for p in range(len(task)) for g in range(samples)]
        self.prompts = {
            (t, p): tokenizer.encode_chat(problem.messages)
            for t, task in enumerate(tasks)
            for p, problem in enumerate(task)
        }
        self.known: dict[tuple[int, int, int], Completion] = {}
        for t, store in enumerate(answers.stores if answers else ()):
            store.check_prompts({p: self.prompts[t, p] for p in range(len(tasks[t]))})
            store.check_finite()
            self.known |= {(t, *name): completion for name, completion in store.known.items()}
        asked = [name for name in self.names if name not in self.known]
        self.requests = [
            Request(Name(Kind.EVALUATION, p, g, task=t), self.prompts[t, p]) for t, p, g in asked
        ]  # what is not known yet
        for _ in range(len(self.names) - len(asked)):
            answered()

    def stories(self) -> Stories:
        """One a request; an answer is kept as it ends.

        Raises, as it is run, CheckpointError: a new answer has log-probabilities that are not finite.
        """
        if self.requests and self.answers:
            self.answers.runs.begin(len(self.names) - len(self.requests), len(self.names))
        return Stories([self._answer(request) for request in self.requests])

    def _answer(self, request: Request) -> Story:
        (completion,) = yield Sample([request], last=True)
        name = request.name
        self.known[name.task, name.problem, name.sample] = completion
        if self.answers:
            _store(self.answers, name, completion, request.prompt_ids, self.tokenizer.decode(completion.ids))
        self.answered()

    def graded(self, score: Score) -> list[list[list[Attempt]]]:
        """The answers to each problem of each task, once all of them are there."""
        named = [(self.tasks[t][p], self.known[t, p, g]) for t, p, g in self.names]
        attempts = iter(score([(problem, answer, self.tokenizer.decode(answer.ids)) for problem, answer in named]))
        return [[list(itertools.islice(attempts, self.samples)) for _ in task] for task in self.tasks]


def _store(answers: Answers, name: Name, completion: Completion, prompt: Sequence[int], text: str) -> None:
    """Raises CheckpointError where the answer was sampled from numbers that are not finite."""
    store, nonfinite = answers.stores[name.task], nonfinite_tokens([completion])
    store.add(Stored(name.problem, name.sample, checksum(prompt), nonfinite, completion), text)
    answers.runs.answered(len(completion.ids))
    if nonfinite:
        store.check_finite()


def accuracies(problems: Sequence[Problem], attempts_PG: Sequence[Sequence[Attempt]], name: str) -> dict[str, float]:
    """Metrics of an evaluation: pass@1 (the mean over samples) of all problems and of each tag, length, truncation.

    pass@1 and its 95 % interval are over distinct problems: copies of one are averaged first. Only where there are some
    are `no_verdict`, the share of answers whose grading ended at a limit (they count as wrong), and `nonfinite`, the
    count of sampled tokens whose log-probability is not finite.
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
