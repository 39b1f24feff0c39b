"""Accuracy on held-out problems, through the same sampler and graders as training: the one path of every evaluation."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cgrpo_jax.rollout import Score
from cgrpo_jax.statistics import wilson
from cgrpo_jax.tokenizer import Tokenizer
from cgrpo_jax.types import Attempt, Completion, Generate, Kind, Problem, Request


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation: of a checkpoint (method=eval), or before, during and after training."""

    every: int = 0  # steps of training; 0: none at all
    source: str = ""  # as data.source; "" is data.source itself
    revision: str = "main"  # of a hub id in eval.source
    split: str = "test"
    tasks: str = ""  # names of tasks.TASKS and NAME=FILE, with commas between them; in training beside eval.source
    problems: int = 256  # of each, the first ones; 0: all
    samples: int = 4  # per problem
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0


class Response(NamedTuple):
    """A sampled answer. (problem, sample) name it, and with the seed its random numbers."""

    problem: int
    sample: int
    completion: Completion


class Store:
    """Responses of one task on disk, a line each as it ends: none is sampled twice, whatever ends the process."""

    def __init__(self, path: pathlib.Path):
        self.path, self.seconds = path, 0.0  # spent on sampling what is stored
        self.known: dict[tuple[int, int], Completion] = {}
        lines = path.read_text().split("\n") if path.exists() else []
        for line in lines[:-1]:  # what follows the last line break was cut short
            record = json.loads(line)
            ids = np.asarray(record["ids"], np.int32)
            none = np.zeros(0, np.float32)
            self.known[record["problem"], record["sample"]] = Completion(ids, none, none, record["finished"])
            self.seconds += record["seconds"]
        if lines and lines[-1]:
            path.write_text("".join(line + "\n" for line in lines[:-1]))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.started()

    def started(self, told: Callable[[], None] = lambda: None) -> None:
        """Sampling begins now; `told` is called at each response, those that are known already included."""
        self.since, self.told = time.perf_counter(), told
        for _ in self.known:
            told()

    def add(self, response: Response, text: str) -> None:
        now = time.perf_counter()
        problem, sample, completion = response
        record = {
            "problem": problem, "sample": sample, "finished": completion.finished, "seconds": now - self.since,
            "ids": completion.ids.tolist(), "text": text,
        }  # fmt: skip
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.known[problem, sample] = completion
        self.seconds, self.since = self.seconds + now - self.since, now
        self.told()


def sample_and_grade(
    problems: Sequence[Problem],
    samples: int,
    generate: Generate,
    score: Score,
    tokenizer: Tokenizer,
    store: Store | None = None,
) -> list[list[Attempt]]:
    """`samples` graded answers to each problem.

    Args:
      store: holds answers that need not be sampled again, and is given each new one as it ends.
    """
    names = [(p, g) for p in range(len(problems)) for g in range(samples)]
    known = {} if store is None else store.known
    asked = [name for name in names if name not in known]
    prompts = {p: tokenizer.encode_chat(problems[p].messages) for p in sorted({p for p, _ in asked})}

    def keep(number: int, completion: Completion) -> list[Request]:
        if store is not None:
            store.add(Response(*asked[number], completion), tokenizer.decode(completion.ids))
        return []

    requests = [Request(prompts[p], Kind.EVALUATION, p, g) for p, g in asked]
    sampled = dict(zip(asked, generate(requests, keep if store is not None else None), strict=True))
    completions = [known[name] if name in known else sampled[name] for name in names]
    attempts = score([(problems[p], c, tokenizer.decode(c.ids)) for (p, _), c in zip(names, completions, strict=True)])
    return [attempts[p * samples : (p + 1) * samples] for p in range(len(problems))]


def accuracies(problems: Sequence[Problem], attempts_PG: Sequence[Sequence[Attempt]], name: str) -> dict[str, float]:
    """pass@1 (the mean over samples) of all problems and of each tag, with its 95 % interval, for the metrics."""
    values: dict[str, float] = {}
    for tag in ["", *sorted({problem.tag for problem in problems} - {""})]:
        chosen = [a for problem, a in zip(problems, attempts_PG, strict=True) if tag in ("", problem.tag)]
        mean = float(np.mean([[attempt.correct for attempt in row] for row in chosen]))
        key = f"{name}/pass@1" + (f"/{tag}" if tag else "")
        values[key] = mean
        values[f"{key}/low"], values[f"{key}/high"] = wilson(mean, len(chosen))
    completions = [attempt.completion for row in attempts_PG for attempt in row]
    values[f"{name}/length"] = float(np.mean([len(c.ids) for c in completions]))
    values[f"{name}/truncated"] = float(np.mean([not c.finished for c in completions]))
    return values
