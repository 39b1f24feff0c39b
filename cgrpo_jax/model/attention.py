"""Attention behind one function: `attend(q, k, v, seen)`. What is seen is a small record, never a dense mask.

`Seen` says it by segments and positions; `InRing` is one query a row over the rings of decoding, where a platform may
have its own way (`attend_in_ring`).

B rows, T queries, S keys, N query heads, K key/value heads, H head dim, R = N / K query heads of a key head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cgrpo_jax.model.ring_kernel import MASKED, attend_divided

EVERYBODY, NOBODY = -2, -1  # segments of keys: seen by each query of the row, seen by none
FEW_QUERIES = 8  # see `attention_logits`
SAVED = "attention"  # the name of an attention's output for rematerialisation


class Seen(NamedTuple):
    """Which keys a query sees: those of its own segment and of EVERYBODY, up to its own position.

    Positions are those of the text (as of RoPE), not places in the array. Segments of queries are not negative.
    """

    segment_BT: jax.Array  # int32, of the queries
    key_segment_BS: jax.Array  # int32
    position_BT: jax.Array  # int32
    key_position_BS: jax.Array  # int32
    shares: bool = False  # whether any key may be EVERYBODY's
    ordered: bool = False  # in each segment places in the array follow the positions; queries are the last keys

    def mask(self) -> jax.Array:
        """`[B, T, S]`."""
        key_BTS = self.key_segment_BS[:, None, :]
        own_BTS = key_BTS == self.segment_BT[:, :, None]
        if self.shares:
            own_BTS |= key_BTS == EVERYBODY
        return own_BTS & (self.key_position_BS[:, None, :] <= self.position_BT[:, :, None])


def among_themselves(segment_BT: jax.Array, position_BT: jax.Array) -> Seen:
    """Queries that are the keys, too: causal within each segment. Positions ascend within it."""
    return Seen(segment_BT, segment_BT, position_BT, position_BT, ordered=True)


def after_own(position_BT: jax.Array, key_position_BS: jax.Array) -> Seen:
    """Rows without segments: queries are the last keys, and follow their own past. Positions ascend."""
    own_BT, key_BS = jnp.zeros_like(position_BT), jnp.zeros_like(key_position_BS)
    return Seen(own_BT, key_BS, position_BT, key_position_BS, ordered=True)


def after_prompt(segment_BT: jax.Array, position_BT: jax.Array, prompt_length_B: jax.Array, slots: int) -> Seen:
    """Keys are `slots` of a prompt, the first `prompt_length_B` of which count for every segment, then the queries'."""
    B, slot_S = len(prompt_length_B), jnp.arange(slots, dtype=jnp.int32)
    prompt_BS = jnp.where(slot_S[None] < prompt_length_B[:, None], EVERYBODY, NOBODY)
    keys_BS = jnp.concatenate([prompt_BS, segment_BT], axis=1)
    places_BS = jnp.concatenate([jnp.broadcast_to(slot_S[None], (B, slots)), position_BT], axis=1)
    return Seen(segment_BT, keys_BS, position_BT, places_BS, shares=True)


class InRing(NamedTuple):
    """One query a row over a ring on a common clock: it sees what was written in its last `length_R` steps, and now."""

    time: jax.Array  # int32, the step: its own key stands in slot `time mod S`
    length_R: jax.Array  # int32
    live_RS: jax.Array  # bool, the slots that a row sees
    mesh: Mesh | None  # of rows and heads


def in_ring(time: jax.Array, length_R: jax.Array, slots: int, mesh: Mesh) -> InRing:
    """What the rows of a decode step see of their rings of `slots`.

    The barrier keeps the ages from being computed again in each layer and for each head.
    """
    age_S = (time - jnp.arange(slots, dtype=jnp.int32)) % slots
    return InRing(time, length_R, jax.lax.optimization_barrier(age_S[None] <= length_R[:, None]), mesh)


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of one layer, or of all layers with a leading [L] axis."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


class OfLayer(NamedTuple):
    """Keys or values of one layer of a stacked cache, without a copy."""

    stacked_LBKSH: jax.Array
    layer: jax.Array  # int32

    def alone(self) -> jax.Array:
        """A copy, `[B, K, S, H]`."""
        return jax.lax.dynamic_index_in_dim(self.stacked_LBKSH, self.layer, keepdims=False)


# (what a layer left before, its new keys, its new values) -> keys and values to attend to, and what it leaves now
Extend = Callable[[Any, jax.Array, jax.Array], tuple[Any, Any, Any]]


