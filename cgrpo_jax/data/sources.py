"""Problems from files, the hub or a generator; every bad row is found before anything compiles; O(1) seek."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cgrpo_jax import grading
from cgrpo_jax.data import arithmetic
from cgrpo_jax.data.rows import Parsed, RowError, parse_row
from cgrpo_jax.grading.rewards import REASONING_GYM_TASKS
from cgrpo_jax.grading.verifier import Reading
from cgrpo_jax.options import DataConfig
from cgrpo_jax.records import Problem
from cgrpo_jax.text.prompts import question_messages
from cgrpo_jax.text.tokenizer import PromptError
from cgrpo_jax.workdir.compilation import cache_root

FILE_SUFFIXES = (".jsonl", ".parquet", ".csv")
GYM = "reasoning_gym:"
SHOWN = 20
CHECKED, TRIES, FAR = 128, 64, 1 << 24  # of generated tasks

Parsable = Callable[[Sequence[str]], list[Reading]]
Fault = Callable[[Problem], str | None]  # what is wrong with a problem, if anything


class DataError(ValueError):
    """A data source that cannot be used; lists every bad row."""


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


def _file_rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    """(line or row number from 1, row) of a local file; an unreadable line is an error in its place."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                yield number, RowError("-", "more cells than the header names") if None in row else row
    else:
        with path.open(encoding="utf-8-sig") as file:
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


def _generator(cfg: DataConfig, seed: int) -> Callable[[int], Problem]:
    """Problem by index, without end."""
    if cfg.split not in arithmetic.STREAMS:
        raise DataError(f"data.split = {cfg.split!r}: {cfg.source} has the splits {', '.join(arithmetic.STREAMS)}")
    if cfg.source == "arithmetic":
        return functools.partial(arithmetic.problem, seed, cfg.split)
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
        question, answer = entry["question"], str(entry["answer"])
        return Problem(question, answer, question_messages(question), "reasoning_gym", entry=entry)

    return get


def _generated(cfg: DataConfig, seed: int, fault: Fault, log) -> Problems:
    """A generated task. Its first problems are checked now; later ones as they come, by the same rule."""
    generate = _generator(cfg, seed)

    def get(index: int) -> Problem:
        for attempt in range(TRIES):  # a problem that is dropped is replaced by one from far away in the stream
            problem = generate(index + attempt * FAR)
            message = fault(problem)
            if message is None:
                return problem
            if cfg.on_bad_row == "error":
                raise DataError(f"{cfg.source}, problem {index}: {message} (data.on_bad_row=drop replaces such ones)")
        raise DataError(f"{cfg.source}, problem {index}: {message}, and so are the {TRIES - 1} tried instead of it")

    dropped = [index for index in range(CHECKED) if fault(generate(index))]
    if dropped and cfg.on_bad_row == "error":
        first = f"problem {dropped[0]}: {fault(generate(dropped[0]))}"
        raise DataError(
            f"{len(dropped)} of the first {CHECKED} problems of {cfg.source} are bad, {first} "
            "(data.on_bad_row=drop replaces such ones)"
        )
    if dropped:
        log(f"{cfg.source}: {len(dropped)} of the first {CHECKED} problems are replaced as they are too long")
    return Problems(get, None)


def open_rows(cfg: DataConfig) -> list[tuple[int, Mapping[str, Any] | RowError]]:
    """Numbered rows of a file or hub set. Raises DataError where there is none or it cannot be read."""
    path = pathlib.Path(cfg.source)
    local = path.suffix in FILE_SUFFIXES
    if local and not path.exists():
        raise DataError(f"data.source: {path}: no such file")
    if not local and (not cfg.source or path.exists()):
        raise DataError(f"data.source = {cfg.source!r}: give a {', '.join(FILE_SUFFIXES)} file, a hub id or a task")
    try:
        return list(_file_rows(path)) if local else list(_hub_rows(cfg))
    except (OSError, ValueError, ImportError, csv.Error) as error:
        raise DataError(f"{cfg.source}: cannot be read ({' '.join(str(error).split())[:300]})") from error


def _reader() -> list[str]:
    """Changes with whatever decides which golds can be read: the libraries, and each file of `grading`."""
    versions = [importlib.metadata.version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")]
    files = sorted(pathlib.Path(grading.__file__).parent.glob("*.py"))
    return versions + [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def _unreadable(golds: Sequence[str], parsable: Parsable) -> dict[str, str]:
    """What is wrong with gold answers that the verifier cannot read, asked once for each set of golds."""
    unique = sorted(set(golds))
    digest = hashlib.sha256(json.dumps([_reader(), unique]).encode()).hexdigest()
    cache = cache_root() / "checked_golds" / f"{digest}.json"
    if cache.exists():
        return json.loads(cache.read_text())
    readings = dict(zip(unique, parsable(unique), strict=True))
    found = {gold: "math-verify cannot read" for gold, reading in readings.items() if not reading.readable}
    unsure = {gold: f"math-verify gives up ({r.status}) on" for gold, r in readings.items() if r.status != "ok"}
    if not unsure:  # a busy machine is no property of a gold
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found))
        partial.rename(cache)
    return found | unsure


def prompt_fault(problem: Problem, *, prompt_tokens: Callable[[Problem], int], most: int) -> str | None:
    """What is wrong with a problem's prompt: too long, or not to be encoded safely."""
    try:
        length = prompt_tokens(problem)
    except PromptError as error:
        return str(error)
    over = f"{length} tokens with its template, data.max_prompt_tokens is {most}"
    return over if length > most else None


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
      prompt_tokens: length of a problem's task prompt; raises PromptError for text that cannot be encoded safely.

    Raises:
      DataError: no such source, or bad rows (each with file, row and column) and `on_bad_row` is "error".
    """
    fault = functools.partial(prompt_fault, prompt_tokens=prompt_tokens, most=cfg.max_prompt_tokens)
    if cfg.source == "arithmetic" or cfg.source.startswith(GYM):
        return _generated(cfg, seed, fault, log)
    good: list[tuple[int, Parsed]] = []
    bad: list[tuple[int, str]] = []
    for number, row in open_rows(cfg):
        try:
            if isinstance(row, RowError):
                raise row
            good.append((number, parse_row(row, cfg)))
        except RowError as error:
            bad.append((number, str(error)))
    unreadable = _unreadable([parsed.problem.answer for _, parsed in good], parsable)
    kept = []
    for number, (problem, question_column, answer_column) in good:
        if problem.answer in unreadable:
            reason = f"{unreadable[problem.answer]} {problem.answer[:60]!r}"
            bad.append((number, str(RowError(answer_column, reason))))
        elif message := fault(problem):
            bad.append((number, str(RowError(question_column, message))))
        else:
            kept.append(problem)
    report_bad_rows(bad, len(kept), cfg, log)
    return Problems(kept.__getitem__, len(kept))


def report_bad_rows(bad: Sequence[tuple[int, str]], kept: int, cfg: DataConfig, log: Callable[[str], None]) -> None:
    """Refuses, or names, the rows that are left out."""
    lines = [f"  {cfg.source}, row {number}, {message}" for number, message in sorted(bad)]
    if bad and cfg.on_bad_row == "error":
        total = f"{len(bad)} bad rows of {len(bad) + kept} in {cfg.source}"
        raise DataError("\n".join([f"{total} (data.on_bad_row=drop leaves them out):", *lines]))
    if bad:
        more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        log("\n".join([f"dropped {len(bad)} bad rows of {len(bad) + kept}:", *lines[:SHOWN], *more]))
    if not kept:
        raise DataError(f"{cfg.source}: no usable row")
