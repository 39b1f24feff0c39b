"""Attention behind one function: `attend(q, k, v, seen)`. What is seen is a small record, never a dense mask.

B rows, T queries, S keys, N query heads, K key/value heads, H head dim, R = N / K query heads of a key head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

MASKED = -1e30
EVERYBODY, NOBODY = -2, -1  # segments of keys: seen by each query of the row, seen by none
FEW_QUERIES = 8  # see `attention_logits`
SAVED = "attention"  # the name of an attention's output for rematerialisation


class Seen(NamedTuple):
    """Which keys a query sees: those of its own segment and of EVERYBODY, up to its own position.

    Positions are those of the text (as of RoPE), not places in the array; without them order does not matter. Segments
    of queries are not negative.
    """

    segment_BT: jax.Array  # int32, of the queries
    key_segment_BS: jax.Array  # int32
    position_BT: jax.Array | None = None  # int32
    key_position_BS: jax.Array | None = None  # int32
    shares: bool = False  # whether any key may be EVERYBODY's
    ordered: bool = (
        False  # within a segment places in the array are in the order of positions; queries are the last keys
    )

    def mask(self) -> jax.Array:
        """`[B, T, S]`."""
        key_BTS = self.key_segment_BS[:, None, :]
        own_BTS = key_BTS == self.segment_BT[:, :, None]
        if self.shares:
            own_BTS |= key_BTS == EVERYBODY
        if self.position_BT is None or self.key_position_BS is None:
            return own_BTS
        return own_BTS & (self.key_position_BS[:, None, :] <= self.position_BT[:, :, None])


def among_themselves(segment_BT: jax.Array, position_BT: jax.Array) -> Seen:
    """Queries that are the keys, too: causal within each segment. Positions ascend within it."""
    return Seen(segment_BT, segment_BT, position_BT, position_BT, ordered=True)


def after_prompt(segment_BT: jax.Array, position_BT: jax.Array, prompt_length_B: jax.Array, slots: int) -> Seen:
    """Keys are `slots` of a prompt, the first `prompt_length_B` of which count for every segment, then the queries'."""
    B, slot_S = len(prompt_length_B), jnp.arange(slots, dtype=jnp.int32)
    prompt_BS = jnp.where(slot_S[None] < prompt_length_B[:, None], EVERYBODY, NOBODY)
    keys_BS = jnp.concatenate([prompt_BS, segment_BT], axis=1)
    places_BS = jnp.concatenate([jnp.broadcast_to(slot_S[None], (B, slots)), position_BT], axis=1)
    return Seen(segment_BT, keys_BS, position_BT, places_BS, shares=True)


def in_ring(time: jax.Array, length_R: jax.Array, slots: int) -> Seen:
    """One query a row over a ring on a common clock: it sees what was written in its last `length_R` steps, and now.

    The barrier keeps the ages from being computed again in each layer and for each head.
    """
    age_S = (time - jnp.arange(slots, dtype=jnp.int32)) % slots
    live_RS = jnp.where(age_S[None] <= length_R[:, None], 0, NOBODY)
    return Seen(jnp.zeros((len(length_R), 1), jnp.int32), jax.lax.optimization_barrier(live_RS))


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of one layer, or of all layers with a leading [L] axis."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


# (what a layer left before, its new keys, its new values) -> keys and values to attend to, and what it leaves now
Extend = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]


