"""The sampler's programs: prefill a prompt, give it to rows, decode some tokens, change the number of rows or slots.

`R` rows are decoded together, each at its own place in its own text. The cache of every row is a ring of `S` slots over
one common clock: the tokens of this step go to slot `time mod S` in all rows, so writing them is one slice and never a
scatter. A row sees the slots written within its last `length` steps; what was there before is never seen. So a row
that ended is given to the next prompt without touching the others, and masks come from lengths only.

A row starts with all of its prompt but the last token in its ring; decoding feeds that token first. So the first token
is drawn where all others are, and a row takes exactly as many steps as it makes tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from cgrpo_jax.config.options import SamplingConfig
from cgrpo_jax.model import attention
from cgrpo_jax.model.attention import (
    Extend,
    KVCache,
    after_own,
    attend,
    in_ring,
    join,
    keep_own,
    write_ring,
    write_ring_of_layer,
)
from cgrpo_jax.model.decoder import (
    Attend,
    Layer,
    ModelConfig,
    Params,
    accumulator,
    init_cache,
    logits,
    looped,
    run_layers,
    scanned,
    scanned_in_place,
    unrolled,
    unrolled_in_place,
    unstack,
)
from cgrpo_jax.model.splash import divided
from cgrpo_jax.sampling.draw import draw, row_keys

ROWS = ("data", "fsdp")  # mesh axes that share the rows
EOS_SET = 8  # ids, see `eos_set`


class Slots(NamedTuple):
    """All rows under way. `cache` is a tuple of `KVCache`, one a layer, or a stacked one (see `unrolls`)."""

    cache: tuple[KVCache, ...] | KVCache
    time: jax.Array  # int32, steps since the beginning
    token_R: jax.Array  # int32, the id to feed next
    length_R: jax.Array  # int32, tokens in the ring: prompt and response, less the one to feed next
    count_R: jax.Array  # int32, tokens drawn
    limit_R: jax.Array  # int32, tokens to draw at most
    key_R: jax.Array  # random keys
    active_R: jax.Array  # bool

    @property
    def ring(self) -> int:
        """S."""
        return jax.tree.leaves(self.cache)[0].shape[-2]

    @property
    def stacked(self) -> bool:
        """Whether one cache holds all layers, for a loop over them."""
        return isinstance(self.cache, KVCache)


class Chunk(NamedTuple):
    """What some steps of decoding made; a row's tokens are its first `made_R` ones."""

    token_RC: jax.Array
    logp_RC: jax.Array
    kept_RC: jax.Array  # see draw.draw
    made_R: jax.Array
    active_R: jax.Array
    finished_R: jax.Array  # bool: ended by an end-of-sequence id
    steps: jax.Array  # steps taken, at most C


def _sharding(mesh: Mesh, shape: tuple[int, ...], *axes: Any) -> NamedSharding:
    """An axis of the mesh that does not divide its dimension is left out."""
    spec = [axis if shape[i] % _size(mesh, axis) == 0 else None for i, axis in enumerate(axes)]
    return NamedSharding(mesh, P(*spec))


