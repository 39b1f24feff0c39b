"""One decoder-only transformer for Llama 2/3.x, Qwen2/2.5 and Qwen3 (dense). A family is a record.

Flax Linen, not NNX: parameters stay one plain nested dict whose paths are the interface for sharding, Hugging Face
names and weight-decay masks, and one pure function serves policy, reference and sampler with whatever parameters it is
handed. Linen modules describe a single layer; the loop over layers is written here, so the same weights run stacked
`[L, ...]` under `lax.scan` (compile time flat in depth) or unstacked, as a tuple of layers.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from cgrpo_jax.model.attention import SAVED, Extend, InRing, KVCache, Seen, among_themselves, attend, attend_to_own
from cgrpo_jax.model.parts import WHOLE, Parts
from cgrpo_jax.model.rope import RopeScaling, rope_angles

Params = dict[str, Any]
FEW_ROWS = 64  # see `product`
CLOSED = -1e30  # logit of an id that is never drawn: finite, so that no entropy or gradient becomes 0 x infinity
# What the backward pass finds saved. "dots": the outputs of the weight products; attention and elementwise work are
# computed again, and less memory traffic makes it faster than keeping everything. "full": the input of each layer only.
# "attention": that, and the output of attention, whose kernel then runs forward once. "wide": also the products whose
# recomputation takes longest.
WIDE = ("q", "k", "v", "middle", "gate", "up")
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "wide": jax.checkpoint_policies.save_only_these_names(SAVED, *WIDE),
}
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]  # as `attention.attend`


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Letters as in `records`."""

    family: str
    vocab: int  # V
    width: int  # D
    mlp_width: int  # F
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    rope_theta: float
    max_positions: int
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    vocab_used: int | None = None  # ids that the tokenizer has, from 0 on; `logits` closes those beyond. None: all