def attend_to_own(past: None, k_BKTH: jax.Array, v_BKTH: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """Nothing came before, nothing is left."""
    return k_BKTH, v_BKTH, None


def keep_own(past: None, k_BKTH: jax.Array, v_BKTH: jax.Array) -> tuple[jax.Array, jax.Array, KVCache]:
    """Nothing came before; keys and values are left for what follows."""
    return k_BKTH, v_BKTH, KVCache(k_BKTH, v_BKTH)


def follow(past: KVCache, k_BKTH: jax.Array, v_BKTH: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """Behind the keys and values of a prompt."""
    k_BKSH = jnp.concatenate([past.k_BKSH, k_BKTH], axis=2)
    return k_BKSH, jnp.concatenate([past.v_BKSH, v_BKTH], axis=2), None


def write_ring(slot: jax.Array) -> Extend:
    """Over what stands at `slot` of each row's ring."""

    def extend(past: KVCache, k_BKTH: jax.Array, v_BKTH: jax.Array) -> tuple[jax.Array, jax.Array, KVCache]:
        k_BKSH = jax.lax.dynamic_update_slice_in_dim(past.k_BKSH, k_BKTH, slot, axis=2)
        v_BKSH = jax.lax.dynamic_update_slice_in_dim(past.v_BKSH, v_BKTH, slot, axis=2)
        return k_BKSH, v_BKSH, KVCache(k_BKSH, v_BKSH)

    return extend


def write_ring_of_layer(slot: jax.Array) -> Extend:
    """As `write_ring`, for a loop that carries the stacked cache of all layers and writes where it lies."""

    def written(stacked: jax.Array, new: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        place = (layer, jnp.int32(0), jnp.int32(0), jnp.int32(slot), jnp.int32(0))
        stacked = jax.lax.dynamic_update_slice(stacked, new[None], place)
        return stacked, jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)

    def extend(past: Any, k_BKTH: jax.Array, v_BKTH: jax.Array) -> tuple[jax.Array, jax.Array, KVCache]:
        cache, layer = past
        k_LBKSH, k_BKSH = written(cache.k_BKSH, k_BKTH, layer)
        v_LBKSH, v_BKSH = written(cache.v_BKSH, v_BKTH, layer)
        return k_BKSH, v_BKSH, KVCache(k_LBKSH, v_LBKSH)

    return extend


def _keys_times(q_BKQH: jax.Array, k_BKSH: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    return jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BKSH, preferred_element_type=out_dtype)


def attention_logits(q_BKQH: jax.Array, k_BKSH: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """q k^T `[B, K, Q, S]`.

    With few queries the keys stand on the left on the CPU, for the reason given in `decoder.product`.
    """
    if q_BKQH.shape[2] > FEW_QUERIES:
        return _keys_times(q_BKQH, k_BKSH, out_dtype)

    def keys_left(q_BKQH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
        logits_BKSQ = jnp.einsum("BKSH,BKQH->BKSQ", k_BKSH, q_BKQH, preferred_element_type=out_dtype)
        return jax.lax.optimization_barrier(logits_BKSQ).swapaxes(2, 3)

    def straight(q_BKQH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
        return _keys_times(q_BKQH, k_BKSH, out_dtype)

    return jax.lax.platform_dependent(q_BKQH, k_BKSH, cpu=keys_left, default=straight)


def attend(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen: Seen) -> jax.Array:
    """Grouped-query attention `[B, N, T, H]`; softmax in at least float32. The reference for every other backend.

    The R query heads of a key head are run as extra queries, Q = R T. A query that sees no key has a meaningless but
    finite result.
    """
    B, N, T, H = q_BNTH.shape
    K = k_BKSH.shape[1]
    accumulator = jnp.promote_types(q_BNTH.dtype, jnp.float32)
    logits_BKQS = attention_logits(q_BNTH.reshape(B, K, -1, H), k_BKSH, accumulator)
    logits_BKRTS = logits_BKQS.reshape(B, K, N // K, T, -1) * H**-0.5
    mask_B11TS = seen.mask()[:, None, None]
    weight_BKRTS = jax.nn.softmax(jnp.where(mask_B11TS, logits_BKRTS, MASKED), axis=-1)
    weight_BKQS = weight_BKRTS.reshape(logits_BKQS.shape).astype(q_BNTH.dtype)
    return jnp.einsum("BKQS,BKSH->BKQH", weight_BKQS, v_BKSH).reshape(B, N, T, H)
