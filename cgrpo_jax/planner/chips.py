"""TPU chips, and slices of them by name. Imports jax only in `devices`, after `prepare` has set the environment."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

from cgrpo_jax.config.options import nearest
from cgrpo_jax.errors import ConfigError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one chip, which is one device of JAX.

    Sources. Peak and bandwidth: Google's pages "TPU v4" ... "TPU v6e" (cloud.google.com/tpu/docs). Clock: the peak by
    the flops of a cycle, 2 x (8 units of 128 x 128 on v4 and v5p, 4 on v5e, 4 of 256 x 256 on v6e). HBM: what libtpu
    0.0.42 says is available when it refuses a program. Link: one way, "How to Scale Your Model" (scaling-book).
    """

    name: str
    kind: str  # jax's `device_kind`
    peak: float  # bf16 flop/s
    clock: float  # cycles/s
    hbm: float  # bytes that programs may use
    bandwidth: float  # of HBM, bytes/s
    link: float  # of one ICI link in one direction, bytes/s
    wraps: int  # an axis of a slice is a ring where its length is a multiple of this (in 3D: where all lengths are)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 1.05e9, 30.75 * GIB, 1228e9, 45e9, 4),
        Chip("v5p", "TPU v5", 459e12, 1.75e9, 95.74 * GIB, 2765e9, 90e9, 4),
        Chip("v5e", "TPU v5 lite", 197e12, 1.5e9, 15.75 * GIB, 819e9, 45e9, 16),
        Chip("v6e", "TPU v6 lite", 918e12, 1.75e9, 31.25 * GIB, 1640e9, 90e9, 16),
    )
}
# Names of accelerator types count TensorCores (v4, v5p: two per chip) or chips. Shapes: from the pages above.
_CORES = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"
}  # fmt: skip
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_TYPES = (("v4", "v4", _CORES), ("v5litepod", "v5e", _FLAT), ("v5p", "v5p", _CORES), ("v6e", "v6e", _FLAT))
SLICES = {f"{prefix}-{size}": (chip, shape) for prefix, chip, shapes in _TYPES for size, shape in shapes.items()}
HERE = "local"  # the name of the machine at hand


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPU chips, or the devices of this machine."""

    name: str
    chip: Chip | None  # None: not in the table, rates and memory unknown
    shape: tuple[int, ...]  # empty: unknown

    @property
    def links(self) -> int:
        """ICI links of the chip that has the fewest: two along a ring, one at the end of a line."""
        if self.chip is None:
            return 0
        rings = [length % self.chip.wraps == 0 for length in self.shape]
        if len(self.shape) == 3:
            rings = [all(rings)] * 3  # optical switches connect whole cubes only
        return sum(2 if ring else 1 for ring, length in zip(rings, self.shape, strict=True) if length > 1)

    @property
    def ici(self) -> float:
        """Most bytes/s that a chip can send; 0: it is alone, or not in the table."""
        return self.chip.link * self.links if self.chip else 0.0


def known() -> str:
    """The names of accelerator types, in one line."""
    groups: dict[str, list[str]] = {}
    for name in SLICES:
        prefix, _, size = name.rpartition("-")
        groups.setdefault(prefix, []).append(size)
    return "; ".join(f"{prefix}-{{{','.join(sizes)}}}" for prefix, sizes in groups.items())


def topology(name: str) -> Topology:
    """Raises ConfigError for a name that is neither an accelerator type, CHIP:AxBxC, nor `local`."""
    if name == HERE:
        return Topology(name, None, ())
    chip, shape = SLICES.get(name, (None, ""))
    raw = re.fullmatch(rf"({'|'.join(CHIPS)}):(\d+(?:x\d+){{1,2}})", name)
    if raw:
        chip, shape = raw.groups()
    lengths = tuple(map(int, shape.split("x"))) if shape else ()
    if chip is None or not math.prod(lengths) or len(lengths) != (3 if CHIPS[chip].wraps == 4 else 2):
        close = nearest(name, SLICES).partition("; known")[0]
        raise ConfigError(f"--topology={name}{close}; known: {known()}; v4:2x2x4, v5e:4x4 and the like; {HERE}")
    return Topology(name, CHIPS[chip], lengths)


def prepare(name: str) -> None:
    """Sets the environment that jax and libtpu read when they load; call it before jax is imported.

    Otherwise libtpu asks the cloud what machine this is, takes its lock, and writes logs beside those of a real run.
    Nothing is set for `local`.
    """
    if name == HERE:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    for key, value in quiet.items():
        os.environ.setdefault(key, value)


def devices(of: Topology) -> list[Any]:
    """Devices to compile for, which need not be here. Raises ConfigError where libtpu is not installed."""
    from jax.experimental import topologies

    layout, options = "x".join(map(str, of.shape)), dict[str, Any]()
    assert of.chip is not None  # `local` has devices of its own
    if of.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on real machines
    if any(length % 2 for length in of.shape[:2]):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(f"{of.chip.name}:{layout}", "tpu", **options).devices)
    except Exception as error:  # whatever libtpu raises, no program can be compiled
        line = (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(f"--topology={of.name} needs libtpu: pip install 'cgrpo_jax[tpu]' ({line})") from error


def found_here(mesh: Any) -> tuple[Topology, float | None]:
    """The devices of a mesh on this machine as a topology, and the bytes of memory of each; None: unknown."""
    device = mesh.local_devices[0]
    chip = next((chip for chip in CHIPS.values() if chip.kind == device.device_kind), None)
    if chip is not None:
        return Topology(HERE, chip, (mesh.size,)), chip.hbm
    here, stats = Topology(HERE, None, ()), device.memory_stats()
    if stats and "bytes_limit" in stats:
        return here, float(stats["bytes_limit"])
    if device.platform != "cpu":
        return here, None
    return here, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / mesh.size