def init_cache(cfg: ModelConfig, rows: int, slots: int, dtype: DTypeLike) -> KVCache:
    """An empty cache of all layers, stacked."""
    shape = (cfg.layers, rows, cfg.kv_heads, slots, cfg.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def _angles(cfg: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of RoPE, each `[B, T, 1, H/2]` in float32."""
    return rope_angles(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling, positions_BT)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split convention of Hugging Face."""
    first, second = jnp.split(x_BTNH.astype(accumulator(x_BTNH.dtype)), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x_BTNH.dtype)


def product(x_BD: jax.Array, kernel_FD: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """x W^T `[B, F]`.

    XLA's CPU backend packs the right operand anew at each call. With few rows packing the weights costs more than the
    product, so there they stand on the left; the barrier keeps the compiler from turning it round again.
    """

    def straight(x_BD: jax.Array, kernel_FD: jax.Array) -> jax.Array:
        return jnp.matmul(x_BD, kernel_FD.T, preferred_element_type=out_dtype)

    def weights_left(x_BD: jax.Array, kernel_FD: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(jnp.matmul(kernel_FD, x_BD.T, preferred_element_type=out_dtype)).T

    if x_BD.shape[0] > FEW_ROWS:
        return straight(x_BD, kernel_FD)
    return jax.lax.platform_dependent(x_BD, kernel_FD, cpu=weights_left, default=straight)


class Linear(nn.Module):
    """x W^T + b over the last axis, with the weight `[out, in]` of Hugging Face.

    The leading axes are merged first: XLA's CPU backend runs gradients of two-dimensional products 1.4 times as fast.
    """

    features: int
    dtype: DTypeLike
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", INIT, (self.features, x.shape[-1])).astype(self.dtype)
        out = product(x.reshape(-1, x.shape[-1]), kernel)
        if self.use_bias:
            out += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)[None]
        return out.reshape(*x.shape[:-1], self.features)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    cfg: ModelConfig
    dtype: DTypeLike
    attend: Attend

    @nn.compact
    def __call__(self, x_BTD, rope, seen: Seen | InRing, past: Any, extend: Extend):
        cfg = self.cfg
        B, T, D = x_BTD.shape
        N, K, H = cfg.heads, cfg.kv_heads, cfg.head_dim

        def project(name: str, heads: int) -> jax.Array:
            out = Linear(heads * H, self.dtype, cfg.qkv_bias, name=name)(x_BTD)
            return checkpoint_name(out, name).reshape(B, T, heads, H)

        q_BTNH, k_BTKH, v_BTKH = project("q", N), project("k", K), project("v", K)
        if cfg.qk_norm:
            q_BTNH = nn.RMSNorm(cfg.norm_eps, dtype=self.dtype, name="q_norm")(q_BTNH)
            k_BTKH = nn.RMSNorm(cfg.norm_eps, dtype=self.dtype, name="k_norm")(k_BTKH)
        q_BNTH, k_BKTH = rotate(q_BTNH, *rope).swapaxes(1, 2), rotate(k_BTKH, *rope).swapaxes(1, 2)
        k_BKSH, v_BKSH, left = extend(past, k_BKTH, v_BTKH.swapaxes(1, 2))
        out_BNTH = self.attend(q_BNTH, k_BKSH, v_BKSH, seen)
        return Linear(D, self.dtype, name="o")(out_BNTH.swapaxes(1, 2).reshape(B, T, N * H)), left


class Mlp(nn.Module):
    """The gated MLP. Its barriers keep XLA for TPU from computing a cotangent in both products that use it."""

    cfg: ModelConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD):
        gate_BTF = checkpoint_name(Linear(self.cfg.mlp_width, self.dtype, name="gate")(x_BTD), "gate")
        up_BTF = checkpoint_name(Linear(self.cfg.mlp_width, self.dtype, name="up")(x_BTD), "up")
        gate_BTF, up_BTF = jax.lax.optimization_barrier((gate_BTF, up_BTF))
        active_BTF = jax.lax.optimization_barrier(jax.nn.silu(gate_BTF) * up_BTF)
        return Linear(self.cfg.width, self.dtype, name="down")(active_BTF)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    cfg: ModelConfig
    dtype: DTypeLike
    attend: Attend = attend

    @nn.compact
    def __call__(self, x_BTD, rope, seen: Seen | InRing, past: Any, extend: Extend):
        norm = functools.partial(nn.RMSNorm, self.cfg.norm_eps, dtype=self.dtype)
        attention = Attention(self.cfg, self.dtype, self.attend, name="attn")
        out_BTD, left = attention(norm(name="attn_norm")(x_BTD), rope, seen, past, extend)
        x_BTD = checkpoint_name(x_BTD + out_BTD, "middle")
        return x_BTD + Mlp(self.cfg, self.dtype, name="mlp")(norm(name="mlp_norm")(x_BTD)), left


INIT = nn.initializers.normal(0.02)


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """The dtype of softmax and log-probabilities: float32, or float64 where the model computes in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Random float32 parameters, layers stacked `[L, ...]`. Embedding and head are drawn from different keys."""
    embed_key, head_key, layer_key = jax.random.split(key, 3)
    x_BTD, positions_BT = jnp.zeros((1, 1, cfg.width)), jnp.zeros((1, 1), jnp.int32)
    seen = among_themselves(positions_BT, positions_BT)

    def init_layer(key: jax.Array) -> Params:
        block = Block(cfg, jnp.float32)
        return block.init(key, x_BTD, _angles(cfg, positions_BT), seen, None, attend_to_own)["params"]

    params = {
        "embed": {"embedding": INIT(embed_key, (cfg.vocab, cfg.width))},
        "layers": jax.vmap(init_layer)(jax.random.split(layer_key, cfg.layers)),
        "norm": {"scale": jnp.ones(cfg.width)},
    }
    if not cfg.tie_embeddings:
        params["head"] = {"kernel": INIT(head_key, (cfg.vocab, cfg.width))}
    return params


def unstack(tree: Any) -> tuple[Any, ...]:
    """A stacked tree (layers of the parameters, or a cache) as a tuple with one tree a layer."""
    count = jax.tree.leaves(tree)[0].shape[0]
    return tuple(jax.tree.map(operator.itemgetter(index), tree) for index in range(count))


# One layer: (x, its parameters, what it left before) -> (x, what it leaves). A loop runs all of them.
Layer = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]
Loop = Callable[[Layer, jax.Array, Any, Any], tuple[jax.Array, Any]]


def scanned(layer: Layer, x_BTD: jax.Array, layers: Any, past: Any) -> tuple[jax.Array, Any]:
    """Scans over stacked parameters and cache, so that compile time does not grow with depth."""
    return jax.lax.scan(lambda x_BTD, of: layer(x_BTD, *of), x_BTD, (layers, past))


def unrolled(layer: Layer, x_BTD: jax.Array, layers: Any, past: Any) -> tuple[jax.Array, Any]:
    """Runs layer after layer, unrolled, over tuples of parameters and caches (`unstack`)."""
    left = []
    for params, own_past in zip(layers, past, strict=True):
        x_BTD, own = layer(x_BTD, params, own_past)
        left.append(own)
    return x_BTD, tuple(left)


def looped(layer: Layer, x_BTD: jax.Array, layers: Any, past: Any) -> tuple[jax.Array, Any]:
    """Parameters as a tuple of layers, each copied out when its turn comes: compiles as soon as `scanned`.

    The cache is stacked.
    """

    def step(x_BTD: jax.Array, of: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        index, own_past = of
        own = jax.lax.switch(index, [functools.partial(jax.tree.map, lambda x: x, params) for params in layers])
        return layer(x_BTD, own, own_past)

    return jax.lax.scan(step, x_BTD, (jnp.arange(len(layers), dtype=jnp.int32), past))


def unrolled_in_place(layer: Layer, x_BTD: jax.Array, layers: Any, past: Any) -> tuple[jax.Array, Any]:
    """Parameters as a tuple of layers; the stacked cache is handed on and written where it lies."""
    for index, params in enumerate(layers):
        x_BTD, past = layer(x_BTD, params, (past, jnp.int32(index)))
    return x_BTD, past


def scanned_in_place(layer: Layer, x_BTD: jax.Array, layers: Any, past: Any) -> tuple[jax.Array, Any]:
    """Stacked parameters; the stacked cache is carried and written where it lies. Has no backward pass to speak of."""

    def step(carry: tuple[jax.Array, Any], of: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
        (x_BTD, cache), (params, index) = carry, of
        return layer(x_BTD, params, (cache, index)), None

    count = jax.tree.leaves(layers)[0].shape[0]
    carry, _ = jax.lax.scan(step, (x_BTD, past), (layers, jnp.arange(count, dtype=jnp.int32)))
    return carry


def run_layers(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    seen: Seen | InRing,
    past: Any = None,
    extend: Extend = attend_to_own,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    loop: Loop = scanned,
    attend: Attend = attend,
    parts: Parts = WHOLE,
) -> tuple[jax.Array, Any]:
    """Final hidden states of the decoder, before the head, `[B, T, D]` in `dtype`, and what all layers leave.

    Args:
      tokens_BT, positions_BT: int32 ids and their positions (of RoPE).
      seen: which keys each token sees.
      past, extend: what earlier tokens left in each layer, and how its keys and values join the new ones.
      remat: what the backward pass computes again, a key of REMAT.
      attend: computes attention, as `attention.attend` does.
      parts: how the parameters are divided, inside `jax.shard_map`.
      loop: `scanned`, `unrolled`, or one of those in place; parameters, past and `extend` must be in its form.
    """
    rope = _angles(cfg, positions_BT)

    def layer(x_BTD: jax.Array, layer_params: Any, layer_past: Any) -> tuple[jax.Array, Any]:
        whole = {"params": parts.layer(layer_params, dtype)}
        return Block(cfg, dtype, attend).apply(whole, x_BTD, rope, seen, layer_past, extend)  # type: ignore[return-value]

    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[remat])
    x_BTD = parts.embedded(params["embed"]["embedding"], tokens_BT, dtype)
    x_BTD, left = loop(layer, x_BTD, params["layers"], past)
    norm = nn.RMSNorm(cfg.norm_eps, dtype=dtype)
    return cast(jax.Array, norm.apply({"params": params["norm"]}, x_BTD)), left


def logits(cfg: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits `[..., V]` of hidden states `[..., D]`, accumulated in float32 (float64 for a float64 model).

    Ids from `vocab_used` on have the logit CLOSED, for sampler and trainer alike: their probability is 0.
    """
    kernel_VD = params["embed"]["embedding"] if cfg.tie_embeddings else params["head"]["kernel"]
    flat = hidden.reshape(-1, cfg.width)
    out = product(flat, kernel_VD.astype(flat.dtype), accumulator(flat.dtype))
    if cfg.vocab_used is not None and cfg.vocab_used < cfg.vocab:
        out = jnp.where((jnp.arange(cfg.vocab) < cfg.vocab_used)[None], out, CLOSED)
    return out.reshape(*hidden.shape[:-1], cfg.vocab)
