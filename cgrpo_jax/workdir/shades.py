"""Probabilities of tokens and the characters they wrote, a letter a token: for a reader's eye, not to compute with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
STEPS = 8  # letters a nat: p is told within 6 %, down to exp(-63 / 8) = 0.0004


def write_logp(logp_T: np.ndarray) -> str:
    """A letter a token: its number is 8 times the negative log-probability, 63 at most, and where it is not finite."""
    level_T = np.nan_to_num(np.rint(-STEPS * logp_T.astype(np.float64)), nan=63.0, posinf=63.0, neginf=63.0)
    return "".join(LETTERS[level] for level in np.clip(level_T, 0, 63).astype(int))


def write_widths(widths: Iterable[int]) -> str:
    """A letter a token, its number of characters; 63 of them are a `_`, and the count goes on with the next letter."""
    return "".join("_" * (width // 63) + LETTERS[width % 63] for width in widths)


def read_widths(letters: str) -> list[int]:
    """What `write_widths` wrote. Raises ValueError for another letter."""
    widths, so_far = [], 0
    for letter in letters:
        so_far += LETTERS.index(letter)
        if letter != "_":
            widths.append(so_far)
            so_far = 0
    return widths
