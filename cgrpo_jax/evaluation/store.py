"""The answers of an evaluation on disk, and the wall time of each process that sampled some of them."""

from __future__ import annotations

import json
import pathlib
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cgrpo_jax.errors import CheckpointError, DataError
from cgrpo_jax.records import Completion, Kind, Name, Request
from cgrpo_jax.workdir.places import writing


def nonfinite_tokens(completions: Iterable[Completion]) -> int:
    """Sampled tokens whose log-probability is NaN or infinite: the model's logits are not finite there."""
    return sum(int(np.count_nonzero(~np.isfinite(completion.logp))) for completion in completions)


def _checksum(prompt_ids: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(prompt_ids, "<i4").tobytes())


class _Stored(NamedTuple):
    """A line of a store. (problem, sample) are its key; with the seed they name its random numbers."""

    problem: int
    sample: int
    prompt_crc32: int  # checksum of the ids of the prompt that was answered
    nonfinite: int  # sampled tokens whose log-probability is not finite
    completion: Completion  # without log-probabilities


def _read_line(path: pathlib.Path, number: int, line: bytes) -> _Stored:
    """Raises DataError where the line holds no answer."""
    try:
        record = json.loads(line)
        none = np.zeros(0, np.float32)
        completion = Completion(np.asarray(record["ids"], np.int32), none, none, record["finished"])
        return _Stored(record["problem"], record["sample"], record["prompt_crc32"], record["nonfinite"], completion)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            f"{path}, line {number}: no stored answer ({type(error).__name__}: {error}); remove the line, and that "
            "answer is sampled again"
        ) from None


class _Store:
    """The answers to one task on disk, one per line, each written as it ends: none of them is ever sampled twice.

    Raises:
      DataError: a line that is no answer. A last line that was cut short is dropped.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.lines: dict[tuple[int, int], _Stored] = {}
        whole, _, cut_short = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            stored = _read_line(path, number, line)
            self.lines[stored.problem, stored.sample] = stored
        if cut_short:
            with path.open("r+b") as file:
                file.truncate(len(whole) + 1 if whole else 0)
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, stored: _Stored, text: str) -> None:
        """Appends an answer, with its text for a reader."""
        record = stored._asdict()
        completion = record.pop("completion")
        record |= {"finished": completion.finished, "ids": completion.ids.tolist(), "text": text}
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.lines[stored.problem, stored.sample] = stored

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises DataError where what is stored for a problem answers another prompt than the one it has now."""
        checksums = dict(enumerate(map(_checksum, prompts)))
        for stored in self.lines.values():
            if stored.prompt_crc32 != checksums.get(stored.problem, stored.prompt_crc32):
                raise DataError(
                    f"{self.path}: its answers to problem {stored.problem} are to another prompt; take another workdir"
                )

    @property
    def nonfinite(self) -> int:
        """Sampled tokens whose log-probability is not finite."""
        return sum(stored.nonfinite for stored in self.lines.values())

    def check_finite(self) -> None:
        """Raises CheckpointError where the log-probability of a sampled token is not finite."""
        if nonfinite := self.nonfinite:
            tokens = sum(len(stored.completion.ids) for stored in self.lines.values())
            raise CheckpointError(
                f"{self.path}: {nonfinite} of {tokens} sampled tokens have a log-probability that is not finite: the "
                "answers mean nothing; look for NaN in the weights, try model.dtype=float32, and take another workdir"
            )


class SamplingRuns:
    """How many answers each process found and sampled, and how long it took; on disk after every answer.

    `runs` has an entry for each process: {"stored": answers there were, "of": answers asked for, "seconds": wall time
    up to its last answer, loading and compiling included, "tokens": sampled}.

    Raises:
      DataError: the file is damaged.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            try:
                self.runs = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{path}: not valid JSON ({error}); remove it, and time is counted anew") from None

    def begin(self, stored: int, of: int) -> None:
        """Adds the entry of this process and starts its clock."""
        self.runs.append({"stored": stored, "of": of, "seconds": 0.0, "tokens": 0})
        self.since = time.perf_counter()

    def answered(self, tokens: int) -> None:
        """Counts an answer of so many tokens that has been stored."""
        self.runs[-1]["seconds"] = time.perf_counter() - self.since
        self.runs[-1]["tokens"] += tokens
        partial = self.path.with_suffix(".partial")
        with writing(partial):
            partial.write_text(json.dumps(self.runs) + "\n", encoding="utf-8")
        partial.rename(self.path)

    def summary(self) -> dict[str, Any]:
        """Wall time, tokens and speed of the whole evaluation; its tasks share one queue, so they have no time each."""
        seconds, tokens = (sum(run[name] for run in self.runs) for name in ("seconds", "tokens"))
        speed = tokens / seconds if seconds > 0 else None
        return {"seconds": seconds, "tokens": tokens, "tokens_per_s": speed, "runs": self.runs}

    def resumed(self, dtype: str) -> str | None:
        """A warning where several processes sampled: one alone might have sampled other tokens."""
        places = [f"{run['stored']} of {run['of']}" for run in self.runs if run["stored"]]
        if not places:
            return None
        return (
            f"Resumed after {', '.join(places)} answers. The last bits of {dtype} logits depend on which requests "
            "share a batch, so at near-ties later tokens may be other ones than without the interruption."
        )


class Answers:
    """All that an evaluation has sampled: the answers to each task, in the order of the tasks, and who sampled them."""

    def __init__(self, folder: pathlib.Path, tasks: Iterable[str]):
        self.stores = [_Store(folder / task / "responses.jsonl") for task in tasks]
        self.runs = SamplingRuns(folder / "runs.json")

    def known(self, prompts_OP: Sequence[Sequence[Sequence[int]]]) -> dict[Name, Completion]:
        """The stored answers. Raises what `_Store.check_prompts` and `_Store.check_finite` raise.

        Args:
          prompts_OP: ids of the prompts of each task.
        """
        known = {}
        for task, (store, prompts) in enumerate(zip(self.stores, prompts_OP, strict=True)):
            store.check_prompts(prompts)
            store.check_finite()
            for (problem, sample), stored in store.lines.items():
                known[Name(Kind.EVALUATION, problem, sample, task=task)] = stored.completion
        return known

    def add(self, request: Request, completion: Completion, text: str) -> None:
        """Stores an answer. Raises CheckpointError where one of its log-probabilities is not finite."""
        name, nonfinite = request.name, nonfinite_tokens([completion])
        stored = _Stored(name.problem, name.sample, _checksum(request.prompt_ids), nonfinite, completion)
        self.stores[name.task].add(stored, text)
        self.runs.answered(len(completion.ids))
        if nonfinite:
            self.stores[name.task].check_finite()

    def summary(self) -> dict[str, Any]:
        """Entry `sampling` of results.json."""
        return self.runs.summary() | {"nonfinite": sum(store.nonfinite for store in self.stores)}
