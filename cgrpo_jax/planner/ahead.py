"""Compiles what a run of fixed sizes may need before its first step; and what memory was planned, and used."""

from __future__ import annotations

from collections.abc import Sequence

from cgrpo_jax.errors import ConfigError
from cgrpo_jax.learning.packing import BinSize
from cgrpo_jax.planner.chips import GIB
from cgrpo_jax.planner.figures import compiled
from cgrpo_jax.planner.making import found_here
from cgrpo_jax.planner.memory import Occupied, Resident, largest_part, occupied, residents
from cgrpo_jax.planner.programs import largest, programs
from cgrpo_jax.process import stopping
from cgrpo_jax.run.build import Run
from cgrpo_jax.workdir.progress import Progress, Silence


def compile_ahead(run: Run, sizes: Sequence[BinSize], progress: Progress | Silence) -> Occupied | None:
    """The program that takes most memory, of all that the run may need; jit has them then, and compiles none again.

    Only where sizes are fixed (`sampler.rings`), so that they are few. Otherwise None, and they are compiled as lengths
    ask for them.

    Raises:
      ConfigError: XLA refuses a program for want of memory; names the tensor class that takes most, and its knob.
    """
    if not run.policy.sampler.room.fixed:
        return None
    listed = programs(run, sizes)
    classes, (topology, _) = residents(run, largest(listed)), found_here(run)
    fullest: Occupied | None = None
    for number, program in enumerate(listed, 1):
        stopping.look()
        with progress.phase(f"compile {number}/{len(listed)} {program.name}"):
            figures, executable = compiled(program, topology)
        place = occupied(figures, classes)
        if executable is None:
            raise ConfigError(too_large(place, classes, figures.refused))
        planned, taken = place.bytes / GIB, figures.compile_seconds
        progress.log(f"compiled {number}/{len(listed)} {figures.name}  {taken:.0f} s, {planned:.2f} GiB a device")
        if fullest is None or place.bytes > fullest.bytes:
            fullest = place
    return fullest


def too_large(place: Occupied, classes: list[Resident], why: str) -> str:
    """Of a program that has no room: what takes most, and what makes that smaller."""
    name, size, knob = largest_part(place, classes)
    return (
        f"does not fit: {place.figures.name}, planned {place.bytes / GIB:.2f} GiB a device; the largest part is "
        f"{name}, {size / GIB:.2f} GiB: {knob} ({why[:200]})"
    )


def measured(run: Run) -> float | None:
    """GiB, the largest peak of a device of this process so far; None where the backend does not count."""
    stats = [device.memory_stats() for device in run.mesh.local_devices]
    if not all(stats):
        return None
    return max(of["peak_bytes_in_use"] for of in stats if of) / GIB


def memory_line(run: Run, planned: Occupied | None) -> str:
    """What was planned, where it was, and what was used; "" where neither is known."""
    used = measured(run)
    known = [] if used is None else [f"measured {used:.2f} GiB a device at most so far"]
    if planned is not None:
        known.insert(0, f"planned {planned.bytes / GIB:.2f} GiB a device ({planned.figures.kind})")
    return "memory: " + ", ".join(known) if known else ""
