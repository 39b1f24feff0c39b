"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cgrpo_jax.planner.chips import GIB, Topology
from cgrpo_jax.planner.figures import LIKELY_BANDWIDTH, LIKELY_FLOPS, Figures
from cgrpo_jax.planner.memory import Occupied, Resident, largest_part
from cgrpo_jax.planner.most import Most
from cgrpo_jax.planner.step import Step
from cgrpo_jax.run.build import Run
from cgrpo_jax.workdir.progress import duration


@dataclasses.dataclass
class Plan:
    """All that a plan found."""

    run: Run
    topology: Topology
    hbm: float | None  # bytes of a chip; None: not known
    programs: int  # that the run has
    places: dict[str, Occupied]  # kind -> its largest program
    classes: Sequence[Resident]
    utilisation: tuple[float, float] | None = None  # of the update, see step.utilisation
    steps: Sequence[Step] = ()  # the longest first
    rows: Most | None = None
    bins: Most | None = None
    bin_unit: str = "rows"
    checkpoint: int = 0  # bytes

    @property
    def figures(self) -> dict[str, Figures]:
        return {kind: place.figures for kind, place in self.places.items()}

    @property
    def chips(self) -> int:
        return self.run.mesh.size

    @property
    def unfit(self) -> list[Occupied]:
        """Programs that do not fit, the worst first."""
        bad = [place for place in self.places.values() if not self._fits(place)]
        return sorted(bad, key=_bytes, reverse=True)

    def _fits(self, place: Occupied) -> bool:
        return not place.figures.refused and (self.hbm is None or place.bytes <= self.hbm)


def _bytes(place: Occupied) -> float:
    return place.bytes


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if math.isfinite(size) else "?"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first one to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return lines


def text(plan: Plan) -> str:
    parts = [_head(plan), "", *_memory(plan), "", *_seconds(plan), "", *_classes(plan), ""]
    return "\n".join(parts + _verdict(plan) + _largest(plan) + _run(plan)).rstrip()


def _head(plan: Plan) -> str:
    run, chip, mesh = plan.run, plan.topology.chip, plan.run.mesh
    shape = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    of_chip = f"{plan.chips} x {mesh.devices.flat[0].device_kind}"
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
    """Of the model."""
    (own,) = [resident for resident in plan.classes if resident.name == "parameters"]
    return sum(math.prod(leaf.shape) * count for leaf, count in own.leaves.items())


def _memory(plan: Plan) -> list[str]:
    rows: list[Sequence[str]] = [
        ("GiB a chip", "arguments", "outputs", "temporary", "peak", "+ beside", "= in all", "compile s")
    ]
    for place in plan.places.values():
        f = place.figures
        sizes = (f.argument_bytes, f.output_bytes, f.temporary_bytes, f.peak_bytes)
        cells = [*map(_gib, sizes), _gib(sum(place.beside.values())), _gib(place.bytes), f"{f.compile_seconds:.0f}"]
        rows.append((f.name, *cells))
    limit = f"{_gib(plan.hbm)} GiB" if plan.hbm is not None else "unknown"
    return [*_table(rows), f"of {limit} a chip; beside: tensors of the run that the program is not handed"]


def _seconds(plan: Plan) -> list[str]:
    if plan.topology.chip is None:
        return ["seconds: not estimated, for the rates of these devices are not in the table of chips"]
    head = (
        "seconds, estimated",
        "computing",
        "kernels",
        "(at peak)",
        "wire GB",
        "(async)",
        "wire s",
        "each turn",
        "MFU (at peak)",
    )
    rows: list[tuple[str, ...]] = [head]
    for f in plan.figures.values():
        s, used = f.seconds, plan.utilisation if f.kind == "update" else None
        rows.append(
            (
                f.name,
                _s(s.computing),
                _s(s.kernels),
                _s(s.kernels_at_peak),
                f"{f.cost.wire_bytes / 1e9:.3g}",
                f"{sum(f.cost.behind.values()) / 1e9:.3g}",
                _s(s.wire),
                _s(f.turn.total()) if f.turn else "",
                f"{used[0]:.2f} ({used[1]:.2f})" if used else "",
            )
        )
    return [
        *_table(rows),
        f"computing: the compiler's cycles. kernels (Pallas): {LIKELY_FLOPS:g} of the peak's flops or "
        f"{LIKELY_BANDWIDTH:g} of its bytes, whichever is slower.",
        "wire: rings at the full ICI rate; (async): of these GB, started before they are needed.",
        "A loop whose turns data decide (bins of an update, tokens of a chunk) is counted once; each turn: one more.",
    ]


def _s(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:.4f}" if seconds < 1 else f"{seconds:.2f}"


def _classes(plan: Plan) -> list[str]:
    rows = [("tensors of the run", "GiB a chip")]
    rows += [(c.name, _gib(sum(leaf.bytes * count for leaf, count in c.leaves.items()))) for c in plan.classes]
    return _table(rows)


def _verdict(plan: Plan) -> list[str]:
    if plan.hbm is None:
        return ["fits: not known, for the memory of these devices is not"]
    lines = []
    for place in plan.unfit:
        name, size, knob = largest_part(place, plan.classes)
        over = f"{_gib(place.bytes)} of {_gib(plan.hbm)} GiB a chip"
        lines.append(
            f"does not fit: {place.figures.name}: {over}; the largest part is {name}, {_gib(size)} GiB: {knob}"
        )
        if place.figures.refused:
            lines.append(f"  the compiler: {place.figures.refused}")
    if lines:
        return lines
    fullest = max(plan.places.values(), key=_bytes, default=None)
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
    """Programs by their kinds, bytes a chip."""
    programs = {kind: _program(place, plan) for kind, place in plan.places.items()}
    return {
        "topology": plan.topology.name,
        "chips": plan.chips,
        "model": plan.run.cfg.model.path,
        "parameters": parameters(plan),
        "hbm_bytes": plan.hbm,
        "fits": None if plan.hbm is None else not plan.unfit,
        "programs": programs,
        "resident_bytes": {c.name: sum(leaf.bytes * n for leaf, n in c.leaves.items()) for c in plan.classes},
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
        "collectives": _collectives(f),
        "kernels": {name: dataclasses.asdict(kernel) for name, kernel in f.cost.kernels.items()},
        "refused": f.refused or None,
    }
    if used and f.kind == "update":
        made |= {"mfu": used[0], "mfu_at_peak": used[1]}
    return made


def _collectives(figures: Figures) -> list[Mapping[str, Any]]:
    cost = figures.cost
    return [
        {
            "name": key[0],
            "dtype": key[1],
            "devices": key[2],
            "times": cost.times[key],
            "wire_bytes": wire,
            "asynchronous_bytes": cost.behind[key],
        }
        for key, wire in cost.wire.most_common()
    ]
