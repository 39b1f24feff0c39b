"""The cost of a compiled program on one device: cycles, Pallas kernels, bytes on the wire, with loops multiplied out.

XLA's TPU compiler writes `estimated_cycles` beside each fusion, product and copy. They count computation only: neither
collectives, nor waiting for copies, nor Pallas kernels. Nothing is measured, so no TPU is needed.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import operator
import re
from collections.abc import Sequence

from cgrpo_jax.planner.hlo import Computation, Instruction, Module, arrays, bytes_of, constants, parse, trip_count

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all",
    "collective-broadcast",
)  # fmt: skip
_UNCOUNTED = ("copy-start", "copy-done")  # asynchronous copies, whose cycles overlap with computation
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass
class Kernel:
    """All runs of one Pallas kernel."""

    runs: float = 0
    flops: float = 0
    bytes: float = 0
    declared: bool = True  # the kernel declares its flops and bytes


@dataclasses.dataclass
class Cost:
    """Costs on one device. Loops whose length depends on data count once; `again` is the cost of each further turn."""

    cycles: float = 0
    wire: collections.Counter[tuple[str, str, int]] = dataclasses.field(default_factory=collections.Counter)
    times: collections.Counter[tuple[str, str, int]] = dataclasses.field(default_factory=collections.Counter)
    # The part of `wire` that is sent asynchronously.
    behind: collections.Counter[tuple[str, str, int]] = dataclasses.field(default_factory=collections.Counter)
    kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)
    again: Cost | None = None

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends, with each collective as a ring."""
        return sum(self.wire.values())

    def add(self, other: Cost, times: float = 1) -> None:
        self.cycles += times * other.cycles
        for key in other.wire:  # (collective, dtype, devices of a group)
            self.wire[key] += times * other.wire[key]  # type: ignore[assignment]
            self.times[key] += times * other.times[key]  # type: ignore[assignment]
            self.behind[key] += times * other.behind[key]  # type: ignore[assignment]
        for name, kernel in other.kernels.items():
            own = self.kernels.setdefault(name, Kernel())
            own.runs += times * kernel.runs
            own.flops += times * kernel.flops
            own.bytes += times * kernel.bytes
            own.declared &= kernel.declared
        if other.again is not None:
            self.repeat(other.again, times)

    def repeat(self, turn: Cost, times: float = 1) -> None:
        """Adds the cost of each further turn of a loop whose length depends on data."""
        self.again = self.again or Cost()
        self.again.add(dataclasses.replace(turn, again=None), times)


def cost_of(text: str) -> Cost:
    """The cost of a program, from its HLO text."""
    return cost_of_module(parse(text))


def cost_of_module(module: Module) -> Cost:
    return _Walk(module).computation(module.computations[module.entry])


def _base(op: str) -> str:
    """The operation without `-start`, as `all-gather` for `all-gather-start`."""
    return op.removesuffix("-start")


