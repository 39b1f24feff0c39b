"""What a run has written so far, read: also of one that still works, or was killed, or was damaged. Imports no jax.

What cannot be read is told to `say`, with file and line, and left out; the rest is read.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from cgrpo_jax.errors import RunError
from cgrpo_jax.workdir.shades import LETTERS, read_widths

Say = Callable[[str], None]
LARGEST = 2.0**1023  # of a number


def null(_: str) -> None:
    """What stands for NaN and the infinities, which JSON does not know."""


def _number(value: Any) -> bool:
    """Also None, which stands for what is not finite."""
    return value is None or (type(value) in (int, float) and -LARGEST < value < LARGEST)


def _step_fault(row: Mapping[str, Any]) -> str:
    """What a line of metrics lacks."""
    if type(row.get("step")) is not int:
        return "no step"
    bad = [name for name, value in row.items() if not _number(value)]
    return f"{bad[0]!r} is no number" if bad else ""


def _texts(row: Mapping[str, Any], *names: str) -> str:
    """Which of these is no text."""
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
    """What is wrong with the probabilities of an attempt's tokens, see `workdir.shades`."""
    if fault := _texts(attempt, "widths", "logp"):
        return fault
    widths = read_widths(attempt["widths"])
    fits = sum(widths) == len(attempt["text"]) and len(widths) == len(attempt["logp"])
    return "" if fits and set(attempt["logp"]) <= set(LETTERS) else "'widths' and 'logp' are not those of the text"


def _group_fault(group: Mapping[str, Any]) -> str:
    """What a problem of a rollout lacks."""
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
    """What a graded answer lacks."""
    return _texts(row, "question", "gold", "text") or ("" if "id" in row else "'id' is missing")


def _object(text: bytes, say: Say, where: str, fault: Callable[[Mapping[str, Any]], str]) -> dict[str, Any] | None:
    """The JSON object, or None, which is said."""
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
    """The rows of a .jsonl file; what a kill left of a last line is none, and not said."""
    lines = path.read_bytes().split(b"\n")[:-1]
    found = [_object(line, say, f"{path}, line {number}", fault) for number, line in enumerate(lines, 1)]
    return [row for row in found if row is not None]


def config(workdir: pathlib.Path, say: Say) -> dict[str, Any]:
    """`config.json`; nothing where it is not there."""
    path = workdir / "config.json"
    return (_object(path.read_bytes(), say, str(path), lambda _: "") or {}) if path.exists() else {}


def metrics(workdir: pathlib.Path, say: Say) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`: training and evaluation of a step have one each. Raises RunError without a file."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise RunError(f"{path}: no such file; give the workdir of a run of training")
    return _rows(path, say, _step_fault)


def rollouts(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The files of rollouts, a step each, in their order."""
    named = [path for path in (workdir / "rollouts").glob("*.jsonl") if re.fullmatch(r"[0-9]{6,18}", path.stem)]
    return sorted(named, key=lambda path: int(path.stem))


def groups(path: pathlib.Path, say: Say) -> list[dict[str, Any]]:
    """The problems of a file of rollouts."""
    return _rows(path, say, _group_fault)


def graded(workdir: pathlib.Path, task: str, say: Say) -> list[dict[str, Any]]:
    """The graded answers of a task of an evaluation; none, which is said, where their file is not there."""
    path = workdir / "eval" / task / "graded.jsonl"
    if not path.is_file():
        say(f"{path}: no such file")
        return []
    return _rows(path, say, _answer_fault)