def attend_to_own(past: None, k_BKTH: jax.Array, v_BKTH: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """No keys came before, and none are kept: a forward pass over whole rows."""
    return k_BKTH, v_BKTH, None


def keep_own(past: None, k_BKTH: jax.Array, v_BKTH: jax.Array) -> tuple[jax.Array, jax.Array, KVCache]:
    """No keys came before; keys and values are kept, as a KV cache for the queries that follow."""
    return k_BKTH, v_BKTH, KVCache(k_BKTH, v_BKTH)


def join(past: KVCache, k_BKTH: jax.Array, v_BKTH: jax.Array) -> tuple[jax.Array, jax.Array, KVCache]:
    """The queries follow a prompt's KV cache; both are kept, as the cache for the queries that follow."""
    k_BKSH, v_BKSH, _ = follow(past, k_BKTH, v_BKTH)
    return k_BKSH, v_BKSH, KVCache(k_BKSH, v_BKSH)


def follow(past: KVCache, k_BKTH: jax.Array, v_BKTH: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """The queries follow a prompt's KV cache, and nothing is kept."""
    k_BKSH = jnp.concatenate([past.k_BKSH, k_BKTH], axis=2)
    return k_BKSH, jnp.concatenate([past.v_BKSH, v_BKTH], axis=2), None


def write_ring(slot: jax.Array) -> Extend:
    """Writes keys and values of a decode step to `slot` of each row's ring buffer."""

    def extend(past: KVCache, k_BKTH: jax.Array, v_BKTH: jax.Array) -> tuple[jax.Array, jax.Array, KVCache]:
        k_BKSH = jax.lax.dynamic_update_slice_in_dim(past.k_BKSH, k_BKTH, slot, axis=2)
        v_BKSH = jax.lax.dynamic_update_slice_in_dim(past.v_BKSH, v_BKTH, slot, axis=2)
        return k_BKSH, v_BKSH, KVCache(k_BKSH, v_BKSH)

    return extend


def write_ring_of_layer(slot: jax.Array) -> Extend:
    """As `write_ring`, for a loop that carries the stacked cache of all layers and writes where it lies."""

    def written(stacked: jax.Array, new: jax.Array, layer: jax.Array) -> OfLayer:
        place = (layer, jnp.int32(0), jnp.int32(0), jnp.int32(slot), jnp.int32(0))
        return OfLayer(jax.lax.dynamic_update_slice(stacked, new[None], place), layer)

    def extend(past: Any, k_BKTH: jax.Array, v_BKTH: jax.Array) -> tuple[OfLayer, OfLayer, KVCache]:
        cache, layer = past
        k, v = written(cache.k_BKSH, k_BKTH, layer), written(cache.v_BKSH, v_BKTH, layer)
        return k, v, KVCache(k.stacked_LBKSH, v.stacked_LBKSH)

    return extend


def attention_logits(q_BKYH: jax.Array, k_BKSH: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """q k^T `[B, K, Y, S]`.

    With few queries the keys stand on the left on the CPU, for the reason given in `decoder.product`.
    """

    def straight(q_BKYH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
        return jnp.einsum("BKYH,BKSH->BKYS", q_BKYH, k_BKSH, preferred_element_type=out_dtype)

    def keys_left(q_BKYH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
        logits_BKSY = jnp.einsum("BKSH,BKYH->BKSY", k_BKSH, q_BKYH, preferred_element_type=out_dtype)
        return jax.lax.optimization_barrier(logits_BKSY).swapaxes(2, 3)

    if q_BKYH.shape[2] > FEW_QUERIES:
        return straight(q_BKYH, k_BKSH)
    return jax.lax.platform_dependent(q_BKYH, k_BKSH, cpu=keys_left, default=straight)


def attend(q_BNTH: jax.Array, k_BKSH: Any, v_BKSH: Any, seen: Seen | InRing) -> jax.Array:
    """Grouped-query attention `[B, N, T, H]`; softmax in at least float32.

    A query that sees no key has a meaningless but finite result. Keys and values may be `OfLayer` in a ring.
    """
    if isinstance(seen, InRing):
        return attend_in_ring(q_BNTH, k_BKSH, v_BKSH, seen)
    return attend_masked(q_BNTH, k_BKSH, v_BKSH, seen.mask())


def attend_masked(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """As `attend`, over every key, with what is seen as a mask. The reference for every other way.

    The R query heads of a key head are run as extra queries, Q = R T.
    """
    B, N, T, H = q_BNTH.shape
    K = k_BKSH.shape[1]
    accumulator = jnp.promote_types(q_BNTH.dtype, jnp.float32)
    logits_BKYS = attention_logits(q_BNTH.reshape(B, K, -1, H), k_BKSH, accumulator)
    logits_BKMTS = logits_BKYS.reshape(B, K, N // K, T, -1) * H**-0.5
    weight_BKMTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], logits_BKMTS, MASKED), axis=-1)
    weight_BKYS = weight_BKMTS.reshape(logits_BKYS.shape).astype(q_BNTH.dtype)
    return jnp.einsum("BKYS,BKSH->BKYH", weight_BKYS, v_BKSH).reshape(B, N, T, H)


def attend_in_ring(
    q_RN1H: jax.Array, k_RKSH: jax.Array | OfLayer, v_RKSH: jax.Array | OfLayer, ring: InRing
) -> jax.Array:
    """As `attend`, for one query of each of R rows over its ring; each platform in its own way."""
    mesh = ring.mesh

    def over_all_slots(q_RN1H: jax.Array, k_RKSH: Any, v_RKSH: Any, ring: InRing) -> jax.Array:
        k_RKSH, v_RKSH = (x.alone() if isinstance(x, OfLayer) else x for x in (k_RKSH, v_RKSH))
        return attend_masked(q_RN1H, k_RKSH, v_RKSH, ring.live_RS[:, None])

    def over_live_blocks(q_RN1H: jax.Array, k_RKSH: Any, v_RKSH: Any, ring: InRing) -> jax.Array:
        k, v = (x if isinstance(x, OfLayer) else OfLayer(x[None], jnp.int32(0)) for x in (k_RKSH, v_RKSH))
        assert mesh is not None
        return attend_divided(mesh, q_RN1H, k.stacked_LBKSH, v.stacked_LBKSH, k.layer, ring.time, ring.length_R)

    arrays = q_RN1H, k_RKSH, v_RKSH, ring._replace(mesh=None)
    return jax.lax.platform_dependent(*arrays, tpu=over_live_blocks, default=over_all_slots)
