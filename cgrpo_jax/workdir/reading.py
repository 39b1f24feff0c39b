"""Reads the files of a run: one that is done, still works, was killed or was damaged. Imports no jax.

What cannot be read is left out and reported to `say`, with file and line.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cgrpo_jax.errors import RunError
from cgrpo_jax.workdir.places import expanded
from cgrpo_jax.workdir.shades import LETTERS, read_widths

if TYPE_CHECKING:
    import pandas

Say = Callable[[str], None]
LARGEST = 2.0**1023  # numbers beyond it are refused


def null(_: str) -> None:
    """None, for NaN and the infinities that Python's JSON parser accepts."""


def _number(value: Any) -> bool:
    """Whether a value is a number, or None, which is written for one that is not finite."""
    return value is None or (type(value) in (int, float) and -LARGEST < value < LARGEST)


def _step_fault(row: Mapping[str, Any]) -> str:
    """What is wrong with a line of metrics; "" if nothing is, here and below."""
    if type(row.get("step")) is not int:
        return "no step"
    bad = [name for name, value in row.items() if not _number(value)]
    return f"{bad[0]!r} is no number" if bad else ""


def _texts(row: Mapping[str, Any], *names: str) -> str:
    """Which of these values is no text."""
    return next((f"{name!r} is no text" for name in names if not isinstance(row.get(name), str)), "")


def _attempt_fault(attempt: Any) -> str:
    if not isinstance(attempt, dict):
        return "an attempt is no object"
    if fault := _texts(attempt, "text", "status"):
        return fault
    if not (attempt.get("critique") is None or isinstance(attempt["critique"], str)):
        return "'critique' is no text"
    missing = [name for name in ("reward", "correct", "tokens", "finished", "answer") if name not in attempt]
    if missing or not _number(attempt["reward"]):
        return f"{missing[0]!r} is missing" if missing else "'reward' is no number"
    if not (attempt.get("source") is None or type(attempt["source"]) is int):
        return "'source' is no number"
    return _shades_fault(attempt) if "widths" in attempt or "logp" in attempt else ""


def _shades_fault(attempt: Mapping[str, Any]) -> str:
    """What is wrong with the probabilities of the tokens, see `workdir.shades`."""
    if fault := _texts(attempt, "widths", "logp"):
        return fault
    widths = read_widths(attempt["widths"])
    fits = sum(widths) == len(attempt["text"]) and len(widths) == len(attempt["logp"])
    return "" if fits and set(attempt["logp"]) <= set(LETTERS) else "'widths' and 'logp' are not those of the text"


def _group_fault(group: Mapping[str, Any]) -> str:
    """What is wrong with a problem of a rollout."""
    if fault := _texts(group, "question", "answer", "tag"):
        return fault
    counts = {}
    for kind in ("responses", "refinements"):
        if not isinstance(group.get(kind), list):
            return f"{kind!r} is no list"
        if fault := next(filter(None, map(_attempt_fault, group[kind])), ""):
            return f"of {kind}: {fault}"
        counts[kind] = range(len(group[kind]))
    for name, of in (("kept", "responses"), ("selected", "refinements"), ("own_group", "refinements")):
        chosen = group.get(name, [] if name == "own_group" else None)
        if not isinstance(chosen, list) or not all(type(i) is int and i in counts[of] for i in chosen):
            return f"{name!r} does not name {of}"
    return ""


def _answer_fault(row: Mapping[str, Any]) -> str:
    """What is wrong with a graded answer."""
    return _texts(row, "question", "gold", "text") or ("" if "id" in row else "'id' is missing")


def _object(text: bytes, say: Say, where: str, fault: Callable[[Mapping[str, Any]], str]) -> dict[str, Any] | None:
    """The JSON object; None, with a report, where it is none or has a fault."""
    try:
        found = json.loads(text.decode("utf-8"), parse_constant=null)
        why = fault(found) if isinstance(found, dict) else "no JSON object"
    except (ValueError, RecursionError) as error:
        why = f"not valid JSON ({' '.join(str(error).split())[:100]})"
    if why:
        say(f"{where}: {why}; left out")
        return None
    return dict(found)


