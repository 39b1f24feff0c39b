"""The answers of an evaluation on disk, and the digests that say of which model and which problems they are."""

from __future__ import annotations

import hashlib
import json
import pathlib
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cgrpo_jax.data.rows import question_text
from cgrpo_jax.errors import CheckpointError, DataError
from cgrpo_jax.grading.choices import LETTERS
from cgrpo_jax.records import Completion, Kind, Name, Problem, Request
from cgrpo_jax.workdir.places import writing


# ---- Digests ----
def files_digest(folder: pathlib.Path, names: Iterable[str]) -> str:
    """SHA-256 over the names and bytes of those files of `names` that the folder has, in the order of their names.

    It takes 20 s for 7 billion weights in bfloat16 (0.7 GB a second, measured on a busy core).
    """
    whole = hashlib.sha256()
    for name in sorted(set(names)):
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                whole.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {name}\n".encode())
    return whole.hexdigest()


def contents(folder: pathlib.Path, side_files: Iterable[str]) -> dict[str, str]:
    """Digests of a Hugging Face folder: one of its weights, one of configuration, tokenizer and chat templates.

    They are of the bytes on disk, so that stored answers can be matched to a model without loading it. The same weights
    in other shards have another digest.
    """
    shards, templates = ([path.name for path in folder.glob(pattern)] for pattern in ("*.safetensors", "*.jinja"))
    weights = files_digest(folder, [*shards, "model.safetensors.index.json"])
    return {"weights": weights, "files": files_digest(folder, [*side_files, *templates])}


def problem_digest(problem: Problem) -> str:
    """Digest of question, gold answer and options. Copies of a problem in other rows or files have the same one.

    The order of the options depends on the row, so they are sorted, and the gold answer is the text of its option.
    """
    question, gold, options = problem.question, problem.answer, []
    if problem.grader == "choice" and problem.entry is not None:
        shown = list(problem.entry["options"])
        question = question.removesuffix(question_text("", shown))
        gold, options = shown[LETTERS.index(gold)], sorted(shown)
    content = json.dumps([question.strip(), gold.strip(), options])
    return hashlib.sha256(content.encode()).hexdigest()


# ---- Answers ----
def nonfinite_tokens(completions: Iterable[Completion]) -> int:
    """Sampled tokens whose log-probability is NaN or infinite: the model's logits are not finite there."""
    return sum(int(np.count_nonzero(~np.isfinite(completion.logp))) for completion in completions)


def _checksum(prompt_ids: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(prompt_ids, "<i4").tobytes())


class _Stored(NamedTuple):
    """An answer to a task as a line of its file. With the seed, (problem, sample) name its random numbers."""

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