def _size(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    names = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(mesh.shape[name] for name in names)


def _on(mesh: Mesh, x: jax.Array, *axes: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, _sharding(mesh, x.shape, *axes))


def slot_shardings(mesh: Mesh, slots: Slots) -> Any:
    """Rows over the data axes, key/value heads over `tensor`; of arrays or abstract ones."""
    layers = (None,) if slots.stacked else ()
    cache: Any = jax.tree.map(lambda x: _sharding(mesh, x.shape, *layers, ROWS, "tensor"), slots.cache)
    vectors = {
        name: _sharding(mesh, x.shape, ROWS) for name, x in slots._asdict().items() if name not in ("cache", "time")
    }
    return slots._replace(cache=cache, time=_sharding(mesh, ()), **vectors)  # type: ignore[arg-type]


def prompt_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Of a prefilled prompt `[L, K, T, H]`: its tokens lie on the devices that share the rows."""
    return _sharding(mesh, shape, None, "tensor", ROWS)


def _place(mesh: Mesh, slots: Slots) -> Slots:
    return jax.tree.map(jax.lax.with_sharding_constraint, slots, slot_shardings(mesh, slots))


def unrolls(platform: str) -> bool:
    """Whether a backend decodes with its weights unrolled, or in a loop over stacked layers; the tokens are the same.

    Unrolled where the compiled program was looked at: the CPU's loop copies each layer's weights and cache out of the
    stack, the TPU's cannot fetch a layer's weights ahead. A loop elsewhere: its compile time is flat in depth.
    """
    return platform in ("cpu", "tpu")


def unrolls_cache(platform: str) -> bool:
    """Whether each layer's cache is an array of its own. On TPU v4 XLA copies one of few rows to its fast memory."""
    return platform == "cpu"


@functools.partial(jax.jit, static_argnames=("cfg", "rows", "slots", "dtype", "mesh", "unrolled"))
def empty_slots(*, cfg: ModelConfig, rows: int, slots: int, dtype: DTypeLike, mesh: Mesh, unrolled: bool) -> Slots:
    """No row active."""
    zeros_R = jnp.zeros(rows, jnp.int32)
    key_R = jax.random.split(jax.random.key(0), rows)
    stacked = init_cache(cfg, rows, slots, dtype)
    cache = unstack(stacked) if unrolled else stacked
    empty = Slots(cache, jnp.int32(0), zeros_R, zeros_R, zeros_R, zeros_R, key_R, jnp.zeros(rows, bool))
    return _place(mesh, empty)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "mesh", "attend", "before", "whole"))
def prefill(
    weights: Params,
    tokens_QT: jax.Array,
    pasts: Sequence[KVCache] = (),
    *,
    cfg: ModelConfig,
    dtype: DTypeLike,
    mesh: Mesh,
    attend: Attend = attend,
    before: int = 0,
    whole: int = 0,
) -> list[KVCache]:
    """Keys and values `[L, K, T, H]` of each of Q right-padded prompts, their tokens shared by the rows' devices.

    Args:
      weights: of `weights_to_prefill`.
      pasts: one a prompt, what was made of its first `before` tokens; tokens_QT are those that follow them.
      attend: computes attention; the reference, or what is given a device's own rows and heads.
      whole: tokens that each result holds, padding included; 0: T, where there are no pasts.
    """
    Q, T = tokens_QT.shape
    loop = looped if isinstance(weights["layers"], tuple) else scanned
    tokens_QT = _on(mesh, tokens_QT, ROWS)
    position_QS = jnp.broadcast_to(jnp.arange(before + T, dtype=jnp.int32)[None], (Q, before + T))
    position_QT = position_QS[:, before:]
    seen = after_own(position_QT, position_QS)

    def by_rows(layer: Layer, x_QTD: jax.Array, layers: Any, past: Any) -> tuple[jax.Array, Any]:
        return loop(layer, _on(mesh, x_QTD, ROWS), layers, past)

    def together(*of_prompts: jax.Array) -> jax.Array:
        x_LQKSH = jnp.stack(of_prompts, axis=1)
        return _on(mesh, x_LQKSH[:, :, :, :before], None, ROWS)

    past: Any = jax.tree.map(together, *pasts) if pasts else None
    extend: Extend = join if pasts else keep_own
    own = attend if attend is attention.attend else divided(mesh, attend)
    _, cache = run_layers(
        cfg, weights, tokens_QT, position_QT, seen, past, extend, dtype=dtype, loop=by_rows, attend=own
    )

    def one(x_LQKTH: jax.Array, q: int) -> jax.Array:
        x_LKTH = x_LQKTH[:, q]
        return jax.lax.with_sharding_constraint(x_LKTH, prompt_sharding(mesh, x_LKTH.shape))

    def sized(x_LQKTH: jax.Array) -> jax.Array:
        size = whole or T
        padded_LQKTH = jnp.pad(x_LQKTH, ((0, 0),) * 3 + ((0, max(0, size - before - T)), (0, 0)))
        return _on(mesh, padded_LQKTH[:, :, :, :size], None, ROWS, "tensor")

    cache = jax.tree.map(sized, cache)
    return [KVCache(one(cache.k_BKSH, q), one(cache.v_BKSH, q)) for q in range(Q)]