def _rows(path: pathlib.Path, say: Say, fault: Callable[[Mapping[str, Any]], str]) -> list[dict[str, Any]]:
    """The rows of a .jsonl file. A last line without an end was cut by a kill and is ignored."""
    lines = path.read_bytes().split(b"\n")[:-1]
    found = [_object(line, say, f"{path}, line {number}", fault) for number, line in enumerate(lines, 1)]
    return [row for row in found if row is not None]


def config(workdir: pathlib.Path, say: Say) -> dict[str, Any]:
    """The object of `config.json`; empty where there is no such file."""
    path = workdir / "config.json"
    return (_object(path.read_bytes(), say, str(path), lambda _: "") or {}) if path.exists() else {}


def metrics(workdir: pathlib.Path, say: Say) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`: training and evaluation have one each per step. Raises RunError without a file."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise RunError(f"{path}: no such file; give the workdir of a run of training")
    return _rows(path, say, _step_fault)


def rollouts(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The files of rollouts, one per step, by step."""
    named = [path for path in (workdir / "rollouts").glob("*.jsonl") if re.fullmatch(r"[0-9]{6,18}", path.stem)]
    return sorted(named, key=lambda path: int(path.stem))


def groups(path: pathlib.Path, say: Say) -> list[dict[str, Any]]:
    """The problems of a file of rollouts."""
    return _rows(path, say, _group_fault)


def graded(workdir: pathlib.Path, task: str, say: Say) -> list[dict[str, Any]]:
    """The graded answers of a task of an evaluation; empty, with a report, where there is no such file."""
    path = workdir / "eval" / task / "graded.jsonl"
    if not path.is_file():
        say(f"{path}: no such file")
        return []
    return _rows(path, say, _answer_fault)


ROLLOUT_COLUMNS = (
    "step", "problem", "question", "gold", "tag", "kind", "attempt", "source", "text", "answer", "status", "reward",
    "correct", "critique", "trained", "tokens", "finished",
)  # fmt: skip


class RunTables(NamedTuple):
    """A run as pandas tables."""

    metrics: pandas.DataFrame  # one row per step; NaN where a metric was not measured
    rollouts: pandas.DataFrame  # one row per attempt, ROLLOUT_COLUMNS


def last_metrics(folder: pathlib.Path) -> dict[str, Any]:
    """The metrics of the last step, and those of the last evaluation where there is one (`eval/...`)."""
    last: dict[bool, dict[str, Any]] = {}
    for row in metrics(folder, warnings.warn):
        last[any(name.startswith("eval/") for name in row)] = row
    return last.get(True, {}) | last[False]


def _attempts(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """ROLLOUT_COLUMNS of each attempt of a step."""
    for problem, group in enumerate(groups(path, warnings.warn)):
        shared = {"step": int(path.stem), "problem": problem, "question": group["question"], "gold": group["answer"]}
        second = group["selected"] + group.get("own_group", [])
        for kind, trained in (("response", group["kept"]), ("refinement", second)):
            for index, attempt in enumerate(group[f"{kind}s"]):
                own = {"kind": kind, "attempt": index, "tag": group["tag"], "trained": index in trained}
                yield shared | own | attempt


def load_run(workdir: str | os.PathLike) -> RunTables:
    """Metrics and rollouts of a run of training, also one that still works or was killed. Loads pandas, and no jax.

    The `source` of a refinement is the `attempt` of the response that it refines; it was given that response's
    `critique`. `trained`: the attempt is a row of the update. A damaged line is left out, with a warning that names it.

    Raises: RunError where `workdir` holds no metrics.
    """
    folder = expanded(workdir)
    steps: dict[int, dict[str, Any]] = {}
    for row in metrics(folder, warnings.warn):  # training and evaluation of a step have a line each
        steps.setdefault(row["step"], {}).update(row)
    import pandas

    files = rollouts(folder)
    attempts = pandas.DataFrame([row for file in files for row in _attempts(file)], columns=list(ROLLOUT_COLUMNS))
    attempts["source"] = attempts["source"].astype("Int64")
    return RunTables(pandas.DataFrame([steps[step] for step in sorted(steps)]), attempts)
