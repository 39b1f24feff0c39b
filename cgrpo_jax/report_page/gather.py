"""Collects what the report shows of a run besides rollouts: metrics, evaluations, configuration."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from cgrpo_jax.config import METHODS
from cgrpo_jax.config.options import drawn
from cgrpo_jax.data.told import for_others, public_name
from cgrpo_jax.errors import ReportError
from cgrpo_jax.evaluation import tables
from cgrpo_jax.workdir import reading
from cgrpo_jax.workdir.changes import flat
from cgrpo_jax.workdir.metrics import NOTES

POINTS = 2000  # of a curve, at most
DIGITS = 6  # significant ones


def method_of(config: Mapping[str, Any]) -> str:
    """The named method with most settings of those whose settings all hold; the verb, where it is not `rl`."""
    if config.get("method") != "rl":
        return str(config.get("method", "evaluation"))
    held = [name for name, settings in METHODS.items() if all(config.get(key) == settings[key] for key in settings)]
    return max(held, key=lambda name: len(METHODS[name]))


def _joined(values: Sequence[Any], largest: bool) -> float | None:
    """The mean or the maximum of the values that are not None; None where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return float(f"{max(known) if largest else sum(known) / len(known):.{DIGITS}g}")


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"steps": [...], "values": {name: [...]}, "each": rows per point}; a missing value is None."""
    each = -(-len(rows) // POINTS) if rows else 1
    parts = [rows[first : first + each] for first in range(0, len(rows), each)]
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    values = {
        name: [_joined([row.get(name) for row in part], name.endswith("_max")) for part in parts] for name in names
    }
    return {"steps": [part[-1]["step"] for part in parts], "values": values, "each": each}


def metrics_of(workdir: pathlib.Path, say: reading.Say) -> list[dict[str, Any]]:
    """The curves of training, then those of evaluations; either may be empty."""
    rows = reading.metrics(workdir, say) if (workdir / "metrics.jsonl").exists() else []
    evaluated = [any(name.startswith("eval/") for name in row) for row in rows]
    return [_curves([row for row, own in zip(rows, evaluated, strict=True) if own is kind]) for kind in (False, True)]


def evaluation_of(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The table of `results.json` and the mean of its tasks; None where there is none."""
    if not (workdir / "results.json").exists():
        return None
    results = tables.read(workdir)
    table = tables.table(results)._asdict()
    of = {"model": results["model"], "asked": tables.asked(results), "mean": results["mean"]}
    return table | of | {"drawn": tables.drawn_of(results), "tasks": list(results["tasks"])}


def compared(workdirs: Mapping[str, pathlib.Path]) -> dict[str, Any] | None:
    """The differences of evaluated runs on the problems they share; None with fewer than two such runs."""
    evaluated = {name: tables.read(path) for name, path in workdirs.items() if (path / "results.json").exists()}
    if len(evaluated) < 2:
        return None
    try:
        return tables.differences(evaluated)._asdict()
    except ReportError as error:
        return tables.Table([], [], [f"Not compared: {error}."])._asdict()


def drawn_in(config: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> str:
    """How the answers that pass@1 counts were sampled; "" where that is unknown."""
    if results is not None:
        return str(results["drawn"])
    known = "eval.temperature" in config and "eval.top_p" in config
    return drawn(config["eval.temperature"], config["eval.top_p"]) if known else ""


def run_of(name: str, workdir: pathlib.Path) -> dict[str, Any]:
    """All that the report shows of a run but its rollouts; `damaged` lists what could not be read.

    Raises RunError where `workdir` holds neither metrics nor an evaluation.
    """
    damaged: list[str] = []
    training, evaluations = metrics_of(workdir, damaged.append)
    results, config = evaluation_of(workdir), flat(reading.config(workdir, damaged.append))
    if not (training["steps"] or evaluations["steps"] or results):
        raise reading.RunError(f"{workdir}: neither metrics.jsonl nor results.json; give the workdir of a run")
    method = method_of(config) if config else "evaluation" if results else "unknown"
    model = public_name("model.path", str(results["model"] if results else config.get("model.path", "")), marked=True)
    seen = {name for name in training["values"] if name in NOTES}
    return {
        "name": name,
        "method": method,
        "model": model,
        "drawn": drawn_in(config, results),
        "planned": None if results else config.get("train.steps"),
        "damaged": damaged,
        "training": training,
        "evaluations": evaluations,
        "results": results,
        "config": for_others(config, marked=True),
        "notes": {name: NOTES[name] for name in sorted(seen)},
    }
