"""Problems from files, the hub or a generator; every bad row is found before anything compiles; O(1) seek."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cgrpo_jax import arithmetic
from cgrpo_jax.answers import boxed
from cgrpo_jax.prompts import INSTRUCTION, question_messages
from cgrpo_jax.rewards import REASONING_GYM_TASKS
from cgrpo_jax.types import Message, Problem

QUESTION_COLUMNS = ("question", "problem", "query", "prompt")
ANSWER_COLUMNS = ("answer", "ground_truth", "final_answer", "target", "solution")
ROLES = ("system", "user", "assistant")
FILE_SUFFIXES = (".jsonl", ".parquet", ".csv")
GYM = "reasoning_gym:"
SHOWN = 20


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where problems come from."""

    source: str = ""  # file (.jsonl .parquet .csv) | hub id[:config] | arithmetic | reasoning_gym:TASK
    split: str = "train"
    revision: str = "main"  # of a hub id
    question_column: str = ""  # "" looks for the usual names
    answer_column: str = ""
    on_bad_row: str = "error"  # | drop
    max_prompt_tokens: int = 512  # a longer question is a bad row


Parsable = Callable[[Sequence[str]], list[bool]]


class DataError(ValueError):
    """A data source that cannot be used; lists every bad row."""


class RowError(ValueError):
    """One bad cell."""

    def __init__(self, column: str, message: str):
        super().__init__(f"column {column!r}: {message}")


@dataclasses.dataclass(frozen=True)
class Problems:
    """A sequence of problems, finite or generated without end."""

    get: Callable[[int], Problem]
    size: int | None  # None: endless

    def batch(self, seed: int, first: int, count: int) -> list[Problem]:
        """Problems `first` ... `first + count - 1` of the training stream: seeded order, a new one each epoch."""
        return [self.get(self._index(seed, position)) for position in range(first, first + count)]

    def _index(self, seed: int, position: int) -> int:
        if self.size is None:
            return position
        epoch, offset = divmod(position, self.size)
        return int(_permutation(seed, epoch, self.size)[offset])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    turns = list(value)
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            raise RowError(column, f"a chat turn needs a 'role' of {', '.join(ROLES)}")
        if not isinstance(turn.get("content"), str):
            raise RowError(column, "a chat turn needs text as its 'content'")
    if not turns or turns[-1]["role"] != "user":
        raise RowError(column, "the last chat turn must be the user's")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _column(row: Mapping[str, Any], named: str, usual: Sequence[str]) -> str:
    for column in (named,) if named else usual:
        if row.get(column) is not None:
            return column
    raise RowError(named or "/".join(usual), "missing")


