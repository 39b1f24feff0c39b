"""Draws token ids from logits: top-k and top-p without sorting, and one uniform random number for each token.

That number is a function of (seed, step, kind, problem, sample, round, position) only. So what a row samples does not
depend on the other rows of its batch, on the shape of the batch, or on when the row is decoded.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from cgrpo_jax.config.options import SamplingConfig

VOCAB_BLOCK = 128  # vocabulary entries summed together by `draw`


@jax.jit
def step_key(seed: jax.Array | int, step: jax.Array | int) -> jax.Array:
    """The random key of a step, from which those of all its rows are derived."""
    return jax.random.fold_in(jax.random.key(seed), step)


def row_keys(key: jax.Array, name_B4: jax.Array) -> jax.Array:
    """Random keys `[B]` of rows named (kind, problem, sample, round), from that of the step; round 0 adds nothing."""

    def row_key(name_4: jax.Array) -> jax.Array:
        first = functools.reduce(jax.random.fold_in, name_4[:3], key)
        later = jax.random.fold_in(first, name_4[3])
        return jax.lax.select(name_4[3] == 0, first, later)

    return jax.vmap(row_key)(name_B4)


def keep_top(scaled_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Mask `[B, V]` of the entries that top-k, then top-p, keep, with all ties at the threshold. Sorts nothing.

    Each threshold is found by bisection over int32 numbers in the order of the float32 logits: 32 passes are exact.
    """
    bits_BV = jax.lax.bitcast_convert_type(scaled_BV.astype(jnp.float32), jnp.int32)
    order_BV = bits_BV ^ ((bits_BV >> 31) & jnp.int32(0x7FFFFFFF))

    def at_least(enough) -> jax.Array:
        """Mask of the entries >= t, for the largest t at which `enough` still holds of that mask."""

        def halve(_, bounds):
            low_B, high_B = bounds  # enough at low, not known above
            middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)  # rounded up, cannot overflow
            ok_B = enough(order_BV >= middle_B[:, None])
            return jnp.where(ok_B, middle_B, low_B), jnp.where(ok_B, high_B, middle_B - 1)

        low_B, _ = jax.lax.fori_loop(0, 32, halve, (order_BV.min(axis=-1), order_BV.max(axis=-1)))
        return order_BV >= low_B[:, None]

    keep_BV = jnp.ones(scaled_BV.shape, bool)
    if top_k > 0:
        k = min(top_k, scaled_BV.shape[1])
        keep_BV = at_least(lambda mask_BV: mask_BV.sum(axis=-1) >= k)
    if top_p < 1.0:
        prob_BV = jax.nn.softmax(jnp.where(keep_BV, scaled_BV, -jnp.inf), axis=-1)
        keep_BV &= at_least(lambda mask_BV: jnp.where(mask_BV, prob_BV, 0.0).sum(axis=-1) >= top_p)
    return keep_BV


def first_above(weight_BW: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of the first positive weight whose running sum exceeds the target, and the sum before it.

    In floating point a running sum may fall, and may end below the total. So an entry with weight 0 is never taken, and
    the last positive one is taken where no running sum exceeds the target.
    """
    sum_BW = jnp.cumsum(weight_BW, axis=-1)
    positive_BW = weight_BW > 0
    hit_BW = positive_BW & (sum_BW > target_B[:, None])
    last_B = weight_BW.shape[1] - 1 - jnp.argmax(positive_BW[:, ::-1], axis=-1)
    index_B = jnp.where(hit_BW.any(axis=-1), jnp.argmax(hit_BW, axis=-1), last_B)
    before_BW = sum_BW - weight_BW
    return index_B, jnp.take_along_axis(before_BW, index_B[:, None], axis=-1)[:, 0]


def categorical(weight_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """Draws ids `[B]` with probability proportional to the weights, from one uniform number for each row.

    The inverse of the cumulative distribution is taken in two levels: the block of the vocabulary, then the entry.
    """
    B, V = weight_BV.shape
    weight_BJW = jnp.pad(weight_BV, ((0, 0), (0, -V % VOCAB_BLOCK))).reshape(B, -1, VOCAB_BLOCK)
    block_BJ = weight_BJW.sum(axis=-1)
    target_B = u_B * jnp.cumsum(block_BJ, axis=-1)[:, -1]
    block_B, before_B = first_above(block_BJ, target_B)
    entry_BW = jnp.take_along_axis(weight_BJW, block_B[:, None, None], axis=1)[:, 0]
    entry_B, _ = first_above(entry_BW, target_B - before_B)
    return (block_B * VOCAB_BLOCK + entry_B).astype(jnp.int32)


def _uniform(key: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)


def draw(
    logits_BV: jax.Array, key_B: jax.Array, position_B: jax.Array, cfg: SamplingConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one id for each row.

    Args:
      key_B, position_B: the keys of the rows (`row_keys`), and the number of tokens that each has drawn before.

    Returns:
      ids `[B]`; their log-probabilities over the full vocabulary at the sampling temperature (at 1 where that is 0);
      and the probability mass that top-k and top-p kept (1 without them). The log-probability in the distribution that
      was drawn from is the second less the logarithm of the third.
    """
    scaled_BV = logits_BV / (cfg.temperature or 1.0)
    peak_B1 = scaled_BV.max(axis=-1, keepdims=True)
    weight_BV = jnp.exp(scaled_BV - peak_B1)
    total_B = weight_BV.sum(axis=-1)
    kept_B = jnp.ones_like(total_B)
    if cfg.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        if cfg.top_k > 0 or cfg.top_p < 1.0:
            weight_BV = jnp.where(keep_top(scaled_BV, cfg.top_k, cfg.top_p), weight_BV, 0.0)
            kept_B = weight_BV.sum(axis=-1) / total_B
        u_B = jax.vmap(_uniform)(key_B, position_B)
        token_B = categorical(weight_BV, u_B)
    scaled_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, scaled_B - peak_B1[:, 0] - jnp.log(total_B), kept_B
