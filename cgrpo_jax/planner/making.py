"""From a configuration and the devices of a topology to a plan."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence

from cgrpo_jax.config import Config
from cgrpo_jax.errors import ConfigError
from cgrpo_jax.learning.packing import BinSize
from cgrpo_jax.planner import chips
from cgrpo_jax.planner.chips import CHIPS, GIB, LOCAL, Topology
from cgrpo_jax.planner.figures import compiled, leaves_of
from cgrpo_jax.planner.memory import ROWS, Occupied, Resident, checkpoint_bytes, occupied, residents
from cgrpo_jax.planner.most import most_in_a_bin, most_rows
from cgrpo_jax.planner.programs import Program, largest, programs
from cgrpo_jax.planner.report import Plan
from cgrpo_jax.planner.step import step, utilisation
from cgrpo_jax.run import build
from cgrpo_jax.run.build import Run
from cgrpo_jax.workdir.progress import Progress

SHARES = (1.0, 0.5)  # of the longest prompts and answers, for the estimates of a step


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a plan is asked for."""

    only: tuple[str, ...] = ()  # kinds of programs; none: all
    largest: bool = True  # whether the most rows that fit are looked for
    hlo: pathlib.Path | None = None  # folder for the texts of the programs


def found_here(run: Run) -> tuple[Topology, float | None]:
    """The machine at hand, and the bytes that a device of it has; None: not told."""
    device = run.mesh.devices.flat[0]
    chip = next((chip for chip in CHIPS.values() if chip.kind == device.device_kind), None)
    if chip is not None:
        return Topology(LOCAL, chip, (run.mesh.size,)), chip.hbm
    here, stats = Topology(LOCAL, None, ()), device.memory_stats()
    if stats and "bytes_limit" in stats:
        return here, float(stats["bytes_limit"])
    if device.platform != "cpu":
        return here, None
    return here, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / run.mesh.size


def make(cfg: Config, asked: Topology, wanted: Wanted, progress: Progress) -> Plan:
    """Compiles the largest program of each kind, and a few more to find the most rows that fit.

    Raises:
      ConfigError: the configuration, or a kind in `wanted.only`, is not known or impossible.
      CheckpointError, MeshError: no such model, or a mesh that the devices do not fill.
    """
    devices = None if asked.name == LOCAL else chips.devices(asked)
    run = build.plan_run(cfg, devices)
    topology, hbm = (asked, asked.chip.hbm) if asked.chip else found_here(run)
    sizes = build.bin_sizes(run, cfg.data.max_prompt_tokens)
    listed = programs(run, sizes)
    chosen = largest(listed)
    if unknown := [kind for kind in wanted.only if kind not in chosen]:
        raise ConfigError(f"--only={','.join(unknown)}: known: {', '.join(chosen)}")
    classes = residents(run, chosen)
    picked = {kind: program for kind, program in chosen.items() if not wanted.only or kind in wanted.only}
    occupy = functools.partial(_occupy, topology=topology, hlo=wanted.hlo)
    progress.expect(len(picked))
    places = {}
    for done, (kind, program) in enumerate(picked.items(), 1):
        with progress.phase(f"compile {program.name}"):
            places[kind] = occupy(program, classes)
        notes = {"compile s": places[kind].figures.compile_seconds, "peak GiB": places[kind].figures.peak_bytes / GIB}
        progress.step_done(done, notes)
    plan = Plan(run, topology, hbm, len(listed), places, classes, checkpoint=checkpoint_bytes(run))
    figures = plan.figures
    if "update" in figures:
        plan.utilisation = utilisation(run.policy.shape, sizes[-1], figures["update"], topology, run.mesh.size)
    if (
        topology.chip
        and {"update", "decode", "prefill"} <= figures.keys()
        and not any(f.refused for f in figures.values())
    ):
        plan.steps = [step(run, sizes[-1], figures, share) for share in SHARES]
    if wanted.largest and hbm is not None:
        _look_for_most(plan, sizes, hbm, occupy, progress)
    return plan


def _with_own_rows(occupy: Callable[..., Occupied], plan: Plan, decode: Program) -> Occupied:
    """Of a `decode` with other rows than those that are planned."""
    own = leaves_of(decode.arguments[1])
    return occupy(decode, [c._replace(leaves=own) if c.name == ROWS else c for c in plan.classes])


def _occupy(program: Program, classes: Sequence[Resident], *, topology: Topology, hlo: pathlib.Path | None) -> Occupied:
    return occupied(compiled(program, topology, hlo)[0], classes)


def _look_for_most(
    plan: Plan, sizes: Sequence[BinSize], hbm: float, occupy: Callable[..., Occupied], progress: Progress
) -> None:
    with progress.phase("the most rows that fit"):
        if "decode" in plan.places:
            plan.rows = most_rows(
                plan.run.policy, plan.places["decode"], hbm, functools.partial(_with_own_rows, occupy, plan)
            )
        if "update" in plan.places:
            of_bins = functools.partial(occupy, classes=plan.classes)
            plan.bins = most_in_a_bin(plan.run, sizes[-1], plan.places["update"], hbm, of_bins)
            plan.bin_unit = "prompts" if sizes[-1].prompts else "rows"
