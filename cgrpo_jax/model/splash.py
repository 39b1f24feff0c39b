"""Attention of long rows on a TPU: jax's splash kernels (Pallas), which hold no `[T, S]` array and skip what is masked.

They know a causal mask by places in the array and segments by equal ids. So they serve what is packed in the order of
its positions (`Seen.ordered`): rows of segments, and queries that follow their own past, which lies in front of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cgrpo_jax.model.attention import SAVED, Seen, after_own, attend

BLOCK = 128  # queries and keys must be multiples of it


def _block(length: int, most: int) -> int:
    """The largest multiple of BLOCK that divides `length` and is at most `most`."""
    return next(size for size in range(min(length, most), 0, -BLOCK) if length % size == 0)


@functools.lru_cache
def _kernel(heads: int, queries: int, keys: int, interpret: bool) -> splash.SplashAttentionKernel:
    """Blocks as measured by compilation at 8,192 tokens: larger backward key blocks write fewer partial dq."""
    forward, backward = _block(keys, 1024), _block(keys, 2048)
    sizes = splash.BlockSizes(
        block_q=_block(queries, 1024),
        block_kv=forward,
        block_kv_compute=_block(forward, 512),
        block_q_dkv=_block(queries, 1024),
        block_kv_dkv=backward,
        block_kv_dkv_compute=_block(backward, 512),
        use_fused_bwd_kernel=True,
    )
    causal = masks.CausalMask((queries, keys), offset=keys - queries)
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            mask=masks.MultiHeadMask([causal] * heads),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            residual_checkpoint_name=SAVED,
            interpret=interpret,
        )


def _serves(q_BNTH: jax.Array, k_BKSH: jax.Array, seen: Seen) -> bool:
    return seen.ordered and not seen.shares and q_BNTH.shape[2] % BLOCK == 0 and k_BKSH.shape[2] % BLOCK == 0


def _here(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, own_BT: jax.Array, key_BS: jax.Array, interpret: bool
) -> jax.Array:
    """On one device, with the segments of queries and keys."""
    N, T, H = q_BNTH.shape[1:]
    kernel = _kernel(N, T, k_BKSH.shape[2], interpret)

    def one(q_NTH: jax.Array, k_KSH: jax.Array, v_KSH: jax.Array, own_T: jax.Array, key_S: jax.Array) -> jax.Array:
        return cast(jax.Array, kernel(q_NTH, k_KSH, v_KSH, segment_ids=splash.SegmentIds(own_T, key_S)))

    scaled_BNTH = q_BNTH * jnp.asarray(H**-0.5, q_BNTH.dtype)
    return jax.vmap(one)(scaled_BNTH, k_BKSH, v_BKSH, own_BT, key_BS)


def attend_own_heads(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen: Seen, interpret: bool = False
) -> jax.Array:
    """As `attend_by_splash`, on one device: for inside of a `jax.shard_map` over all axes of its mesh."""
    if not _serves(q_BNTH, k_BKSH, seen):
        return checkpoint_name(attend(q_BNTH, k_BKSH, v_BKSH, seen), SAVED)
    return _here(q_BNTH, k_BKSH, v_BKSH, seen.segment_BT, seen.key_segment_BS, interpret)


def attend_by_splash(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen: Seen, interpret: bool = False
) -> jax.Array:
    """`attention.attend` for what splash can do, and `attend` itself for the rest. Shapes and result as there.

    For inside of a `jax.shard_map` whose mesh has an axis `tensor` that it leaves to the compiler: a kernel cannot be
    divided by it, so each device is given its heads here.
    """
    if not _serves(q_BNTH, k_BKSH, seen):
        return checkpoint_name(attend(q_BNTH, k_BKSH, v_BKSH, seen), SAVED)

    heads, all_ = P(None, "tensor"), P()
    divided = jax.shard_map(
        functools.partial(_here, interpret=interpret),
        in_specs=(heads, heads, heads, all_, all_),
        out_specs=heads,
        axis_names={"tensor"},
        check_vma=False,
    )
    return divided(q_BNTH, k_BKSH, v_BKSH, seen.segment_BT, seen.key_segment_BS)


def divided(mesh: Mesh, attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Causal attention of rows without segments over a mesh, by what attends to a device's own rows and heads.

    Args:
      mesh: key/value heads lie along `tensor` where it divides them, rows along all other axes.
    """
    rows = tuple(axis for axis in mesh.axis_names if axis != "tensor")

    def local(q: jax.Array, k: jax.Array, v: jax.Array, position_BT: jax.Array, key_BS: jax.Array) -> jax.Array:
        return attend(q, k, v, after_own(position_BT, key_BS))

    def over_mesh(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen: Seen) -> jax.Array:
        own = P(rows, "tensor" if k_BKSH.shape[1] % mesh.shape["tensor"] == 0 else None)
        specs = (own, own, own, P(rows), P(rows))
        on_each = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)
        return on_each(q_BNTH, k_BKSH, v_BKSH, seen.position_BT, seen.key_position_BS)

    return over_mesh