class Entry(NamedTuple):
    """Requests that start with one prompt: arrays over R places, of which the first `used` count."""

    used: Any  # int32
    row_R: Any  # int32, which rows they get
    limit_R: Any  # int32, tokens to draw at most
    name_R4: Any  # int32, (kind, problem, sample, round)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnums=0)
def enter(
    slots: Slots, prompt: KVCache, length: jax.Array, last: jax.Array, entry: Entry, key: jax.Array, *, mesh: Mesh
) -> Slots:
    """Puts a prefilled prompt into the rings of some rows.

    Args:
      prompt: keys and values `[L, K, T, H]`, of which the first `length` tokens count.
      last: the prompt's last id, not among them.
      key: of seed and step (`step_key`).
    """
    S = slots.ring
    first = (slots.time - length) % S  # slot of the prompt's first token

    def ring(x_LKTH: jax.Array) -> jax.Array:
        T = x_LKTH.shape[2]
        x_LKTH = _on(mesh, x_LKTH, None, "tensor")  # all of it on each device, before it is as long as the ring
        x_LKSH = jnp.pad(x_LKTH, ((0, 0), (0, 0), (0, max(0, S - T)), (0, 0)))[:, :, :S]
        return jnp.roll(x_LKSH, first, axis=2)[:, None]

    entering = jax.tree.map(ring, prompt)
    layers = entering if slots.stacked else unstack(entering)

    def put_row(i: jax.Array, cache: Any) -> Any:
        def written(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, entry.row_R[i], axis=old.ndim - 4)

        return jax.tree.map(written, cache, layers)

    R = len(slots.token_R)
    cache = jax.lax.fori_loop(0, entry.used, put_row, slots.cache)
    row_R = jnp.where(jnp.arange(R) < entry.used, entry.row_R, R)  # R is nowhere: dropped

    def entered(old_R: jax.Array, new: Any) -> jax.Array:
        return old_R.at[row_R].set(new, mode="drop")

    return _place(
        mesh,
        Slots(
            cache=cache,
            time=slots.time,
            token_R=entered(slots.token_R, last),
            length_R=entered(slots.length_R, length),
            count_R=entered(slots.count_R, 0),
            limit_R=entered(slots.limit_R, entry.limit_R),
            key_R=entered(slots.key_R, row_keys(key, entry.name_R4)),
            active_R=entered(slots.active_R, True),
        ),
    )


@functools.partial(jax.jit, static_argnames=("slots_to", "mesh"))
def resize(slots: Slots, row_of_R: jax.Array, *, slots_to: int, mesh: Mesh) -> Slots:
    """Other rows (`row_of_R`: which old row each new one is, -1 for none) and another number of slots.

    No row may hold more tokens than the new ring has slots.
    """
    S = slots.ring
    age = (slots.time - 1 - jnp.arange(slots_to)) % slots_to  # of what each new slot shall hold; 0 is the last written
    source = (slots.time - 1 - jnp.minimum(age, S - 1)) % S
    old = jnp.maximum(row_of_R, 0)
    cache = jax.tree.map(lambda x: x[..., old, :, :, :][..., source, :], slots.cache)
    vectors = {name: x[old] for name, x in slots._asdict().items() if name not in ("cache", "time")}
    vectors["active_R"] &= row_of_R >= 0
    return _place(mesh, Slots(cache, slots.time, **vectors))


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnums=0)
def halt(slots: Slots, going_on_R: jax.Array, *, mesh: Mesh) -> Slots:
    """Ends the rows that are not to go on."""
    return _place(mesh, slots._replace(active_R=slots.active_R & going_on_R))


def eos_set(ids: Sequence[int]) -> np.ndarray:
    """End-of-sequence ids, int32, filled up with -1, which no id is: one program however many there are."""
    return np.asarray([*ids, *[-1] * (-len(ids) % EOS_SET or EOS_SET * (not ids))], np.int32)


@functools.partial(jax.jit, static_argnames=("cfg", "sampling", "dtype", "mesh", "chunk"), donate_argnames=("slots",))
def decode(
    weights: Params,
    slots: Slots,
    eos_E: jax.Array,
    leave_at: jax.Array,
    *,
    cfg: ModelConfig,
    sampling: SamplingConfig,
    dtype: DTypeLike,
    mesh: Mesh,
    chunk: int,
) -> tuple[Slots, Chunk]:
    """Up to `chunk` tokens for every active row; stops early when no row is active or `leave_at` rows have ended.

    Args:
      weights: of `weights_for_sampling`.
      eos_E: of `eos_set`; where no id is one every row runs to its limit.
    """
    R, start_R = len(slots.token_R), slots.active_R
    in_place = unrolled_in_place if isinstance(weights["layers"], tuple) else scanned_in_place

    def cond(state: tuple[Slots, Chunk]) -> jax.Array:
        slots, out = state
        ended = (start_R & ~slots.active_R).sum()
        return (out.steps < chunk) & slots.active_R.any() & (ended < leave_at)

    def body(state: tuple[Slots, Chunk]) -> tuple[Slots, Chunk]:
        slots, out = state
        slot = slots.time % slots.ring
        window_R = jnp.where(slots.active_R, slots.length_R, 0)  # nobody asks what the others would say
        seen = in_ring(slots.time, window_R, slots.ring, mesh)
        write, loop = (write_ring_of_layer, in_place) if slots.stacked else (write_ring, unrolled)
        place = (slots.token_R[:, None], slots.length_R[:, None], seen, slots.cache, write(slot))
        hidden_R1D, cache = run_layers(cfg, weights, *place, dtype=dtype, loop=loop)
        drawn = draw(logits(cfg, weights, hidden_R1D[:, 0]), slots.key_R, slots.count_R, sampling)
        slots, out = _advance(slots, out, cache, drawn, eos_E)
        return _place(mesh, slots), out

    real_RC, no_R = jnp.zeros((R, chunk), accumulator(dtype)), jnp.zeros(R, bool)
    zero_R = jnp.zeros(R, jnp.int32)
    out = Chunk(jnp.zeros((R, chunk), jnp.int32), real_RC, real_RC, zero_R, start_R, no_R, jnp.int32(0))
    slots, out = jax.lax.while_loop(cond, body, (slots, out))
    return slots, jax.lax.with_sharding_constraint(out, NamedSharding(mesh, P()))  # every host decides alike


def _advance(slots: Slots, out: Chunk, cache: Any, drawn: tuple[jax.Array, ...], eos_E: jax.Array):
    """Books the tokens of one step."""
    token_R, logp_R, kept_R = drawn

    def appended(old_RC: jax.Array, new_R: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old_RC, new_R[:, None], out.steps, axis=1)

    count_R, length_R = slots.count_R + slots.active_R, slots.length_R + slots.active_R
    eos_R = (token_R[:, None] == eos_E[None]).any(axis=-1) & slots.active_R
    active_R = slots.active_R & ~eos_R & (count_R < slots.limit_R)
    slots_ = Slots(cache, slots.time + 1, token_R, length_R, count_R, slots.limit_R, slots.key_R, active_R)
    return slots_, Chunk(
        appended(out.token_RC, token_R),
        appended(out.logp_RC, logp_R),
        appended(out.kept_RC, kept_R),
        out.made_R + slots.active_R,
        active_R,
        out.finished_R | eos_R,
        out.steps + 1,
    )