def _text(value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(column, f"text or a number is needed, not {type(value).__name__}")
    if not str(value).strip():
        raise RowError(column, "empty")
    return str(value)


def _gold(text: str) -> str:
    """GSM8K keeps the answer behind ####; a worked solution keeps it in a box."""
    if "####" in text:
        text = text.rsplit("####", 1)[1]
    elif "\\boxed" in text:
        text = boxed(text) or ""
    return text.strip()


def parse_row(row: Mapping[str, Any], cfg: DataConfig) -> Problem:
    """One row of any supported schema. Raises RowError naming the column.

    The authors' schema has `prompt` (chat turns), `reward_model.ground_truth` and sometimes `reward_model.question`;
    without the latter the bare question is the last user turn less the task instruction.
    """
    reward_model = row.get("reward_model")
    reward_model = reward_model if isinstance(reward_model, Mapping) else {}
    if reward_model.get("ground_truth") is not None and not cfg.answer_column:
        answer, answer_column = reward_model["ground_truth"], "reward_model.ground_truth"
    else:
        answer_column = _column(row, cfg.answer_column, ANSWER_COLUMNS)
        answer = row[answer_column]
    gold = _gold(_text(answer, answer_column))
    if not gold:
        raise RowError(answer_column, "no final answer in it")
    column = _column(row, cfg.question_column, QUESTION_COLUMNS)
    value = row[column]
    turns = row.get("prompt") if isinstance(row.get("prompt"), (list, tuple, np.ndarray)) else None
    if turns is not None or isinstance(value, (list, tuple, np.ndarray)):
        messages = _messages(value if turns is None else turns, column if turns is None else "prompt")
        own = reward_model.get("question") or (value if isinstance(value, str) else None)
        question = _text(own or messages[-1]["content"].removesuffix(INSTRUCTION).strip(), "question")
        return Problem(question, gold, messages)
    question = _text(value, column)
    return Problem(question, gold, question_messages(question))


def _file_rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    """(line or row number from 1, row) of a local file; an unreadable line is an error in its place."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            yield from enumerate(csv.DictReader(file), 1)
    else:
        with path.open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        yield number, RowError("-", f"not valid JSON ({error})")
                        continue
                    yield number, row if isinstance(row, dict) else RowError("-", "not a JSON object")


def _hub_rows(cfg: DataConfig) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import datasets

    name, _, config = cfg.source.partition(":")
    loaded = datasets.load_dataset(name, config or None, split=cfg.split, revision=cfg.revision)
    yield from enumerate(loaded, 1)  # type: ignore[arg-type]


def _generated(cfg: DataConfig, seed: int) -> Problems | None:
    if cfg.source == "arithmetic":
        return Problems(lambda index: arithmetic.problem(seed, cfg.split, index), None)
    if not cfg.source.startswith(GYM):
        return None
    task = cfg.source.removeprefix(GYM)
    if task not in REASONING_GYM_TASKS:
        raise DataError(f"{cfg.source}: not on the list of tasks whose scorer was read ({len(REASONING_GYM_TASKS)})")
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(f"{cfg.source}: pip install 'cgrpo_jax[gym]' first") from None
    # The splits are far apart in the seeds: item i of a set is made from (seed of the set) + i.
    dataset = reasoning_gym.create_dataset(task, seed=seed + (1 << 40 if cfg.split == "test" else 0), size=1 << 31)

    def get(index: int) -> Problem:
        entry = dataset[index]
        return Problem(
            entry["question"], entry["answer"], question_messages(entry["question"]), "reasoning_gym", entry=entry
        )

    return Problems(get, None)


def _check_cache(path: pathlib.Path, cfg: DataConfig) -> pathlib.Path:
    """Where the verdict on the gold answers of these very bytes is kept."""
    digest = hashlib.sha256(path.read_bytes() + f"{cfg.question_column}|{cfg.answer_column}".encode()).hexdigest()
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    return root / "cgrpo_jax" / "checked_golds" / f"{digest}.json"


def _open(cfg: DataConfig) -> tuple[Iterable[tuple[int, Mapping[str, Any] | RowError]], pathlib.Path | None]:
    """Numbered rows of a file or hub set, and where the verdict on its gold answers is cached (files only)."""
    path = pathlib.Path(cfg.source)
    if path.suffix in FILE_SUFFIXES:
        if not path.exists():
            raise DataError(f"data.source: {path}: no such file")
        return _file_rows(path), _check_cache(path, cfg)
    if not cfg.source or path.exists():
        raise DataError(f"data.source = {cfg.source!r}: give a {', '.join(FILE_SUFFIXES)} file, a hub id or a task")
    return _hub_rows(cfg), None


def _unreadable(golds: Sequence[str], cache: pathlib.Path | None, parsable: Parsable) -> set[str]:
    """The gold answers that the verifier cannot read, asked once per content of a file."""
    if cache is not None and cache.exists():
        return set(json.loads(cache.read_text()))
    unique = sorted(set(golds))
    found = {gold for gold, ok in zip(unique, parsable(unique), strict=True) if not ok}
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(sorted(found)))
        partial.rename(cache)
    return found


def load_problems(
    cfg: DataConfig,
    seed: int,
    parsable: Parsable,
    prompt_tokens: Callable[[Problem], int],
    log: Callable[[str], None] = print,
) -> Problems:
    """Opens a source and checks all of it.

    Args:
      parsable: which gold answers the verifier can read.
      prompt_tokens: length of a problem's task prompt.

    Raises:
      DataError: no such source, or bad rows (each with file, row and column) and `on_bad_row` is "error".
    """
    generated = _generated(cfg, seed)
    if generated is not None:
        return generated
    rows, cache = _open(cfg)
    good: list[tuple[int, Problem]] = []
    bad: list[tuple[int, str]] = []
    for number, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            good.append((number, parse_row(row, cfg)))
        except RowError as error:
            bad.append((number, str(error)))
    unreadable = _unreadable([problem.answer for _, problem in good], cache, parsable)
    kept = []
    for number, problem in good:
        if problem.answer in unreadable:
            bad.append((number, f"column 'answer': math-verify cannot read {problem.answer[:60]!r}"))
        elif (length := prompt_tokens(problem)) > cfg.max_prompt_tokens:
            bad.append(
                (number, f"column 'question': {length} tokens with its template, data.max_prompt_tokens is less")
            )
        else:
            kept.append(problem)
    if bad:
        lines = [f"  {cfg.source}, row {number}, {message}" for number, message in sorted(bad)]
        if cfg.on_bad_row == "error":
            total = f"{len(bad)} bad rows of {len(bad) + len(kept)} in {cfg.source}"
            raise DataError("\n".join([f"{total} (data.on_bad_row=drop leaves them out):", *lines]))
        more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        log("\n".join([f"dropped {len(bad)} bad rows of {len(bad) + len(kept)}:", *lines[:SHOWN], *more]))
    if not kept:
        raise DataError(f"{cfg.source}: no usable row")
    return Problems(kept.__getitem__, len(kept))
