"""Jitted generation: token ids in, token ids and log-probabilities out.

Prefill and decode are one compiled program per shape. Masks come from lengths, never from token values. The random
number of a token is a function of (seed, step, kind, problem, sample, position) only, so neither the other rows of a
batch nor its shape change what a row samples.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cgrpo_jax.model import ModelConfig, Params, accumulator, forward, init_cache, logits, unstack

BLOCK = 128  # vocabulary entries summed together by `draw`


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. Order of the filters: temperature, top-k, top-p."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    max_new_tokens: int = 512


class Samples(NamedTuple):
    """Right-padded samples; what lies beyond `length_B` has no meaning."""

    tokens_BT: jax.Array  # int32
    logp_BT: jax.Array  # full-support log-probability at the sampling temperature (at 1 where that is 0)
    length_B: jax.Array  # int32, counts the end-of-sequence token
    finished_B: jax.Array  # bool: an end-of-sequence token was drawn


def row_keys(seed: jax.Array, step: jax.Array, name_B3: jax.Array) -> jax.Array:
    """Random keys `[B]` of rows named (kind, problem, sample)."""
    base = jax.random.fold_in(jax.random.key(seed), step)
    fold = lambda name_3: functools.reduce(jax.random.fold_in, name_3, base)
    return jax.vmap(fold)(name_B3)


def keep_top(scaled_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Mask `[B, V]` of the entries that top-k, then top-p, keep; ties at the threshold are kept. Sorts nothing.

    Each threshold is found by bisection over the order-preserving integer image of float32: 32 passes are exact.
    """
    bits_BV = jax.lax.bitcast_convert_type(scaled_BV.astype(jnp.float32), jnp.int32)
    order_BV = bits_BV ^ ((bits_BV >> 31) & jnp.int32(0x7FFFFFFF))

    def at_least(enough) -> jax.Array:
        """{entries >= t} for the largest t at which `enough` still holds."""

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


def first_above(weight_BX: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of the first positive weight whose running sum exceeds the target, and the sum before it.

    A float running sum need be neither monotone nor reach the total, so a weight of zero is never taken, and the last
    positive one is where none exceeds the target.
    """
    sum_BX = jnp.cumsum(weight_BX, axis=-1)
    positive_BX = weight_BX > 0
    hit_BX = positive_BX & (sum_BX > target_B[:, None])
    last_B = weight_BX.shape[1] - 1 - jnp.argmax(positive_BX[:, ::-1], axis=-1)
    index_B = jnp.where(hit_BX.any(axis=-1), jnp.argmax(hit_BX, axis=-1), last_B)
    take = lambda x_BX: jnp.take_along_axis(x_BX, index_B[:, None], axis=-1)[:, 0]
    return index_B, take(sum_BX) - take(weight_BX)


def categorical(weight_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """Draws ids `[B]` with probability proportional to the weights, from one uniform number a row.

    Inverse CDF in two levels: first the block of the vocabulary, then the entry in it.
    """
    B, V = weight_BV.shape
    weight_BXY = jnp.pad(weight_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    block_BX = weight_BXY.sum(axis=-1)
    target_B = u_B * jnp.cumsum(block_BX, axis=-1)[:, -1]
    block_B, before_B = first_above(block_BX, target_B)
    entry_BY = jnp.take_along_axis(weight_BXY, block_B[:, None, None], axis=1)[:, 0]
    entry_B, _ = first_above(entry_BY, target_B - before_B)
    return (block_B * BLOCK + entry_B).astype(jnp.int32)


def draw(logits_BV: jax.Array, key_B: jax.Array, position: jax.Array, cfg: SamplingConfig):
    """Next ids `[B]` and their full-support, temperature-scaled log-probabilities `[B]`."""
    scaled_BV = logits_BV / (cfg.temperature or 1.0)
    logp_BV = jax.nn.log_softmax(scaled_BV, axis=-1)
    if cfg.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        weight_BV = jnp.exp(scaled_BV - scaled_BV.max(axis=-1, keepdims=True))
        if cfg.top_k > 0 or cfg.top_p < 1.0:
            weight_BV = jnp.where(keep_top(scaled_BV, cfg.top_k, cfg.top_p), weight_BV, 0.0)
        u_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32))(key_B)
        token_B = categorical(weight_BV, u_B)
    return token_B, jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames=("cfg", "sampling", "dtype"))
def sample(
    params: Params,
    prompt_QT: jax.Array,
    start_Q: jax.Array,
    prompt_of_B: jax.Array,
    wanted_B: jax.Array,
    key_B: jax.Array,
    eos_E: jax.Array,
    *,
    cfg: ModelConfig,
    sampling: SamplingConfig,
    dtype: DTypeLike,
) -> Samples:
    """Samples one continuation per row; a prompt that several rows share is prefilled once.

    Args:
      prompt_QT: int32 ids of Q different prompts, left-padded so that every prompt ends in the last slot.
      start_Q: int32, slot of each prompt's first token.
      prompt_of_B: int32, which prompt each row continues.
      wanted_B: bool; rows that only fill the batch are False and stop nothing from ending early.
      key_B: random keys of the rows (`row_keys`).
      eos_E: int32, the set of end-of-sequence ids; empty makes every row run to `max_new_tokens`.
    """
    (Q, prompt_slots), B = prompt_QT.shape, len(prompt_of_B)
    N = sampling.max_new_tokens
    run = functools.partial(forward, cfg, dtype=dtype)
    ends = lambda token_B: (token_B[:, None] == eos_E[None]).any(axis=-1)

    hidden_QTD, cache = run(params, prompt_QT, start_Q, init_cache(cfg, Q, prompt_slots + N, dtype), 0)
    start_B, filled = start_Q[prompt_of_B], jax.tree.map(lambda x: x[:, prompt_of_B], cache)
    unrolled = params | {"layers": unstack(params["layers"])}  # decode writes each layer's cache in place
    logits_BV = logits(cfg, params, hidden_QTD[:, -1])[prompt_of_B]
    token_B, logp_B = draw(logits_BV, key_B, jnp.int32(0), sampling)
    tokens_BT = jnp.zeros((B, N), jnp.int32).at[:, 0].set(token_B)
    logp_BT = jnp.zeros((B, N), accumulator(dtype)).at[:, 0].set(logp_B)

    def cond(state):
        position, _, ended_B, *_ = state
        return (position < N) & ~ended_B.all()

    def body(state):
        position, token_B, ended_B, length_B, tokens_BT, logp_BT, cache = state
        hidden_BTD, cache = run(unrolled, token_B[:, None], start_B, cache, prompt_slots + position - 1)
        token_B, logp_B = draw(logits(cfg, params, hidden_BTD[:, 0]), key_B, position, sampling)
        tokens_BT = jax.lax.dynamic_update_slice_in_dim(tokens_BT, token_B[:, None], position, axis=1)
        logp_BT = jax.lax.dynamic_update_slice_in_dim(logp_BT, logp_B[:, None], position, axis=1)
        length_B = length_B + ~ended_B
        return position + 1, token_B, ended_B | ends(token_B), length_B, tokens_BT, logp_BT, cache

    ended_B = ends(token_B) | ~wanted_B
    state = (jnp.int32(1), token_B, ended_B, jnp.ones(B, jnp.int32), tokens_BT, logp_BT, unstack(filled))
    _, _, _, length_B, tokens_BT, logp_BT, _ = jax.lax.while_loop(cond, body, state)
    last_B = jnp.take_along_axis(tokens_BT, length_B[:, None] - 1, axis=1)[:, 0]
    return Samples(tokens_BT, logp_BT, length_B, ends(last_B))
