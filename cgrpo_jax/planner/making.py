"""Makes a plan from a configuration and a topology."""

from __future__ import annotations

import dataclasses
import operator
import pathlib
from collections.abc import Callable, Sequence

from cgrpo_jax.config import Config
from cgrpo_jax.errors import ConfigError
from cgrpo_jax.learning.packing import BinSize
from cgrpo_jax.planner import chips
from cgrpo_jax.planner.chips import GIB, Topology
from cgrpo_jax.planner.figures import Figures, compiled, leaves_of
from cgrpo_jax.planner.memory import ROWS, Occupied, Resident, checkpoint_bytes, occupied, residents
from cgrpo_jax.planner.most import Most, most_in_a_bin, most_rows
from cgrpo_jax.planner.programs import Program, largest, programs
from cgrpo_jax.planner.step import Step, step, utilisation
from cgrpo_jax.run import build
from cgrpo_jax.run.build import Run
from cgrpo_jax.workdir.progress import Progress

LENGTHS = (1.0, 0.5)  # shares of the longest prompts and answers, for the estimates of a step


@dataclasses.dataclass
class Plan:
    """All that is found out about a run."""

    run: Run
    topology: Topology
    hbm: float | None  # bytes of a chip; None: unknown
    programs: int  # how many the run has
    places: dict[str, Occupied]  # kind -> its largest program
    classes: Sequence[Resident]
    utilisation: tuple[float, float] | None = None  # of the update, see step.utilisation
    steps: Sequence[Step] = ()  # one for each of LENGTHS
    rows: Most | None = None
    bins: Most | None = None
    bin_unit: str = "rows"
    checkpoint: int = 0  # bytes

    @property
    def figures(self) -> dict[str, Figures]:
        return {kind: place.figures for kind, place in self.places.items()}

    @property
    def unfit(self) -> list[Occupied]:
        """Programs that do not fit, the largest first."""
        bad = [place for place in self.places.values() if not self._fits(place)]
        return sorted(bad, key=operator.attrgetter("bytes"), reverse=True)

    def _fits(self, place: Occupied) -> bool:
        return not place.figures.refused and (self.hbm is None or place.bytes <= self.hbm)


def make(
    cfg: Config,
    asked: Topology,
    progress: Progress,
    only: Sequence[str] = (),
    most: bool = True,
    hlo: pathlib.Path | None = None,
) -> Plan:
    """Compiles the largest program of each kind, and a few more to find the most rows that fit.

    Args:
      only: kinds of programs; none: all.
      most: whether to look for the most rows that fit.
      hlo: a folder for the texts of the programs.

    Raises:
      ConfigError: the configuration is impossible, or a kind in `only` is unknown.
      CheckpointError, MeshError: no such model, or a mesh that the devices do not fill.
    """
    devices = None if asked.name == chips.HERE else chips.devices(asked)
    run = build.plan_run(cfg, devices)
    topology, hbm = (asked, asked.chip.hbm) if asked.chip else chips.found_here(run.mesh)
    sizes = build.bin_sizes(run, cfg.data.max_prompt_tokens)
    listed = programs(run, sizes)
    chosen = largest(listed)
    if unknown := [kind for kind in only if kind not in chosen]:
        raise ConfigError(f"--only={','.join(unknown)}: known: {', '.join(chosen)}")
    classes = residents(run, chosen)
    picked = {kind: program for kind, program in chosen.items() if not only or kind in only}

    def occupy(program: Program, classes: Sequence[Resident] = classes) -> Occupied:
        return occupied(compiled(program, topology, hlo)[0], classes)

    progress.expect(len(picked))
    places = {}
    for done, (kind, program) in enumerate(picked.items(), 1):
        with progress.phase(f"compile {program.name}"):
            places[kind] = occupy(program)
        notes = {"compile s": places[kind].figures.compile_seconds, "peak GiB": places[kind].figures.peak_bytes / GIB}
        progress.step_done(done, notes)
    plan = Plan(run, topology, hbm, len(listed), places, classes, checkpoint=checkpoint_bytes(run))
    figures = plan.figures
    if "update" in figures:
        plan.utilisation = utilisation(run.policy.shape, sizes[-1], figures["update"], topology, run.mesh.size)
    refused = any(found.refused for found in figures.values())
    if topology.chip and {"update", "decode", "prefill"} <= figures.keys() and not refused:
        plan.steps = [step(run, sizes[-1], figures, share) for share in LENGTHS]
    if most and hbm is not None:
        with progress.phase("the most rows that fit"):
            _look_for_most(plan, sizes[-1], hbm, occupy)
    return plan


def _look_for_most(plan: Plan, size: BinSize, hbm: float, occupy: Callable[..., Occupied]) -> None:
    """Finds the most rows of the sampler, and the most rows or prompts of a bin."""

    def with_own_rows(decode: Program) -> Occupied:
        own = leaves_of(decode.arguments[1])  # the rows of this program stand in for those of the plan
        return occupy(decode, [c._replace(leaves=own) if c.name == ROWS else c for c in plan.classes])

    if "decode" in plan.places:
        plan.rows = most_rows(plan.run.policy, plan.places["decode"], hbm, with_own_rows)
    if "update" in plan.places:
        plan.bins = most_in_a_bin(plan.run, size, plan.places["update"], hbm, occupy)
        plan.bin_unit = "prompts" if size.prompts else "rows"
