"""Accuracy on held-out problems, through the same sampler and graders as training: the one path of every evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cgrpo_jax.evaluation.identity import problem_digest
from cgrpo_jax.evaluation.intervals import average_copies, wilson
from cgrpo_jax.evaluation.store import Answers, Stored, checksum
from cgrpo_jax.records import Attempt, Completion, Done, Kind, Name, Problem, Request, Source
from cgrpo_jax.rollout.collect import Score
from cgrpo_jax.text.tokenizer import Tokenizer

Prompts = dict[tuple[int, int], list[int]]  # (task, problem) -> ids


def nonfinite_tokens(completions: Iterable[Completion]) -> int:
    """Sampled tokens whose log-probability is NaN or infinite: the model's numbers are broken there."""
    return sum(int(np.count_nonzero(~np.isfinite(completion.logp))) for completion in completions)


class _Asked:
    """The source of an evaluation: everything is asked at once, each answer is kept as it ends."""

    def __init__(self, requests: Sequence[Request], keep: Callable[[Name, Completion], None]):
        self.requests, self.keep = requests, keep

    def ended(self, done: Done) -> None:
        for request, completion in done:
            self.keep(request.name, completion)

    def poll(self, idle: bool) -> Sequence[Request]:
        asked, self.requests = self.requests, []
        return asked

    def pending(self) -> bool:
        return False


def sample_and_grade(
    tasks: Sequence[Sequence[Problem]],
    samples: int,
    run: Callable[[Source], None],
    score: Score,
    tokenizer: Tokenizer,
    answers: Answers | None = None,
    answered: Callable[[], None] | None = None,
) -> list[list[list[Attempt]]]:
    """`samples` graded answers to each problem of each task; all are one queue: no task waits for its longest answers.

    Args:
      run: of a sampler.
      answers: what was sampled before and need not be again; it is given each new answer as it ends.
      answered: called for each answer, those that are known included.

    Raises:
      DataError: stored answers to other prompts.
      CheckpointError: a stored or new answer has log-probabilities that are not finite.
    """
    names = [(t, p, g) for t, problems in enumerate(tasks) for p in range(len(problems)) for g in range(samples)]
    prompts = {(t, p): tokenizer.encode_chat(tasks[t][p].messages) for t, p in sorted({name[:2] for name in names})}
    known: dict[tuple[int, int, int], Completion] = {}
    for t, store in enumerate(answers.stores if answers else ()):
        store.check_prompts({p: prompts[t, p] for p in range(len(tasks[t]))})
        store.check_finite()
        known |= {(t, *name): completion for name, completion in store.known.items()}
    asked = [name for name in names if name not in known]
    for _ in range(len(names) - len(asked)):
        if answered:
            answered()

    def keep(name: Name, completion: Completion) -> None:
        t, p, g = name.task, name.problem, name.sample
        known[t, p, g] = completion
        if answers is not None:
            _store(answers, name, completion, prompts[t, p], tokenizer.decode(completion.ids))
        if answered:
            answered()

    if asked and answers is not None:
        answers.runs.begin(len(names) - len(asked), len(names))
    run(_Asked([Request(Name(Kind.EVALUATION, p, g, task=t), prompts[t, p]) for t, p, g in asked], keep))
    attempts = iter(score([(tasks[t][p], known[t, p, g], tokenizer.decode(known[t, p, g].ids)) for t, p, g in names]))
    return [[list(itertools.islice(attempts, samples)) for _ in problems] for problems in tasks]


def _store(answers: Answers, name: Name, completion: Completion, prompt: Sequence[int], text: str) -> None:
    """Raises CheckpointError where the answer was sampled from numbers that are none."""
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
        correct_D = average_copies(correct_P[chosen], [content_P[p] for p in chosen])
        mean = float(correct_D.mean())
        key = f"{name}/pass@1" + (f"/{tag}" if tag else "")
        values[key] = mean
        values[f"{key}/low"], values[f"{key}/high"] = wilson(mean, len(correct_D))
    completions = [attempt.completion for row in attempts_PG for attempt in row]
    values[f"{name}/length"] = float(np.mean([len(c.ids) for c in completions]))
    values[f"{name}/truncated"] = float(np.mean([not c.finished for c in completions]))
    if unjudged := sum(attempt.status != "ok" for row in attempts_PG for attempt in row):
        values[f"{name}/no_verdict"] = unjudged / len(completions)
    if nonfinite := nonfinite_tokens(completions):
        values[f"{name}/nonfinite"] = float(nonfinite)
    return values
