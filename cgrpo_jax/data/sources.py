"""Problems from files, the hub or a generator; every bad row is found before anything compiles; O(1) seek."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cgrpo_jax.config.options import GYM, DataConfig, generated
from cgrpo_jax.data import arithmetic
from cgrpo_jax.data.cells import TRACE, trace_of
from cgrpo_jax.data.checking import Fault, Log, Numbered, Parsable, checked_rows, prompt_fault
from cgrpo_jax.data.files import FILE_SUFFIXES, file_rows, local_file, with_shortest
from cgrpo_jax.data.rows import (
    Parsed,
    asked_by,
    column_mends,
    parse_own_row,
    parse_row,
    parse_target_row,
    scored_by_functions,
)
from cgrpo_jax.errors import DataError
from cgrpo_jax.grading.rewards import REASONING_GYM_TASKS
from cgrpo_jax.records import Message, Problem
from cgrpo_jax.text.prompts import TaskPrompt, question_messages
from cgrpo_jax.workdir.places import expanded

LARGE = 8_000_000  # bytes: reading such a file is said
HELD_OUT, MOST_HELD_OUT = 10, 256  # one question in so many of a file, and how many at most
CHECKED, TRIES, FAR = 128, 64, 1 << 24  # of generated tasks


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


def hold_out(whole: Problems, asked: Problems, source: str, seed: int, log: Log) -> tuple[Problems, Problems]:
    """Splits the rows of a file that has no split: what is trained on and what is evaluated, no question in both.

    A tenth of the distinct questions, `MOST_HELD_OUT` at most, by a hash of seed and question: the same ones in any
    order of the rows. All rows of such a question are left out of training.

    Args:
      whole: the rows to be trained on; asked: the same file as it is evaluated (another view of it in method=sft).

    Raises:
      DataError: there are no two questions.
    """
    training, evaluated = ([problems.get(index) for index in range(problems.size or 0)] for problems in (whole, asked))
    names = sorted({_asked_for(one) for one in training}, key=lambda name: _rank(seed, name))
    if len(names) < 2:
        raise DataError(f"{source}: one question is too few to hold one out; --config.eval.every=0 does without")
    held = set(names[: min(MOST_HELD_OUT, max(1, len(names) // HELD_OUT))])
    log(
        f"{source} has no split: {len(held)} of its {len(names)} questions are held out for evaluation (a tenth, "
        f"{MOST_HELD_OUT} at most, by seed={seed}) and never trained on; --config.eval.source=FILE evaluates others"
    )
    kept = [one for one in training if _asked_for(one) not in held]
    tests = {_asked_for(one): one for one in evaluated if _asked_for(one) in held}
    return Problems(kept.__getitem__, len(kept)), Problems(list(tests.values()).__getitem__, len(tests))


def _asked_for(problem: Problem) -> str:
    return json.dumps([dict(turn) for turn in problem.messages], sort_keys=True)


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def _hub_rows(cfg: DataConfig) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import datasets

    name, _, config = cfg.source.partition(":")
    loaded = datasets.load_dataset(name, config or None, split=cfg.split, revision=cfg.revision)
    yield from enumerate(with_shortest(loaded, loaded.features.arrow_schema), 1)  # type: ignore[union-attr,arg-type]


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


def _generated(cfg: DataConfig, seed: int, fault: Fault, log: Log, task: TaskPrompt, own: bool) -> Problems:
    """A generated task. Its first problems are checked now; later ones as they come, by the same rule."""
    drawn = _generator(cfg, seed)

    def generate(index: int) -> Problem:
        problem = asked_by(drawn(index), task)
        row = {"question": problem.question, "answer": problem.answer}
        return scored_by_functions(problem, row) if own else problem

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


def open_rows(cfg: DataConfig, log: Log | None = None) -> list[Numbered]:
    """Numbered rows of a file or hub set. Raises DataError where there is none or it cannot be read.

    Args:
      log: is told of a file that takes a while to be read, if it is given.
    """
    path = local_file(cfg.source)
    if path and not path.exists():
        raise DataError(f"{path}: no such file")
    if not path and (not cfg.source or expanded(cfg.source).exists()):
        raise DataError(f"data.source = {cfg.source!r}: give a {', '.join(FILE_SUFFIXES)} file, a hub id or a task")
    if log and path and path.stat().st_size > LARGE:
        log(f"reading {path}, {path.stat().st_size / 1e6:.0f} MB")
    try:
        return list(file_rows(path)) if path else list(_hub_rows(cfg))
    except (OSError, ValueError, ImportError, csv.Error) as error:
        raise DataError(f"{cfg.source}: cannot be read ({' '.join(str(error).split())[:300]})") from error


def mends(cfg: DataConfig, option: str) -> list[str]:
    """Options that may mend a source which cannot be read: a file of nearly that name, columns of other names.

    Args:
      option: the key that names the source.
    """
    path = local_file(cfg.source)
    if path and not path.exists():
        there = [str(near) for near in sorted(path.parent.glob("*")) if near.suffix.lower() in FILE_SUFFIXES]
        return [f"--config.{option}={near}" for near in difflib.get_close_matches(str(path), there, 1)]
    with contextlib.suppress(DataError):
        first = next((row for _, row in open_rows(cfg) if isinstance(row, Mapping)), None) if path else None
        return column_mends(first, cfg) if first is not None and option == "data.source" else []
    return []


def _listed(rows: Sequence[tuple[int, Parsed]]) -> Problems:
    kept = [parsed.problem for _, parsed in rows]
    return Problems(kept.__getitem__, len(kept))


def load_problems(
    cfg: DataConfig,
    seed: int,
    parsable: Parsable,
    prompt_tokens: Callable[[Problem], int],
    log: Log = print,
    traced: bool = False,
    task: TaskPrompt = question_messages,
    own: bool = False,
    answerless: bool = False,
) -> Problems:
    """Opens a source and checks all of it.

    Args:
      task: writes the task prompt, see `asked_by`.
      own: `reward.fn` scores them; answerless: and a row needs no answer.
      traced: each problem must come with a solution, see `trace_of`.
      parsable: which gold answers the verifier can read.
      prompt_tokens: length of a problem's task prompt; raises PromptError for text that cannot be encoded safely.

    Raises:
      DataError: no such source, or bad rows (each with file, row and column) and `on_bad_row` is "error".
    """
    fault = functools.partial(prompt_fault, prompt_tokens=prompt_tokens, most=cfg.max_prompt_tokens)
    untraced = DataError(f"{cfg.source} has no column {TRACE!r}, which refine.refiner=target takes its traces from")
    if generated(cfg.source):
        problems = _generated(cfg, seed, fault, log, task, own)
        if traced and TRACE not in problems.get(0).columns:
            raise untraced
        return problems
    rows = open_rows(cfg, log)
    if traced and not any(isinstance(row, Mapping) and row.get(TRACE) is not None for _, row in rows):
        raise untraced

    def parse(row: Mapping[str, Any], number: int) -> Parsed:
        parsed = parse_own_row(row, cfg, answerless) if own else parse_row(row, cfg)
        if traced:
            trace_of(parsed.problem)
        return parsed._replace(problem=asked_by(parsed.problem, task))

    return _listed(checked_rows(rows, parse, fault, parsable, cfg, log))


def load_targets(
    cfg: DataConfig,
    most: int,
    prompt_tokens: Callable[[Problem], int],
    target_tokens: Callable[[Problem], int],
    log: Log = print,
    task: TaskPrompt = question_messages,
) -> Problems:
    """Opens a source of rows to imitate and checks all of it; the text to learn is the `answer` of each.

    Args:
      most: tokens of a text, with its end.
      task: the task prompt of a bare question.
      prompt_tokens, target_tokens: lengths; raise PromptError for text that cannot be encoded safely.

    Raises:
      DataError: no such source, or bad rows (each with file, row and column) and `on_bad_row` is "error".
    """

    def fault(problem: Problem) -> str | None:
        length = target_tokens(problem)
        over = f"its text to learn has {length} tokens with its end, sampling.max_new_tokens is {most}"
        wrong = prompt_fault(problem, prompt_tokens=prompt_tokens, most=cfg.max_prompt_tokens)
        return wrong or (over if length > most else None)

    def parse(row: Mapping[str, Any], number: int) -> Parsed:
        return parse_target_row(row, cfg, task)

    return _listed(checked_rows(open_rows(cfg, log), parse, fault, None, cfg, log))


def rows_of_step(
    problems: Problems, source: str, seed: int, step: int, count: int
) -> list[tuple[Sequence[Message], str]]:
    """(chat turns, answer to learn) of a step of supervised training, in a seeded order that is new in each epoch.

    Of the warm start (data.source=arithmetic) steps of plain rows and of refinements, which are much longer, take
    turns, so that neither is padded to the length of the other.

    Args:
      count: rows of the step.
    """
    first = step * count
    if source == "arithmetic":
        return [arithmetic.warm_start_row(seed, index, step % 2 == 1) for index in range(first, first + count)]
    return [(row.messages, row.answer) for row in problems.batch(seed, first, count)]
