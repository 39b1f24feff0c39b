"""Prints a plan as text and as JSON."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

from cgrpo_jax.planner.chips import GIB
from cgrpo_jax.planner.cost import Cost
from cgrpo_jax.planner.figures import LIKELY_BANDWIDTH, LIKELY_FLOPS, total_bytes
from cgrpo_jax.planner.making import Plan
from cgrpo_jax.planner.memory import Occupied, largest_part
from cgrpo_jax.planner.most import Most
from cgrpo_jax.workdir.progress import duration


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if math.isfinite(size) else "?"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns, the first column aligned left and the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return lines


def text(plan: Plan) -> str:
    """What `python -m cgrpo_jax.plan` prints."""
    parts = [_head(plan), "", *_memory(plan), "", *_seconds(plan), "", *_classes(plan), ""]
    return "\n".join(parts + _verdict(plan) + _largest(plan) + _run(plan)).rstrip()


def _head(plan: Plan) -> str:
    run, chip, mesh = plan.run, plan.topology.chip, plan.run.mesh
    shape = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    of_chip = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    rates = ""
    if chip is not None:
        layout = "x".join(map(str, plan.topology.shape))
        rates = (
            f" ({layout}): {chip.peak / 1e12:.0f} Tflop/s, {_gib(chip.hbm)} GiB at {chip.bandwidth / 1e9:.0f} GB/s, "
            f"ICI {plan.topology.ici / 1e9:.0f} GB/s each"
        )
    lines = [
        f"{run.cfg.model.path}: {run.policy.shape.layers} layers, {parameters(plan) / 1e9:.2f} G parameters, "
        f"{run.learner.dtype.name}; mesh {shape}",  # type: ignore[union-attr]
        f"{plan.topology.name}: {of_chip}{rates}",
        f"compiled: {len(plan.places)} of {plan.programs} programs, the largest of each kind. Bytes are those of the "
        "compiled programs; seconds are estimates. Nothing was run.",
    ]
    return "\n".join(lines)


def parameters(plan: Plan) -> int:
    """How many parameters the model has."""
    (own,) = [resident for resident in plan.classes if resident.name == "parameters"]
    return sum(math.prod(leaf.shape) * count for leaf, count in own.leaves.items())


def _memory(plan: Plan) -> list[str]:
    head = "GiB a chip|arguments|outputs|temporary|peak|+ beside|= in all|compile s"
    rows: list[Sequence[str]] = [head.split("|")]
    for place in plan.places.values():
        f = place.figures
        sizes = (f.argument_bytes, f.output_bytes, f.temporary_bytes, f.peak_bytes)
        cells = [*map(_gib, sizes), _gib(sum(place.beside.values())), _gib(place.bytes), f"{f.compile_seconds:.0f}"]
        rows.append((f.name, *cells))
    limit = f"{_gib(plan.hbm)} GiB" if plan.hbm is not None else "unknown"
    return [*_table(rows), f"of {limit} a chip; beside: tensors of the run that are no arguments of the program"]


def _seconds(plan: Plan) -> list[str]:
    if plan.topology.chip is None:
        return ["seconds: not estimated: the rates of these devices are not in the table of chips"]
    head = "seconds, estimated|computing|kernels|(at peak)|wire GB|(async)|wire s|each turn|MFU (at peak)"
    rows: list[Sequence[str]] = [head.split("|")]
    for f in plan.figures.values():
        s, used = f.seconds, plan.utilisation if f.kind == "update" else None
        wire = [f"{size / 1e9:.3g}" for size in (f.cost.wire_bytes, sum(f.cost.behind.values()))]
        turn, mfu = _s(f.turn.total()) if f.turn else "", f"{used[0]:.2f} ({used[1]:.2f})" if used else ""
        rows.append((f.name, _s(s.computing), _s(s.kernels), _s(s.kernels_at_peak), *wire, _s(s.wire), turn, mfu))
    return [
        *_table(rows),
        f"computing: the compiler's cycles. kernels (Pallas): {LIKELY_FLOPS:g} of the peak's flops or "
        f"{LIKELY_BANDWIDTH:g} of its bytes, whichever is slower.",
        "wire: rings at the full ICI rate; (async): of these GB, started before they are needed.",
        "Loops whose length depends on data (bins of an update, tokens of a chunk) count once; each turn: one more.",
    ]


def _s(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:.4f}" if seconds < 1 else f"{seconds:.2f}"


def _classes(plan: Plan) -> list[str]:
    rows = [("tensors of the run", "GiB a chip")]
    return _table([*rows, *((c.name, _gib(total_bytes(c.leaves))) for c in plan.classes)])


def _verdict(plan: Plan) -> list[str]:
    if plan.hbm is None:
        return ["fits: unknown, as is the memory of these devices"]
    lines = []
    for place in plan.unfit:
        name, size, knob = largest_part(place, plan.classes)
        over = f"{_gib(place.bytes)} of {_gib(plan.hbm)} GiB a chip"
        part = f"the largest part is {name}, {_gib(size)} GiB: {knob}"
        lines.append(f"does not fit: {place.figures.name}: {over}; {part}")
        if place.figures.refused:
            lines.append(f"  the compiler: {place.figures.refused}")
    if lines:
        return lines
    fullest = max(plan.places.values(), key=operator.attrgetter("bytes"), default=None)
    if fullest is None:
        return []
    return [f"fits: {_gib(fullest.bytes)} of {_gib(plan.hbm)} GiB a chip at the fullest ({fullest.figures.name})"]


def _largest(plan: Plan) -> list[str]:
    lines = []
    for what, found in (("rows of the sampler", plan.rows), (f"{plan.bin_unit} of a bin", plan.bins)):
        if found is None or plan.hbm is None:
            continue
        if found.number:
            lines.append(f"most {what}: {found.number}, {_gib(found.bytes)} of {_gib(plan.hbm)} GiB a chip (compiled)")
        else:
            lines.append(f"most {what}: none; the fewest would take about {_gib(found.bytes)} GiB a chip")
    return lines


def _run(plan: Plan) -> list[str]:
    cfg, lines = plan.run.cfg, []
    for step in plan.steps:
        lines.append(
            f"a step at {step.share:.0%} of the longest: {duration(step.seconds)} (sampling {duration(step.sample)}, "
            f"prefill {duration(step.prefill)}, update {duration(step.update)}, else {duration(step.others)}), "
            f"{step.tokens / 1e6:.3g} M tokens drawn; the run of {cfg.train.steps} steps: "
            f"{step.seconds * cfg.train.steps / 3600:.1f} h, {step.tokens * cfg.train.steps / 1e6:,.0f} M tokens"
        )
    kept = cfg.checkpoint.keep + bool(cfg.checkpoint.best)
    lines.append(
        f"a checkpoint: {plan.checkpoint / 1e9:.1f} GB; {kept} are kept, and one more is written before the oldest "
        f"goes: {(kept + 1) * plan.checkpoint / 1e9:.0f} GB under --workdir, a disk that all hosts mount (a TPU VM's "
        "own has 100 GB)"
    )
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """What `--json` writes: programs by kind, bytes per chip."""
    return {
        "topology": plan.topology.name,
        "chips": plan.run.mesh.size,
        "model": plan.run.cfg.model.path,
        "parameters": parameters(plan),
        "hbm_bytes": plan.hbm,
        "fits": None if plan.hbm is None else not plan.unfit,
        "programs": {kind: _program(place, plan) for kind, place in plan.places.items()},
        "resident_bytes": {c.name: total_bytes(c.leaves) for c in plan.classes},
        "most_rows": _most(plan.rows),
        "most_in_a_bin": _most(plan.bins),
        "steps": [step._asdict() | {"seconds": step.seconds} for step in plan.steps],
        "checkpoint_bytes": plan.checkpoint,
    }


def _finite(size: float) -> float | None:
    return size if math.isfinite(size) else None


def _most(found: Most | None) -> dict[str, Any] | None:
    return {"number": found.number, "bytes": _finite(found.bytes)} if found else None


def _program(place: Occupied, plan: Plan) -> dict[str, Any]:
    f, used = place.figures, plan.utilisation
    made = {
        "program": f.name,
        "argument_bytes": f.argument_bytes,
        "output_bytes": f.output_bytes,
        "temporary_bytes": f.temporary_bytes,
        "peak_bytes": _finite(f.peak_bytes),
        "beside_bytes": sum(place.beside.values()),
        "compile_seconds": f.compile_seconds,
        "estimated_cycles": f.cost.cycles,
        "estimated_seconds": f.seconds.computing,
        "kernel_seconds": f.seconds.kernels,
        "kernel_seconds_at_peak": f.seconds.kernels_at_peak,
        "wire_bytes": f.cost.wire_bytes,
        "wire_seconds": f.seconds.wire,
        "each_turn": f.turn._asdict() if f.turn else None,
        "collectives": _collectives(f.cost),
        "kernels": {name: dataclasses.asdict(kernel) for name, kernel in f.cost.kernels.items()},
        "refused": f.refused or None,
    }
    if used and f.kind == "update":
        made |= {"mfu": used[0], "mfu_at_peak": used[1]}
    return made


def _collectives(cost: Cost) -> list[dict[str, Any]]:
    """The collectives of a program, those with most bytes first."""
    found = list[dict[str, Any]]()
    for key, wire in cost.wire.most_common():
        sizes = {"times": cost.times[key], "wire_bytes": wire, "asynchronous_bytes": cost.behind[key]}
        found.append(dict(zip(("name", "dtype", "devices"), key, strict=True)) | sizes)
    return found
