"""What a run of training wrote, as pandas tables. Loads no jax, and pandas only where a table is made."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from cgrpo_jax.workdir import reading
from cgrpo_jax.workdir.places import expanded

if TYPE_CHECKING:
    import pandas

ROLLOUT_COLUMNS = (
    "step", "problem", "question", "gold", "tag", "kind", "attempt", "source", "text", "answer", "status", "reward",
    "correct", "critique", "trained", "tokens", "finished",
)  # fmt: skip


class RunTables(NamedTuple):
    """A run as tables."""

    metrics: pandas.DataFrame  # a row a step; what was not measured at a step is NaN
    rollouts: pandas.DataFrame  # a row an attempt, ROLLOUT_COLUMNS


def last_metrics(folder: pathlib.Path) -> dict[str, Any]:
    """The metrics of the last step, and those of the last evaluation where there is one (`eval/...`)."""
    last: dict[bool, dict[str, Any]] = {}
    for row in reading.metrics(folder, warnings.warn):
        last[any(name.startswith("eval/") for name in row)] = row
    return last.get(True, {}) | last[False]


def _attempts(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """ROLLOUT_COLUMNS of each attempt of a step."""
    for problem, group in enumerate(reading.groups(path, warnings.warn)):
        shared = {"step": int(path.stem), "problem": problem, "question": group["question"], "gold": group["answer"]}
        second = group["selected"] + group.get("own_group", [])
        for kind, trained in (("response", group["kept"]), ("refinement", second)):
            for index, attempt in enumerate(group[f"{kind}s"]):
                own = {"kind": kind, "attempt": index, "tag": group["tag"], "trained": index in trained}
                yield shared | own | attempt


def load_run(workdir: str | os.PathLike) -> RunTables:
    """Metrics and rollouts of a run of training (one that still works, or was killed, too) as pandas tables.

    A refinement's `source` is the `attempt` of the response it refines; the critique it was given is that response's
    `critique`. `trained`: the attempt is a row of the update. A line that is damaged is left out, with a warning that
    names it.

    Raises: RunError where `workdir` holds no metrics.
    """
    folder = expanded(workdir)
    steps: dict[int, dict[str, Any]] = {}
    for row in reading.metrics(folder, warnings.warn):  # training and evaluation of a step have a line each
        steps.setdefault(row["step"], {}).update(row)
    import pandas

    files = reading.rollouts(folder)
    rollouts = pandas.DataFrame([row for file in files for row in _attempts(file)], columns=list(ROLLOUT_COLUMNS))
    rollouts["source"] = rollouts["source"].astype("Int64")
    return RunTables(pandas.DataFrame([steps[step] for step in sorted(steps)]), rollouts)
