"""Lengths are rounded up to few sizes, which bounds the number of programs that are ever compiled."""

from __future__ import annotations


def ladder(length: int) -> int:
    """The smallest of 8, 16, ..., 64, 80, 96, 112, 128, 160, ... that holds `length`.

    Four sizes an octave bound the shapes ever compiled, and the padding by a quarter.
    """
    step = max(8, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def bucket(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, ... that holds `length`: two sizes an octave bound the programs."""
    power = 1 << max(5, (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 32 else power