def _read(path: pathlib.Path) -> list[_Stored]:
    """The answers in a file. A last line that was cut short is removed from it. Raises DataError for any other one."""
    whole, _, cut_short = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
    lines = [_read_line(path, number, line) for number, line in enumerate(whole.split(b"\n") if whole else [], 1)]
    if cut_short:
        with path.open("r+b") as file:
            file.truncate(len(whole) + 1 if whole else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    return lines


class Answers:
    """All that an evaluation has sampled, on disk as soon as an answer ends: no answer is ever sampled twice.

    The answers to a task are in its own file. `runs` has an entry for each process that sampled: {"stored": answers
    that it found, "of": answers asked for, "seconds": wall time up to its last answer, loading and compiling included,
    "tokens": sampled}.

    Raises:
      DataError: a file is damaged.
    """

    def __init__(self, folder: pathlib.Path, tasks: Iterable[str]):
        self.paths = [folder / task / "responses.jsonl" for task in tasks]
        self.stored = [{(line.problem, line.sample): line for line in _read(path)} for path in self.paths]
        self.runs_path, self.runs = folder / "runs.json", list[dict[str, Any]]()
        if self.runs_path.exists():
            try:
                self.runs = json.loads(self.runs_path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(
                    f"{self.runs_path}: not valid JSON ({error}); remove it, and time is counted anew"
                ) from None

    @property
    def count(self) -> int:
        """How many answers are stored."""
        return sum(map(len, self.stored))

    def known(self, prompts_OP: Sequence[Sequence[Sequence[int]]]) -> dict[Name, Completion]:
        """The stored answers.

        Args:
          prompts_OP: ids of the prompts of each task.

        Raises:
          DataError: a stored answer is to another prompt.
          CheckpointError: see `_check_finite`.
        """
        known = {}
        for task, (path, prompts) in enumerate(zip(self.paths, prompts_OP, strict=True)):
            checksums = dict(enumerate(map(_checksum, prompts)))
            for (problem, sample), stored in self.stored[task].items():
                if stored.prompt_crc32 != checksums.get(problem, stored.prompt_crc32):
                    raise DataError(
                        f"{path}: its answers to problem {problem} are to another prompt; take another workdir"
                    )
                known[Name(Kind.EVALUATION, problem, sample, task=task)] = stored.completion
            self._check_finite(task)
        return known

    def _nonfinite(self, task: int) -> int:
        return sum(stored.nonfinite for stored in self.stored[task].values())

    def _check_finite(self, task: int) -> None:
        """Raises CheckpointError where the log-probability of a sampled token is not finite."""
        path = self.paths[task]
        if nonfinite := self._nonfinite(task):
            tokens = sum(len(stored.completion.ids) for stored in self.stored[task].values())
            raise CheckpointError(
                f"{path}: {nonfinite} of {tokens} sampled tokens have a log-probability that is not finite: the "
                "answers mean nothing; look for NaN in the weights, try model.dtype=float32, and take another workdir"
            )

    def begin(self, stored: int, of: int) -> None:
        """Adds the entry of this process to `runs` and starts its clock."""
        self.runs.append({"stored": stored, "of": of, "seconds": 0.0, "tokens": 0})
        self.since = time.perf_counter()

    def add(self, request: Request, completion: Completion, text: str) -> None:
        """Stores an answer, with its text for a reader. Raises CheckpointError as `_check_finite` does."""
        name, crc32 = request.name, _checksum(request.prompt_ids)
        stored = _Stored(name.problem, name.sample, crc32, nonfinite_tokens([completion]), completion)
        record = stored._asdict()
        record.pop("completion")
        record |= {"finished": completion.finished, "ids": completion.ids.tolist(), "text": text}
        path = self.paths[name.task]
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.stored[name.task][name.problem, name.sample] = stored
        self._count_tokens(len(completion.ids))
        if stored.nonfinite:
            self._check_finite(name.task)

    def _count_tokens(self, tokens: int) -> None:
        self.runs[-1]["seconds"] = time.perf_counter() - self.since
        self.runs[-1]["tokens"] += tokens
        partial = self.runs_path.with_suffix(".partial")
        with writing(partial):
            partial.write_text(json.dumps(self.runs) + "\n", encoding="utf-8")
        partial.rename(self.runs_path)

    def summary(self) -> dict[str, Any]:
        """Entry `sampling` of results.json: of the whole evaluation, for one queue serves all of its tasks."""
        seconds, tokens = (sum(run[name] for run in self.runs) for name in ("seconds", "tokens"))
        speed = tokens / seconds if seconds > 0 else None
        counts = {"seconds": seconds, "tokens": tokens, "tokens_per_s": speed, "runs": self.runs}
        return counts | {"nonfinite": sum(map(self._nonfinite, range(len(self.paths))))}

    def resumed(self, dtype: str) -> str | None:
        """A warning where several processes sampled: one alone might have sampled other tokens."""
        places = [f"{run['stored']} of {run['of']}" for run in self.runs if run["stored"]]
        if not places:
            return None
        return (
            f"Resumed after {', '.join(places)} answers. The last bits of {dtype} logits depend on which requests "
            "share a batch, so at near-ties later tokens may be other ones than without the interruption."
        )
