"""Lengths and numbers of rows are rounded up to few sizes: that bounds the programs ever compiled."""

from __future__ import annotations

COUNTS = (64, 16, 4, 1)  # of prompts that are prefilled together


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


def split_count(count: int, most: int) -> list[int]:
    """`count` as a sum of few COUNTS, none above `most`."""
    parts = []
    for size in COUNTS:
        while size <= max(1, most) and size <= count:
            parts.append(size)
            count -= size
    return parts