def group_size(attributes: str, devices: int) -> int:
    """Devices in one group of a collective, from any of the spellings of replica groups."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if mesh := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes, size = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1])), 1
        for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]):
            size *= int(part or sizes.get(axis, 1))
        return size
    return devices


class _Walk:
    """Sums costs over the computations of a module."""

    def __init__(self, module: Module):
        self.module = module
        self.of_fused: dict[str, list[tuple[str | None, Cost]]] = {}

    def computation(self, inside: Computation, state: Sequence[int | None] = ()) -> Cost:
        """The cost of running a computation once. `state`: see hlo.trip_count."""
        total, seen = Cost(), set[str]()
        for made in inside:
            if made.op == "while":
                self._loop(total, inside, made, state)
            elif made.op == "conditional":
                branches = [self.computation(self.module.computations[name]) for name in _branches(made)]
                total.add(max(branches, key=operator.attrgetter("cycles")))
            elif made.op in ("call", "async-start"):
                total.add(self.computation(self.module.computations[made.called() or ""]))
            elif _base(made.op) in COLLECTIVES:
                total.add(self._collective(inside, made))
            elif not made.op.endswith(("-done", "-update")) and made.op not in _UNCOUNTED:
                self._plain(total, inside, made, seen)
        return total

    def _plain(self, total: Cost, inside: Computation, made: Instruction, seen: set[str]) -> None:
        if made.op == "fusion":
            fused = self._fused(made.called())
            for channel, cost in fused:
                if channel is None or channel not in seen:  # start, steps and end of one collective are clones
                    started = made.name.startswith("async-collective-start")
                    total.add(dataclasses.replace(cost, behind=cost.wire) if started else cost)
            seen.update(channel for channel, _ in fused if channel)
        if made.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in made.attributes:
            total.kernels.setdefault(_kernel_name(made), Kernel())
            total.add(Cost(kernels={_kernel_name(made): _kernel(inside, made)}))
        found = _CYCLES.search(made.attributes)
        total.cycles += int(found[1]) if found else 0

    def _loop(self, total: Cost, inside: Computation, loop: Instruction, state: Sequence[int | None]) -> None:
        turns = trip_count(self.module, inside, loop, state)
        body = self.module.computations[loop.attribute(r"body=%([\w.\-]+)") or ""]
        turn = self.computation(body, constants(self.module, inside, loop, state))
        if turns is not None:
            total.add(turn, turns)
            return
        total.add(dataclasses.replace(turn, again=None))
        total.repeat(turn)

    def _fused(self, name: str | None) -> list[tuple[str | None, Cost]]:
        """(channel, cost) of the collectives that a fusion holds, at any depth."""
        if name not in self.module.computations:
            return []
        if name not in self.of_fused:
            inside, found = self.module.computations[name], []
            for made in inside:
                if _base(made.op) in COLLECTIVES:
                    found.append((made.attribute(r"channel_id=(\d+)"), self._collective(inside, made)))
                elif made.op in ("fusion", "call"):
                    found += self._fused(made.called())
            self.of_fused[name] = found
        return self.of_fused[name]

    def _collective(self, inside: Computation, made: Instruction) -> Cost:
        name, started = _base(made.op), made.op.endswith("-start")
        given = sum(bytes_of(inside.of_name[operand].type) for operand in made.operands if operand in inside.of_name)
        left = bytes_of(made.type)
        payload = max(given, left - given if started else left)  # the type of a start holds both
        size = 2 if name == "collective-permute" else group_size(made.attributes, self.module.partitions)
        if name == "all-reduce" and inside.name.startswith("all-reduce-scatter"):
            name = "reduce-scatter"  # the TPU compiler writes reduce-scatter this way
        share = (size - 1) / size
        share = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(name, share)
        dtype = next((dtype for dtype, _ in arrays(made.type)), "")
        key = (name, dtype, size)
        wire = collections.Counter({key: payload * share})  # type: ignore[dict-item]
        return Cost(wire=wire, times=collections.Counter({key: 1}), behind=+wire if started else collections.Counter())


def _branches(made: Instruction) -> list[str]:
    listed = made.attribute(r"branch_computations=\{([^}]*)\}")
    if listed:
        return re.findall(r"%([\w.\-]+)", listed)
    return re.findall(r"(?:true|false)_computation=%([\w.\-]+)", made.attributes)


def _kernel_name(made: Instruction) -> str:
    return made.attribute(r'kernel_name\\?"?[=:]\s*\\?"?([\w.\-]+)') or re.sub(r"[.\d]+$", "", made.name)


def _kernel(inside: Computation, made: Instruction) -> Kernel:
    """One run of a kernel, as it declares (`pl.CostEstimate`) or from the shapes of JAX's splash attention.

    Splash declares nothing. Its forward kernel computes two [T, S] products per head, its fused backward kernel five;
    half of each is masked (causal), and blocks that are masked as a whole are skipped.
    """
    given = [inside.of_name[name].type for name in made.operands if name in inside.of_name]
    moved = sum(map(bytes_of, given)) + bytes_of(made.type)
    declared = made.attribute(r'"cost_estimate":\{([^}]*)\}')
    if declared:
        numbers = {name: float(value) for name, value in re.findall(r'"(\w+)":"?([\d.e+]+)', declared)}
        return Kernel(1, numbers.get("flops", 0.0), numbers.get("bytes_accessed", moved))
    products = _splash_products(made)
    # q [.., N, T, H] comes first, k [.., K, S, H] next; what is counted (s8, s32) comes before and between them.
    wide = [sizes for type_ in given for dtype, sizes in arrays(type_) if dtype in ("bf16", "f32") and len(sizes) > 2]
    if not products or len(wide) < 2:
        return Kernel(1, 0.0, moved, declared=False)
    flops = products * 2 * math.prod(wide[0][:-2]) * wide[0][-2] * wide[1][-2] * wide[0][-1] / 2
    return Kernel(1, flops, moved, declared=False)


def _splash_products(made: Instruction) -> int:
    """How many [T, S] products per head a splash kernel computes; 0: no splash kernel."""
    name = made.name
    if not name.startswith("splash_m"):
        return 0
    if "_fwd" in name:
        return 2
    if "_dq" in name:
        return 3
    own = [sizes for _, sizes in arrays(made.type)]
    return 5 if max(map(len, own)) > 3 else 4  # the fused kernel writes dq in parts, one per block of keys
