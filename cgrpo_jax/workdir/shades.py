"""Encodes log-probabilities and character counts of tokens, one letter per token. Coarse: for display only."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
STEPS = 8  # letters per nat: p is kept within 6 %, down to exp(-63 / 8) = 0.0004


def write_logp(logp_T: np.ndarray) -> str:
    """The index of a letter is 8 times the negative log-probability, and 63 where that is larger or not finite."""
    level_T = np.nan_to_num(np.rint(-STEPS * logp_T.astype(np.float64)), nan=63.0, posinf=63.0, neginf=63.0)
    return "".join(LETTERS[level] for level in np.clip(level_T, 0, 63).astype(int))


def write_widths(widths: Iterable[int]) -> str:
    """The index of a letter is the number of characters of the token; each `_` adds 63 to the letter that follows."""
    return "".join("_" * (width // 63) + LETTERS[width % 63] for width in widths)


def read_widths(letters: str) -> list[int]:
    """Decodes `write_widths`. Raises ValueError for a character that is no letter of the code."""
    widths, so_far = [], 0
    for letter in letters:
        so_far += LETTERS.index(letter)
        if letter != "_":
            widths.append(so_far)
            so_far = 0
    return widths
