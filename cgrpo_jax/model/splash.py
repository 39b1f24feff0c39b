"""Attention of long rows on a TPU: jax's splash kernels (Pallas), which hold no `[T, S]` array and skip what is masked.

They know a causal mask by places in the array and segments by equal ids. So they serve what is packed in the order of
its positions (`Seen.ordered`): rows of segments, and queries that follow their own past, which lies in front of them.
"""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from cgrpo_jax.model.attention import SAVED, Seen, attend

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


def attend_by_splash(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen: Seen, interpret: bool = False
) -> jax.Array:
    """`attention.attend` for what splash can do, and `attend` itself for the rest. Shapes and result as there.

    For inside of a `jax.shard_map` whose mesh has an axis `tensor` that it leaves to the compiler: a kernel cannot be
    divided by it, so each device is given its heads here.
    """
    T, H = q_BNTH.shape[2:]
    S = k_BKSH.shape[2]
    if not seen.ordered or seen.shares or T % BLOCK or S % BLOCK:
        return checkpoint_name(attend(q_BNTH, k_BKSH, v_BKSH, seen), SAVED)

    def on_own_heads(q: jax.Array, k: jax.Array, v: jax.Array, own_BT: jax.Array, key_BS: jax.Array) -> jax.Array:
        kernel = _kernel(q.shape[1], T, S, interpret)

        def one(q_NTH: jax.Array, k_KSH: jax.Array, v_KSH: jax.Array, own_T: jax.Array, key_S: jax.Array) -> jax.Array:
            return cast(jax.Array, kernel(q_NTH, k_KSH, v_KSH, segment_ids=splash.SegmentIds(own_T, key_S)))

        return jax.vmap(one)(q, k, v, own_BT, key_BS)

    heads, all_ = P(None, "tensor"), P()
    divided = jax.shard_map(
        on_own_heads,
        in_specs=(heads, heads, heads, all_, all_),
        out_specs=heads,
        axis_names={"tensor"},
        check_vma=False,
    )
    scaled_BNTH = q_BNTH * jnp.asarray(H**-0.5, q_BNTH.dtype)
    return divided(scaled_BNTH, k_BKSH, v_BKSH, seen.segment_BT, seen.key_segment_BS)
