"""Runs the largest program of each kind once, on zeros, beside what would live with it: what cannot fit fails now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cgrpo_jax.errors import ConfigError
from cgrpo_jax.planner.ahead import measured, too_large
from cgrpo_jax.planner.chips import GIB
from cgrpo_jax.planner.figures import compiled
from cgrpo_jax.planner.making import found_here
from cgrpo_jax.planner.memory import occupied, residents
from cgrpo_jax.planner.programs import Program, largest, programs
from cgrpo_jax.process import stopping
from cgrpo_jax.run import build
from cgrpo_jax.run.build import Run

FIRST = ("update", "decode", "prefill")  # the largest, as a rule
NO_MEMORY = "RESOURCE_EXHAUSTED"


def preflight(run: Run, log: Callable[[str], None]) -> None:
    """Nothing is kept of what the programs make; they are compiled as training will, and the cache on disk has them.

    Raises:
      ConfigError: a program does not fit; names the tensor class that takes most, and what makes it smaller.
    """
    sizes = build.bin_sizes(run, run.cfg.data.max_prompt_tokens)
    chosen = largest(programs(run, sizes))
    classes, (topology, _) = residents(run, chosen), found_here(run)
    order = [*(kind for kind in FIRST if kind in chosen), *(kind for kind in chosen if kind not in FIRST)]
    for kind in order:
        stopping.look()
        figures, executable = compiled(chosen[kind], topology)
        place = occupied(figures, classes)
        if executable is None:
            raise ConfigError(too_large(place, classes, figures.refused))
        try:
            _run_on_zeros(run, chosen[kind], executable, sum(place.beside.values()))
        except jax.errors.JaxRuntimeError as error:
            if NO_MEMORY not in str(error):
                raise
            raise ConfigError(too_large(place, classes, str(error).splitlines()[0])) from error
        used = measured(run)
        so_far = "this backend does not count memory" if used is None else f"measured {used:.2f} GiB at most so far"
        log(f"preflight: {figures.name}: planned {place.bytes / GIB:.2f} GiB a device; {so_far}")


def _run_on_zeros(run: Run, program: Program, executable: Any, beside: int) -> None:
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
        return keys if leaf.sharding is None else jax.device_put(keys, leaf.sharding)
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
