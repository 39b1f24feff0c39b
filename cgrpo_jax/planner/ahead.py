"""Before the first step of a run: compiles all programs that it may need, or runs the largest of each kind on zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cgrpo_jax.errors import ConfigError
from cgrpo_jax.learning.packing import BinSize
from cgrpo_jax.planner.chips import GIB, Topology, found_here
from cgrpo_jax.planner.figures import compiled
from cgrpo_jax.planner.memory import Occupied, Resident, largest_part, occupied, residents
from cgrpo_jax.planner.programs import Program, largest, programs
from cgrpo_jax.process import stopping
from cgrpo_jax.run import build
from cgrpo_jax.run.build import Run
from cgrpo_jax.workdir.progress import Progress, Silence

FIRST = ("update", "decode", "prefill")  # the kinds that need most memory, as a rule
NO_MEMORY = "RESOURCE_EXHAUSTED"


def compile_ahead(run: Run, sizes: Sequence[BinSize], progress: Progress | Silence) -> Occupied | None:
    """Compiles all programs that the run may need, so that jit compiles none later; returns the one with most memory.

    Only where all sizes are fixed (`sampler.rings`), so that programs are few. Otherwise returns None, and programs are
    compiled when lengths ask for them.

    Raises:
      ConfigError: a program does not fit; names the tensor class that takes most memory, and how to make it smaller.
    """
    if not run.policy.sampler.room.fixed:
        return None
    listed = programs(run, sizes)
    classes, (topology, _) = residents(run, largest(listed)), found_here(run.mesh)
    fullest: Occupied | None = None
    for number, program in enumerate(listed, 1):
        with progress.phase(f"compile {number}/{len(listed)} {program.name}"):
            place, _ = _fitting(program, topology, classes)
        planned, taken = place.bytes / GIB, place.figures.compile_seconds
        progress.log(f"compiled {number}/{len(listed)} {program.name}  {taken:.0f} s, {planned:.2f} GiB a device")
        if fullest is None or place.bytes > fullest.bytes:
            fullest = place
    return fullest


def preflight(run: Run, log: Callable[[str], None]) -> None:
    """Runs the largest program of each kind on zeros, beside as many bytes as the run will hold then.

    The results are dropped; the compiled programs stay in the cache on disk for training.

    Raises:
      ConfigError: a program does not fit; names the tensor class that takes most memory, and how to make it smaller.
    """
    sizes = build.bin_sizes(run, run.cfg.data.max_prompt_tokens)
    chosen = largest(programs(run, sizes))
    classes, (topology, _) = residents(run, chosen), found_here(run.mesh)
    for kind in [*(kind for kind in FIRST if kind in chosen), *(kind for kind in chosen if kind not in FIRST)]:
        place, executable = _fitting(chosen[kind], topology, classes)
        try:
            _run_on_zeros(run, chosen[kind], executable, sum(place.beside.values()))
        except jax.errors.JaxRuntimeError as error:
            if NO_MEMORY not in str(error):
                raise
            raise too_large(place, classes, str(error).splitlines()[0]) from error
        used = measured(run)
        so_far = "this backend does not count memory" if used is None else f"measured {used:.2f} GiB at most so far"
        log(f"preflight: {place.figures.name}: planned {place.bytes / GIB:.2f} GiB a device; {so_far}")


def _fitting(program: Program, topology: Topology, classes: Sequence[Resident]) -> tuple[Occupied, jax.stages.Compiled]:
    """Compiles a program, and tells the memory while it runs. Raises ConfigError where XLA says that it has no room."""
    stopping.look()
    figures, executable = compiled(program, topology)
    place = occupied(figures, classes)
    if executable is None:
        raise too_large(place, classes, figures.refused)
    return place, executable


def too_large(place: Occupied, classes: Sequence[Resident], why: str) -> ConfigError:
    """The error for a program that does not fit: what takes most memory, and how to make that smaller."""
    name, size, knob = largest_part(place, classes)
    return ConfigError(
        f"does not fit: {place.figures.name}, planned {place.bytes / GIB:.2f} GiB a device; the largest part is "
        f"{name}, {size / GIB:.2f} GiB: {knob} ({why[:200]})"
    )


def measured(run: Run) -> float | None:
    """The largest memory peak so far of the local devices, in GiB; None where the backend does not count memory."""
    stats = [device.memory_stats() for device in run.mesh.local_devices]
    if not all(stats):
        return None
    return max(of["peak_bytes_in_use"] for of in stats if of) / GIB


def memory_line(run: Run, planned: Occupied | None) -> str:
    """A line on the planned peak, with its kind of program, and on the measured peak; "" where neither is known."""
    used = measured(run)
    known = [] if used is None else [f"measured {used:.2f} GiB a device at most so far"]
    if planned is not None:
        known.insert(0, f"planned {planned.bytes / GIB:.2f} GiB a device ({planned.figures.kind})")
    return "memory: " + ", ".join(known) if known else ""


def _run_on_zeros(run: Run, program: Program, executable: Any, beside: int) -> None:
    """Runs a program while `beside` more bytes are allocated on each device."""
    ballast = None
    if beside:
        spread = NamedSharding(run.mesh, P(run.mesh.axis_names))
        ballast = jnp.zeros((run.mesh.size, beside), jnp.uint8, device=spread)
    arguments = jax.tree.map(_zeros, program.arguments)
    jax.block_until_ready((executable(*arguments), ballast))


def _zeros(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = jax.eval_shape(jax.random.key_data, leaf)
        keys = jax.random.wrap_key_data(jnp.zeros(words.shape, words.dtype))
        return jax.jit(lambda: keys, out_shardings=leaf.sharding)()  # also on devices of other hosts
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
