"""What a run has written so far, read: also of one that still works, or was killed. Imports no jax."""

from __future__ import annotations

import json
import pathlib
from typing import Any


class RunError(ValueError):
    """A workdir that holds no run of training."""


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; what a kill left of a last line is none."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n")[:-1]]


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`: training and evaluation of a step have one each. Raises RunError without a file."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise RunError(f"{path}: no such file; give the workdir of a run of training")
    return rows(path)


def rollouts(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The files of rollouts, a step each, in their order."""
    return sorted((workdir / "rollouts").glob("[0-9]*.jsonl"), key=lambda path: int(path.stem))
