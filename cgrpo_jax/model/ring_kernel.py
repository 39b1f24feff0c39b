"""Decode attention over ring caches on TPU: a Pallas kernel that reads the blocks with something live in them.

Letters as in `records`; M = N / K. A ring of S slots is S / block blocks. Of a
row only those from the oldest token it sees to the newest are fetched and computed. The grid is as wide as the row
needs that has most of them; a step beyond a row's own blocks names the last one again, which is not fetched twice.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

LANES = 128
MASKED = -1e30
FETCHED = 2**18  # bytes of keys that are fetched at once, at most: much less leaves the memory idle


def block_size(slots: int, heads: int, head_dim: int, itemsize: int) -> int:
    """Slots of a block: the largest power of two that divides the ring and is not above FETCHED bytes of keys."""
    most = max(LANES, FETCHED // (heads * head_dim * itemsize))
    fits = [size for size in (128, 256, 512) if slots % size == 0 and size <= most]
    return fits[-1] if fits else slots


def live_blocks(time: jax.Array, length_R: jax.Array, slots: int, block: int) -> tuple[jax.Array, jax.Array]:
    """The first block that each row reads and how many; they may go on at the ring's beginning."""
    blocks, now = slots // block, time % slots
    first_R = (now - length_R) // block  # negative: behind the end of the ring
    count_R = jnp.minimum(now // block - first_R + 1, blocks)
    return (first_R % blocks).astype(jnp.int32), count_R.astype(jnp.int32)


def _kernel(
    place_ref, first_ref, count_ref, length_ref, q_ref, k_ref, v_ref, out_ref, peak_ref, total_ref, sum_ref, *, slots
):
    row, step = pl.program_id(0), pl.program_id(1)
    heads, block, head_dim = k_ref.shape

    @pl.when(step == 0)
    def _start() -> None:
        peak_ref[...] = jnp.full_like(peak_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(step < count_ref[row])
    def _add_block() -> None:
        number = (first_ref[row] + step) % (slots // block)
        age_1S = place_ref[1] - number * block - jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        age_1S = jnp.where(age_1S < 0, age_1S + slots, age_1S)
        live_1S = age_1S <= length_ref[row]
        for head in range(heads):
            q_MH, k_SH, v_SH = q_ref[head], k_ref[head], v_ref[head]
            over_H = (((1,), (1,)), ((), ()))
            logits_MS = jax.lax.dot_general(q_MH, k_SH, over_H, preferred_element_type=jnp.float32) * head_dim**-0.5
            logits_MS = jnp.where(live_1S, logits_MS, MASKED)
            old_M1 = peak_ref[head, :, :1]
            peak_M1 = jnp.maximum(old_M1, logits_MS.max(axis=-1, keepdims=True))
            weight_MS, shrunk_M1 = jnp.exp(logits_MS - peak_M1), jnp.exp(old_M1 - peak_M1)
            total_M1 = total_ref[head, :, :1] * shrunk_M1 + weight_MS.sum(axis=-1, keepdims=True)
            added_MH = jnp.dot(weight_MS.astype(v_SH.dtype), v_SH, preferred_element_type=jnp.float32)
            sum_ref[head] = sum_ref[head] * shrunk_M1 + added_MH
            peak_ref[head] = jnp.broadcast_to(peak_M1, peak_ref.shape[1:])
            total_ref[head] = jnp.broadcast_to(total_M1, total_ref.shape[1:])

    @pl.when(step == pl.num_programs(1) - 1)
    def _finish() -> None:
        out_ref[...] = (sum_ref[...] / total_ref[:, :, :1]).astype(out_ref.dtype)


def attend_in_live_blocks(
    q_RKMH: jax.Array,
    k_LRKSH: jax.Array,
    v_LRKSH: jax.Array,
    layer: jax.Array,
    time: jax.Array,
    length_R: jax.Array,
    *,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one query a row over its ring, `[R, K, M, H]` in the dtype of q; softmax in float32.

    Args:
      layer: int32, which of the L stacked caches; the others are not touched.
      time, length_R: int32; row r sees what was written in its last `length_R` steps, and in slot `time mod S` now.
      block: slots of a block, a divisor of S; None: `block_size`.
      interpret: run the kernel's operations one by one, on any platform.
    """
    R, K, M, H = q_RKMH.shape
    S = k_LRKSH.shape[3]
    block = block or block_size(S, K, H, k_LRKSH.dtype.itemsize)
    first_R, count_R = live_blocks(time, length_R, S, block)
    place_2 = jnp.stack([layer, time % S]).astype(jnp.int32)

    def keys(row, step, place_2, first_R, count_R, length_R):
        number = first_R[row] + jnp.minimum(step, count_R[row] - 1)
        return place_2[0], row, 0, number % (S // block), 0

    def queries(row, step, *scalars):
        return row, 0, 0, 0

    of_keys, of_queries = pl.BlockSpec((None, None, K, block, H), keys), pl.BlockSpec((None, K, M, H), queries)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(R, count_R.max()),
        in_specs=[of_queries, of_keys, of_keys],
        out_specs=of_queries,
        scratch_shapes=[
            pltpu.VMEM((K, M, LANES), jnp.float32),
            pltpu.VMEM((K, M, LANES), jnp.float32),
            pltpu.VMEM((K, M, H), jnp.float32),
        ],
    )
    ring_bytes = 2 * R * K * S * H * k_LRKSH.dtype.itemsize
    most = pl.CostEstimate(  # of rings that are all live
        flops=4 * R * K * M * S * H,
        bytes_accessed=ring_bytes + 2 * q_RKMH.size * q_RKMH.dtype.itemsize,
        transcendentals=R * K * M * S,
    )
    return pl.pallas_call(
        functools.partial(_kernel, slots=S),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct(q_RKMH.shape, q_RKMH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=most,
        interpret=interpret,
        name="ring_attention",
    )(place_2, first_R, count_R, length_R.astype(jnp.int32), q_RKMH, k_LRKSH, v_LRKSH)


def attend_divided(
    mesh: Mesh,
    q_RN1H: jax.Array,
    k_LRKSH: jax.Array,
    v_LRKSH: jax.Array,
    layer: jax.Array,
    time: jax.Array,
    length_R: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attend_in_live_blocks` on each device for its own rows and heads, `[R, N, 1, H]`.

    Args:
      mesh: key/value heads lie along `tensor` where it divides them, rows along all other axes.
    """
    R, N, _, H = q_RN1H.shape
    K = k_LRKSH.shape[2]
    rows = tuple(axis for axis in mesh.axis_names if axis != "tensor")
    heads = "tensor" if K % mesh.shape["tensor"] == 0 else None
    of_queries, of_keys = P(rows, heads), P(None, rows, heads)
    attend = jax.shard_map(
        functools.partial(attend_in_live_blocks, interpret=interpret),
        mesh=mesh,
        in_specs=(of_queries, of_keys, of_keys, P(), P(), P(rows)),
        out_specs=of_queries,
        check_vma=False,
    )
    return attend(q_RN1H.reshape(R, K, N // K, H), k_LRKSH, v_LRKSH, layer, time, length_R).reshape(q_RN1H.shape)
