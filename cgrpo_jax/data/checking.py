"""Every bad row of a source is found before anything compiles: parsed, its gold read, its prompt measured."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cgrpo_jax import grading
from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data.cells import RowError
from cgrpo_jax.data.rows import Parsed
from cgrpo_jax.errors import DataError, PromptError
from cgrpo_jax.grading.golds import hopeless
from cgrpo_jax.grading.verifier import Reading
from cgrpo_jax.records import Problem
from cgrpo_jax.workdir.places import cache_folder

SHOWN = 20
ALIKE = 3  # so many rows with the same fault have a line each
EVERY = 10.0  # seconds between two lines about a long check
LONG = 1_000_000  # characters of a question

Parsable = Callable[[Sequence[str]], list[Reading]]
Parse = Callable[[Mapping[str, Any], int], Parsed]  # (row, its number) -> problem
Fault = Callable[[Problem], str | None]  # what is wrong with a problem, if anything
Log = Callable[[str], None]
Numbered = tuple[int, Mapping[str, Any] | RowError]  # a row, or what is wrong with it, and its number from 1


def _reader() -> list[str]:
    """Changes with whatever decides which golds can be read: the libraries, and each file of `grading`."""
    versions = [importlib.metadata.version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")]
    files = sorted(pathlib.Path(grading.__file__).parent.glob("*.py"))
    return versions + [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def _unreadable(golds: Sequence[str], parsable: Parsable) -> dict[str, str]:
    """What is wrong with gold answers that the verifier cannot read, asked once for each set of golds."""
    unique, folder = sorted(set(golds)), cache_folder("checked_golds")
    digest = hashlib.sha256(json.dumps([_reader(), unique]).encode()).hexdigest()
    cache = folder / f"{digest}.json" if folder else None
    with contextlib.suppress(OSError, ValueError):  # a cache that cannot be read is made again
        if cache and cache.exists():
            return json.loads(cache.read_text(encoding="utf-8"))
    readings = dict(zip(unique, parsable(unique), strict=True))
    found = {gold: "math-verify cannot read" for gold, reading in readings.items() if not reading.readable}
    unsure = {gold: f"math-verify gives up ({r.status}) on" for gold, r in readings.items() if r.status != "ok"}
    if cache and not unsure:  # a busy machine is no property of a gold
        with contextlib.suppress(OSError):
            partial = cache.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(found), encoding="utf-8")
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


def _parsed(row: Mapping[str, Any] | RowError, number: int, parse: Parse) -> Parsed:
    """Raises RowError for a row that makes no problem, or one whose gold no answer could equal."""
    if isinstance(row, RowError):
        raise row
    try:
        parsed = parse(row, number)
    except RecursionError:
        raise RowError("-", "too many lists within lists") from None
    if parsed.problem.grader == "math" and (why := hopeless(parsed.problem.answer)):
        raise RowError(parsed.answer_column, f"no answer could equal {parsed.problem.answer[:60]!r} ({why})")
    return parsed


def checked_rows(
    rows: Iterable[Numbered], parse: Parse, fault: Fault, parsable: Parsable | None, cfg: DataConfig, log: Log
) -> list[tuple[int, Parsed]]:
    """The rows that can be used, with their numbers; each other one is an error or is left out, and named.

    Args:
      parsable: which golds of the mathematical grader can be read; None: this is not asked.
      cfg: the source, and what is done with bad rows.
      log: is told now and then how far a long check is.

    Raises:
      DataError: bad rows (each with source, row and column) and `on_bad_row` is "error", or no usable row.
    """
    parsed: list[tuple[int, Parsed]] = []
    good: list[tuple[int, Parsed]] = []
    bad: list[tuple[int, str]] = []
    for number, row in rows:
        try:
            parsed.append((number, _parsed(row, number, parse)))
        except RowError as error:
            bad.append((number, str(error)))
    golds = [problem.answer for _, (problem, _, _) in parsed if problem.grader == "math"]
    unreadable = _unreadable(golds, parsable) if parsable and golds else {}
    told = time.monotonic()
    for done, (number, made) in enumerate(parsed):
        problem = made.problem
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            log(f"checked {done} of {len(parsed)} rows")
        if len(problem.question) > LONG:
            log(f"row {number}: measuring a question of {len(problem.question) / 1e6:.0f} million characters")
        if problem.grader == "math" and problem.answer in unreadable:
            reason = f"{unreadable[problem.answer]} {problem.answer[:60]!r}"
            bad.append((number, str(RowError(made.answer_column, reason))))
        elif message := fault(problem):
            bad.append((number, str(RowError(made.question_column, message))))
        else:
            good.append((number, made))
    _report(bad, len(good), cfg, log)
    return good


def _listed(bad: Sequence[tuple[int, str]], source: str) -> list[str]:
    """A line for each bad row; one for all of them that are bad for the same reason, where these are many."""
    numbers: dict[str, list[int]] = {}
    for number, message in sorted(bad):
        numbers.setdefault(message, []).append(number)
    lines = []
    for message, alike in numbers.items():
        if len(alike) > ALIKE:
            lines.append((alike[0], f"  {source}, rows {alike[0]} to {alike[-1]}, {len(alike)} of them, {message}"))
        else:
            lines += [(number, f"  {source}, row {number}, {message}") for number in alike]
    return [line for _, line in sorted(lines)]


def _report(bad: Sequence[tuple[int, str]], kept: int, cfg: DataConfig, log: Log) -> None:
    """Names the bad rows, in an error or in the log."""
    lines = _listed(bad, cfg.source)
    if bad and cfg.on_bad_row == "error":
        total = f"bad rows: {len(bad)} of {len(bad) + kept} in {cfg.source}"
        drop = " (--config.data.on_bad_row=drop leaves them out)" if kept else ""
        raise DataError("\n".join([f"{total}{drop}:", *lines]))
    if bad:
        more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        log("\n".join([f"bad rows left out: {len(bad)} of {len(bad) + kept}", *lines[:SHOWN], *more]))
    if not kept:
        raise DataError(f"{cfg.source}: no usable row")
