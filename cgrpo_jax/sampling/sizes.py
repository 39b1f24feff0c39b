"""Lengths and numbers of rows are rounded up to few sizes: that bounds the programs ever compiled.

By default all sizes grow with what is asked, as far as the memory goes. A configuration may fix them instead
(`Fixed`): then the programs are few and known before the first step, which is what long compilations need.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from cgrpo_jax.config.options import SamplerMemory

COUNTS = (64, 16, 4, 1)  # of prompts that are prefilled together
PREFILL_TOKENS = 4096  # of the prompts prefilled together, padding included


def power_of_two(number: int) -> int:
    """The smallest power of two that holds `number`."""
    return 1 << (number - 1).bit_length()


def prefill_size(length: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, ... that holds `length`: two sizes an octave."""
    power = max(64, power_of_two(length))
    return power * 3 // 4 if length <= power * 3 // 4 and power > 64 else power


def ring_size(length: int) -> int:
    """The smallest of 128, 256, 384, 512, 640, 768, 1024, 1536, 2048, 3072, ... that holds `length`; slots of a row."""
    step = 128 if length <= 768 else power_of_two(length) // 4
    return -(-length // step) * step


def row_sizes(rows: int, least: int) -> list[int]:
    """What `rows` rows may shrink to: 8, 32, 128, ... times `least` as far as that is a quarter of them; and `rows`."""
    sizes = [8 * least]
    while sizes[-1] <= rows // 4:
        sizes.append(4 * sizes[-1])
    return [*sizes[:-1], rows]


def grown_rows(wanted: int, least: int, most: int) -> int:
    """The smallest of 1, 2, 4, ... times `least`, and `most`, that holds `wanted`."""
    return min(most, least * power_of_two(-(-wanted // least)))


def split_count(count: int, sizes: tuple[int, ...]) -> list[int]:
    """`count` as a sum of few of the sizes, which fall; more than that where the last one does not divide the rest."""
    parts = []
    while count > 0:
        parts.append(next((size for size in sizes if size <= count), sizes[-1]))
        count -= parts[-1]
    return parts


class Ring(NamedTuple):
    """Rows of one length."""

    slots: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Sizes that a configuration fixes: rings and sizes of prefilled prompts, the smallest first."""

    rings: tuple[Ring, ...]
    prefills: tuple[int, ...]

    def fits(self, ring: Ring, prompt: int, limit: int) -> bool:
        """Whether a row of this ring may hold a prompt and `limit` tokens after it."""
        return prompt + limit <= ring.slots and self.prefill_size(prompt) <= ring.slots

    def prefill_size(self, length: int) -> int:
        """The smallest one that holds `length`."""
        return next(size for size in self.prefills if size >= length)


def fixed_sizes(cfg: SamplerMemory) -> Fixed | None:
    """Of `sampler.rings` and `sampler.prefills`; None where they are empty.

    Raises:
      ValueError: they cannot be read; says how they are written.
    """
    if not cfg.rings and not cfg.prefills:
        return None
    try:
        pairs = [tuple(map(int, part.split("x"))) for part in cfg.rings.split(",")]
        rings = tuple(sorted(Ring(slots, rows) for slots, rows in pairs))
        prefills = tuple(sorted(map(int, cfg.prefills.split(","))))
    except ValueError:
        rings, prefills = (), ()
    if not rings or min(map(min, rings)) < 1 or min(prefills) < 1:
        raise ValueError(
            f"sampler.rings = {cfg.rings!r}, sampler.prefills = {cfg.prefills!r}: slots x rows, and numbers of tokens, "
            "as in '8192x256,16384x32' and '1024,9216'; or both empty"
        )
    return Fixed(rings, prefills)
