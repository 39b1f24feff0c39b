"""Compiles a program for devices that need not be here, and reads memory and estimated seconds from the result."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cgrpo_jax.errors import ConfigError
from cgrpo_jax.planner.chips import Chip, Topology
from cgrpo_jax.planner.cost import Cost, cost_of_module
from cgrpo_jax.planner.hlo import Module, parameters, parse
from cgrpo_jax.planner.programs import Program, kind_of

LIKELY_FLOPS, LIKELY_BANDWIDTH = 0.6, 0.7  # of the peak: what good kernels reach elsewhere


class Seconds(NamedTuple):
    """Estimated seconds of a program on one chip. computing=None: the rates of the chip are unknown."""

    computing: float | None = None  # XLA's cycles: matrix products and elementwise operations
    kernels: float = 0.0  # Pallas kernels, at likely rates
    kernels_at_peak: float = 0.0
    wire: float = 0.0  # collectives, not overlapped with anything

    def total(self, at_peak: bool = False, wire: bool = True) -> float:
        """The sum, without overlap."""
        kernels = self.kernels_at_peak if at_peak else self.kernels
        return (self.computing or 0.0) + kernels + (self.wire if wire else 0.0)


def seconds_of(cost: Cost, topology: Topology) -> Seconds:
    chip = topology.chip
    if chip is None:
        return Seconds()
    return Seconds(
        cost.cycles / chip.clock,
        _kernel_seconds(cost, chip, LIKELY_FLOPS, LIKELY_BANDWIDTH),
        _kernel_seconds(cost, chip, 1.0, 1.0),
        cost.wire_bytes / topology.ici if topology.ici else 0.0,
    )


def _kernel_seconds(cost: Cost, chip: Chip, flops: float, bandwidth: float) -> float:
    """Seconds of the kernels, each bound by its flops or by its bytes."""
    return sum(
        max(k.flops / (flops * chip.peak), k.bytes / (bandwidth * chip.bandwidth)) for k in cost.kernels.values()
    )


@dataclasses.dataclass(frozen=True)
class Figures:
    """What compiling a program tells about one chip. Bytes are exact, seconds are estimates."""

    name: str  # of the program, with its sizes
    argument_bytes: float = 0.0
    output_bytes: float = 0.0
    temporary_bytes: float = 0.0
    peak_bytes: float = 0.0
    compile_seconds: float = 0.0
    cost: Cost = dataclasses.field(default_factory=Cost)  # loops whose length depends on data count as one turn
    seconds: Seconds = Seconds()
    turn: Seconds | None = None  # each further turn of such loops; None: no such loop
    holds: collections.Counter[Leaf] = dataclasses.field(default_factory=collections.Counter)  # arguments and outputs
    refused: str = ""  # why XLA did not compile it

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    def over(self, turns: float) -> Seconds:
        """Seconds when the loops that depend on data take `turns` turns."""
        if self.turn is None:
            return self.seconds
        more = turns - 1
        return Seconds(
            None if self.seconds.computing is None else self.seconds.computing + more * (self.turn.computing or 0.0),
            self.seconds.kernels + more * self.turn.kernels,
            self.seconds.kernels_at_peak + more * self.turn.kernels_at_peak,
            self.seconds.wire + more * self.turn.wire,
        )


class Leaf(NamedTuple):
    """The key by which arrays are matched: equal leaves take the same memory on a device."""

    shape: tuple[int, ...]
    dtype: str
    own: tuple[int, ...]  # shape of the shard on one device
    bytes: int  # of that shard


def leaf_of(array: Any, placed: Any = None) -> Leaf:
    """The leaf of an array or abstract array; `placed` is its sharding where it carries none."""
    placed = placed or getattr(array, "sharding", None)
    own = tuple(placed.shard_shape(array.shape)) if placed is not None else tuple(array.shape)
    itemsize = 8 if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array.dtype.itemsize
    return Leaf(tuple(array.shape), str(array.dtype), own, math.prod(own) * itemsize)


def leaves_of(tree: Any) -> collections.Counter[Leaf]:
    return collections.Counter(map(leaf_of, jax.tree.leaves(tree)))


def total_bytes(leaves: collections.Counter[Leaf]) -> int:
    return sum(leaf.bytes * count for leaf, count in leaves.items())


def compiled(
    program: Program, topology: Topology, hlo: pathlib.Path | None = None
) -> tuple[Figures, jax.stages.Compiled | None]:
    """The figures of a program, and its executable: None where it needs too much memory, see `refused`.

    Args:
      hlo: a folder that the text of the program is written to.

    Raises:
      ConfigError: XLA refuses the program for another reason than memory.
    """
    began = time.perf_counter()
    lowered = program.lower()
    try:
        made = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return refused(program, str(error), time.perf_counter() - began), None
    taken, text = time.perf_counter() - began, made.as_text()
    if hlo is not None:
        (hlo / f"{program.name.replace('/', '_')}.hlo").write_text(text, encoding="utf-8")
    module = parse(text)
    memory, cost = made.memory_analysis(), cost_of_module(module)
    at_least = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    at_least += memory.output_size_in_bytes - memory.alias_size_in_bytes
    outputs = map(leaf_of, jax.tree.leaves(lowered.out_info), jax.tree.leaves(made.output_shardings))
    figures = Figures(
        name=program.name,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes or at_least,  # the CPU backend reports 0
        compile_seconds=taken,
        cost=cost,
        seconds=seconds_of(cost, topology),
        turn=seconds_of(cost.again, topology) if cost.again else None,
        holds=_handed(leaves_of(program.arguments), module) + collections.Counter(outputs),
    )
    return figures, made


HLO_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64", "int32": "s32", "bool": "pred"}


def _handed(arguments: collections.Counter[Leaf], module: Module) -> collections.Counter[Leaf]:
    """The arguments that are passed: jit drops those that a program does not use."""
    passed, kept = collections.Counter(parameters(module)), collections.Counter[Leaf]()
    for leaf, count in arguments.items():
        parameter = HLO_TYPES.get(leaf.dtype, ""), leaf.own
        kept[leaf] = min(count, passed[parameter])
        passed[parameter] -= kept[leaf]
    return +kept


def refused(program: Program, message: str, taken: float) -> Figures:
    """The figures of a program that does not fit, with the bytes that the message of XLA tells.

    Raises:
      ConfigError: the message is about something else than memory.
    """
    line = next((line for line in message.splitlines() if line.strip()), "")[:300]
    if "RESOURCE_EXHAUSTED" not in message:
        raise ConfigError(f"{program.name}: XLA makes no program of it: {line}")
    holds = leaves_of(program.arguments)
    handed = total_bytes(holds)
    used = float("inf")  # VMEM, or an unknown wording
    if whole := re.search(r"hbm\. Used ([\d.]+)([KMGT]) of", message):
        used = _bytes_of(whole)
    elif temporaries := re.search(r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM", message):
        used = _bytes_of(temporaries) + handed
    return Figures(program.name, handed, peak_bytes=used, compile_seconds=taken, holds=holds, refused=line)


def _bytes_of(found: re.Match) -> float:
    return float(found[1]) * 1024.0 ** " KMGT".index(found[2])
