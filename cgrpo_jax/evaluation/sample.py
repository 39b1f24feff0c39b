"""Accuracy on held-out problems, through the same sampler and graders as training: the one path of every evaluation."""

from __future__ import annotations

import itertools
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cgrpo_jax.data.sources import DataError
from cgrpo_jax.evaluation.intervals import wilson
from cgrpo_jax.records import Attempt, Completion, Done, Kind, Name, Problem, Request, Source
from cgrpo_jax.rollout.collect import Score
from cgrpo_jax.text.tokenizer import Tokenizer


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
        self.prompt: dict[tuple[int, int], int] = {}  # checksum of the prompt that was answered
        lines = path.read_text().split("\n") if path.exists() else []
        for line in lines[:-1]:  # what follows the last line break was cut short
            record = json.loads(line)
            ids = np.asarray(record["ids"], np.int32)
            none = np.zeros(0, np.float32)
            name = (record["problem"], record["sample"])
            self.known[name] = Completion(ids, none, none, record["finished"])
            self.prompt[name] = record["prompt_crc32"]
            self.seconds += record["seconds"]
        if lines and lines[-1]:
            path.write_text("".join(line + "\n" for line in lines[:-1]))
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, response: Response, prompt: Sequence[int], text: str, seconds: float) -> None:
        problem, sample, completion = response
        record = {
            "problem": problem, "sample": sample, "prompt_crc32": _checksum(prompt), "finished": completion.finished,
            "seconds": seconds, "ids": completion.ids.tolist(), "text": text,
        }  # fmt: skip
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.known[problem, sample] = completion
        self.seconds += seconds

    def check(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Raises DataError where what is stored for a problem answers another prompt."""
        checksums = {problem: _checksum(ids) for problem, ids in prompts.items()}
        for (problem, _), stored in self.prompt.items():
            if stored != checksums.get(problem, stored):
                raise DataError(
                    f"{self.path}: its answers to problem {problem} are to another prompt; take another workdir"
                )


def _checksum(ids: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(ids, "<i4").tobytes())


class _Answers:
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
    stores: Sequence[Store] = (),
    answered: Callable[[], None] = lambda: None,
) -> list[list[list[Attempt]]]:
    """`samples` graded answers to each problem of each task; all are one queue: no task waits for its longest answers.

    Args:
      run: of a sampler.
      stores: one a task, or none at all. They hold answers that need not be sampled again, and are given each new one
        as it ends, with the seconds since the one before it.
      answered: called for each answer, those that are known included.

    Raises:
      DataError: a store holds answers to other prompts.
    """
    names = [(t, p, g) for t, problems in enumerate(tasks) for p in range(len(problems)) for g in range(samples)]
    known = {(t, *name): completion for t, store in enumerate(stores) for name, completion in store.known.items()}
    asked = [name for name in names if name not in known]
    for _ in range(len(names) - len(asked)):
        answered()
    prompts = {(t, p): tokenizer.encode_chat(tasks[t][p].messages) for t, p in sorted({name[:2] for name in names})}
    for t, store in enumerate(stores):
        store.check({p: prompts[t, p] for p in range(len(tasks[t]))})
    since = time.perf_counter()

    def keep(name: Name, completion: Completion) -> None:
        nonlocal since
        t, p, g = name.task, name.problem, name.sample
        known[t, p, g] = completion
        now = time.perf_counter()
        if stores:
            stores[t].add(Response(p, g, completion), prompts[t, p], tokenizer.decode(completion.ids), now - since)
        since = now
        answered()

    run(_Answers([Request(Name(Kind.EVALUATION, p, g, task=t), prompts[t, p]) for t, p, g in asked], keep))
    attempts = iter(score([(tasks[t][p], known[t, p, g], tokenizer.decode(known[t, p, g].ids)) for t, p, g in names]))
    return [[list(itertools.islice(attempts, samples)) for _ in problems] for problems in tasks]


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
