"""Rotary positions: the frequencies of RoPE, plain and scaled, as `transformers` computes them.

Letters as in `records`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Every frequency divided by `factor`: positions lie closer together."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """The `llama3` rope scaling of Llama 3.1 and later (frequencies interpolated below `low_freq_factor`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class YarnRope:
    """YaRN (arXiv 2309.00071): what turns often keeps its frequency, what turns seldom is interpolated."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float  # cosine and sine are multiplied with it
    beta_fast: float = 32.0  # turns within the original positions from which on a frequency is kept
    beta_slow: float = 1.0  # turns up to which it is divided by `factor`
    truncate: bool = True  # the bounds of the ramp between the two are whole dimensions


RopeScaling = LinearRope | Llama3Rope | YarnRope


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """What YaRN multiplies cosine and sine with where the configuration names no `attention_factor`."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)


def _yarn_ramp(head_dim: int, theta: float, yarn: YarnRope) -> np.ndarray:
    """How much of each frequency is interpolated, `[H/2]` float32 from 0 to 1."""

    positions = yarn.original_max_position_embeddings

    def dimension(turns: float) -> float:
        """Which one makes so many turns within the original positions."""
        return head_dim * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(ramp, 0, 1)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequencies `[H/2]`, radians per position; rounded as the reference rounds them, in float32."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    period = np.float32(theta) ** exponent
    freq = np.float32(1.0) / period
    match scaling:
        case None:
            return freq
        case LinearRope():
            return freq / np.float32(scaling.factor)
        case YarnRope():
            kept = np.float32(1.0) - _yarn_ramp(head_dim, theta, scaling)
            return np.float32(1.0) / (np.float32(scaling.factor) * period) * (np.float32(1.0) - kept) + freq * kept
        case Llama3Rope():
            turns = scaling.original_max_position_embeddings * freq / np.float32(2 * np.pi)  # within these positions
            smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            smooth = np.clip(smooth, 0.0, 1.0)
            return (freq * (smooth + (1.0 - smooth) / scaling.factor)).astype(np.float32)


def rope_angles(
    head_dim: int, theta: float, scaling: RopeScaling | None, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each `[B, T, 1, H/2]` in float32, times the attention factor of YaRN."""
    freq = rope_frequencies(head_dim, theta, scaling)
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * freq[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if isinstance(scaling, YarnRope) and scaling.attention_factor != 1:
        return cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin
