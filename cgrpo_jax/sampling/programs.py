"""The sampler's programs: prefill a prompt, put it into rows, decode some tokens, change the number of rows or slots.

`R` rows are decoded together, each at its own position of its own text. The KV cache of a row is a ring buffer of `S`
slots. All rows have one clock: the keys and values of a step go to slot `time mod S` in every row, so writing them is
one slice and not a scatter. A row attends to the slots written within its last `length` steps, and to nothing older.
So a row that has ended is given to the next prompt without touching the others, and masks follow from lengths alone.

A row starts with its prompt but for the last token in its ring; decoding feeds that token first. So the first token of
a response is drawn like all others, and a row takes exactly as many steps as it draws tokens.
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
from cgrpo_jax.model import attention, decoder
from cgrpo_jax.model.attention import KVCache
from cgrpo_jax.model.decoder import Layer, ModelConfig, Params
from cgrpo_jax.model.splash import divided
from cgrpo_jax.sampling.draw import draw, row_keys

ROW_AXES = ("data", "fsdp")  # mesh axes over which the rows are divided
EOS_SET = 8  # see `eos_set`


class Slots(NamedTuple):
    """The state of all rows. `cache` is a `KVCache` for each layer, or a stacked one (`pool.setup_for`)."""

    cache: tuple[KVCache, ...] | KVCache
    time: jax.Array  # int32, steps since the slots were made
    token_R: jax.Array  # int32, the id to feed next
    length_R: jax.Array  # int32, tokens of prompt and response in the ring, which lacks the one to feed next
    count_R: jax.Array  # int32, tokens drawn so far
    limit_R: jax.Array  # int32, tokens to draw at most
    key_R: jax.Array  # random keys
    active_R: jax.Array  # bool

    @property
    def ring(self) -> int:
        """S, the slots of a row."""
        return jax.tree.leaves(self.cache)[0].shape[-2]

    @property
    def stacked(self) -> bool:
        """Whether one array holds the caches of all layers, for a loop over them."""
        return isinstance(self.cache, KVCache)


class Chunk(NamedTuple):
    """What some steps of decoding drew. Of a row's tokens the first `made_R` count."""

    token_RC: jax.Array
    logp_RC: jax.Array
    kept_RC: jax.Array  # probability mass that top-k and top-p kept, see draw.draw
    made_R: jax.Array
    active_R: jax.Array  # bool: rows that go on
    finished_R: jax.Array  # bool: rows that an end-of-sequence id ended
    steps: jax.Array  # int32, steps taken, at most C


def _sharding(mesh: Mesh, shape: tuple[int, ...], *axes: Any) -> NamedSharding:
    """Divides each dimension over a mesh axis; a dimension that the axis does not divide evenly stays whole."""
    spec = [axis if shape[i] % _size(mesh, axis) == 0 else None for i, axis in enumerate(axes)]
    return NamedSharding(mesh, P(*spec))


def _size(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    names = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(mesh.shape[name] for name in names)


def _on(mesh: Mesh, x: jax.Array, *axes: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, _sharding(mesh, x.shape, *axes))


def slot_shardings(mesh: Mesh, slots: Slots) -> Any:
    """Rows are divided over the data axes, key/value heads over `tensor`. Takes arrays or abstract ones."""
    layers = (None,) if slots.stacked else ()
    cache: Any = jax.tree.map(lambda x: _sharding(mesh, x.shape, *layers, ROW_AXES, "tensor"), slots.cache)
    vectors = {
        name: _sharding(mesh, x.shape, ROW_AXES) for name, x in slots._asdict().items() if name not in ("cache", "time")
    }
    return slots._replace(cache=cache, time=_sharding(mesh, ()), **vectors)  # type: ignore[arg-type]


def prompt_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Of a prefilled prompt `[L, K, T, H]`: its tokens are divided over the devices of the rows."""
    return _sharding(mesh, shape, None, "tensor", ROW_AXES)


def _place(mesh: Mesh, slots: Slots) -> Slots:
    return jax.tree.map(jax.lax.with_sharding_constraint, slots, slot_shardings(mesh, slots))


@functools.partial(jax.jit, static_argnames=("cfg", "rows", "slots", "dtype", "mesh", "unrolled"))
def empty_slots(*, cfg: ModelConfig, rows: int, slots: int, dtype: DTypeLike, mesh: Mesh, unrolled: bool) -> Slots:
    """Slots in which no row is active."""
    zeros_R = jnp.zeros(rows, jnp.int32)
    key_R = jax.random.split(jax.random.key(0), rows)
    stacked = decoder.init_cache(cfg, rows, slots, dtype)
    cache = decoder.unstack(stacked) if unrolled else stacked
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
    attend: decoder.Attend = attention.attend,
    before: int = 0,
    whole: int = 0,
) -> list[KVCache]:
    """Keys and values `[L, K, T, H]` of each of Q right-padded prompts, laid out as `prompt_sharding` says.

    Args:
      weights: of `engine.weights_to_prefill`.
      pasts: for each prompt the keys and values of its first `before` tokens; tokens_QT are those that follow.
      attend: computes attention: the reference, or a kernel that runs on each device's own rows and heads.
      whole: tokens that each result holds, padding included; 0: T, where there are no pasts.
    """
    Q, T = tokens_QT.shape
    loop = decoder.looped if isinstance(weights["layers"], tuple) else decoder.scanned
    tokens_QT = _on(mesh, tokens_QT, ROW_AXES)
    position_QS = jnp.broadcast_to(jnp.arange(before + T, dtype=jnp.int32)[None], (Q, before + T))
    position_QT = position_QS[:, before:]
    seen = attention.after_own(position_QT, position_QS)

    def by_rows(layer: Layer, x_QTD: jax.Array, layers: Any, past: Any) -> tuple[jax.Array, Any]:
        return loop(layer, _on(mesh, x_QTD, ROW_AXES), layers, past)

    def together(*of_prompts: jax.Array) -> jax.Array:
        x_LQKSH = jnp.stack(of_prompts, axis=1)
        return _on(mesh, x_LQKSH[:, :, :, :before], None, ROW_AXES)

    past: Any = jax.tree.map(together, *pasts) if pasts else None
    extend: attention.Extend = attention.join if pasts else attention.keep_own
    own = attend if attend is attention.attend else divided(mesh, attend)
    _, cache = decoder.run_layers(
        cfg, weights, tokens_QT, position_QT, seen, past, extend, dtype=dtype, loop=by_rows, attend=own
    )

    def one(x_LQKTH: jax.Array, q: int) -> jax.Array:
        x_LKTH = x_LQKTH[:, q]
        return jax.lax.with_sharding_constraint(x_LKTH, prompt_sharding(mesh, x_LKTH.shape))

    def sized(x_LQKTH: jax.Array) -> jax.Array:
        size = whole or T
        padded_LQKTH = jnp.pad(x_LQKTH, ((0, 0),) * 3 + ((0, max(0, size - before - T)), (0, 0)))
        return _on(mesh, padded_LQKTH[:, :, :, :size], None, ROW_AXES, "tensor")

    cache = jax.tree.map(sized, cache)
    return [KVCache(one(cache.k_BKSH, q), one(cache.v_BKSH, q)) for q in range(Q)]


class Entry(NamedTuple):
    """Requests that have one prompt: arrays of length R, of which the first `used` entries count."""

    used: Any  # int32
    row_R: Any  # int32, the rows that they get
    limit_R: Any  # int32, tokens to draw at most
    name_R4: Any  # int32, (kind, problem, sample, round)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnums=0)
def enter(
    slots: Slots, prompt: KVCache, length: jax.Array, last: jax.Array, entry: Entry, key: jax.Array, *, mesh: Mesh
) -> Slots:
    """Writes a prefilled prompt into the rings of some rows and makes them active.

    Args:
      prompt: keys and values `[L, K, T, H]`, of which the first `length` tokens count.
      last: the prompt's last id, which is not among them.
      key: of `step_key`.
    """
    S = slots.ring
    first = (slots.time - length) % S  # slot of the prompt's first token

    def ring(x_LKTH: jax.Array) -> jax.Array:
        T = x_LKTH.shape[2]
        x_LKTH = _on(mesh, x_LKTH, None, "tensor")  # gathered while it is still shorter than the ring
        x_LKSH = jnp.pad(x_LKTH, ((0, 0), (0, 0), (0, max(0, S - T)), (0, 0)))[:, :, :S]
        return jnp.roll(x_LKSH, first, axis=2)[:, None]

    entering = jax.tree.map(ring, prompt)
    layers = entering if slots.stacked else decoder.unstack(entering)

    def put_row(i: jax.Array, cache: Any) -> Any:
        def written(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, entry.row_R[i], axis=old.ndim - 4)

        return jax.tree.map(written, cache, layers)

    R = len(slots.token_R)
    cache = jax.lax.fori_loop(0, entry.used, put_row, slots.cache)
    row_R = jnp.where(jnp.arange(R) < entry.used, entry.row_R, R)  # there is no row R: dropped

    def entered(old_R: jax.Array, new: Any) -> jax.Array:
        return old_R.at[row_R].set(new, mode="drop")

    return _place(
        mesh,
        slots._replace(
            cache=cache,
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
    """Copies rows into slots of another size: `row_of_R` is the old row of each new one, -1 for none.

    No row may hold more tokens than the new ring has slots.
    """
    S = slots.ring
    age = (
        slots.time - 1 - jnp.arange(slots_to)
    ) % slots_to  # steps since what a new slot holds was written; 0 is the last
    source = (slots.time - 1 - jnp.minimum(age, S - 1)) % S
    old = jnp.maximum(row_of_R, 0)
    cache = jax.tree.map(lambda x: x[..., old, :, :, :][..., source, :], slots.cache)
    vectors = {name: x[old] for name, x in slots._asdict().items() if name not in ("cache", "time")}
    vectors["active_R"] &= row_of_R >= 0
    return _place(mesh, Slots(cache, slots.time, **vectors))


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnums=0)
def halt(slots: Slots, going_on_R: jax.Array, *, mesh: Mesh) -> Slots:
    """Makes the other rows inactive."""
    return _place(mesh, slots._replace(active_R=slots.active_R & going_on_R))


def eos_set(ids: Sequence[int]) -> np.ndarray:
    """End-of-sequence ids as int32, padded with -1 to a multiple of 8, so that their number changes no program."""
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
    """Draws up to `chunk` tokens in every active row; stops once no row is active or `leave_at` rows have ended.

    Args:
      weights: `engine.Weights.decoding`.
      eos_E: of `eos_set`; without any id in it every row runs to its limit.
    """
    R, start_R = len(slots.token_R), slots.active_R
    in_place = decoder.unrolled_in_place if isinstance(weights["layers"], tuple) else decoder.scanned_in_place

    def cond(state: tuple[Slots, Chunk]) -> jax.Array:
        slots, out = state
        ended = (start_R & ~slots.active_R).sum()
        return (out.steps < chunk) & slots.active_R.any() & (ended < leave_at)

    def body(state: tuple[Slots, Chunk]) -> tuple[Slots, Chunk]:
        slots, out = state
        slot = slots.time % slots.ring
        window_R = jnp.where(slots.active_R, slots.length_R, 0)  # inactive rows attend to nothing
        seen = attention.in_ring(slots.time, window_R, slots.ring, mesh)
        write, loop = (
            (attention.write_ring_of_layer, in_place) if slots.stacked else (attention.write_ring, decoder.unrolled)
        )
        place = (slots.token_R[:, None], slots.length_R[:, None], seen, slots.cache, write(slot))
        hidden_R1D, cache = decoder.run_layers(cfg, weights, *place, dtype=dtype, loop=loop)
        drawn = draw(decoder.logits(cfg, weights, hidden_R1D[:, 0]), slots.key_R, slots.count_R, sampling)
        slots, out = _advance(slots, out, cache, drawn, eos_E)
        return _place(mesh, slots), out

    real_RC, no_R = jnp.zeros((R, chunk), decoder.accumulator(dtype)), jnp.zeros(R, bool)
    zero_R = jnp.zeros(R, jnp.int32)
    out = Chunk(jnp.zeros((R, chunk), jnp.int32), real_RC, real_RC, zero_R, start_R, no_R, jnp.int32(0))
    slots, out = jax.lax.while_loop(cond, body, (slots, out))
    return slots, jax.lax.with_sharding_constraint(
        out, NamedSharding(mesh, P())
    )  # the same on every host, which decides by it


def _advance(slots: Slots, out: Chunk, cache: Any, drawn: tuple[jax.Array, ...], eos_E: jax.Array):
    """The slots and the chunk after a step that drew these tokens."""
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
