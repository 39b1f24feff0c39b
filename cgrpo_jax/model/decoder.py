"""One decoder-only transformer for Llama 2/3.x, Qwen2/2.5 and Qwen3 (dense). A family is a record.

Letters, the same everywhere in this project:

    B rows      T tokens (queries)   S cache slots (keys)   L layers    D width   F mlp width   V vocabulary
    N query heads   K key/value heads   R query heads per key/value head   H head dim
    P problems  G rows of one problem

Flax Linen, not NNX: parameters stay one plain nested dict whose paths are the interface for sharding, Hugging Face
names and weight-decay masks, and one pure function serves policy, reference and sampler with whatever parameters it is
handed. Linen modules describe a single layer; the loop over layers is written here, so the same weights run stacked
`[L, ...]` under `lax.scan` (compile time flat in depth) or unstacked, as a tuple of layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Params = dict[str, Any]
MASKED = -1e30
FEW_ROWS, FEW_QUERIES = 64, 8  # see `product`, `attention_logits`
# "dots" keeps the outputs of the weight products and recomputes attention and elementwise work: less memory traffic
# makes it faster than keeping everything. "full" keeps the input of each layer only.
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """The `llama3` rope scaling of Llama 3.1 and later (frequencies interpolated below `low_freq_factor`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Letters as in the module docstring."""

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
    rope_scaling: Llama3Rope | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of one layer, or of all layers with a leading [L] axis."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array

    def extended(self, k_BKTH: jax.Array, v_BKTH: jax.Array, slot: Any) -> tuple[jax.Array, jax.Array, KVCache]:
        """With new tokens at `slot`, ...: the keys and values to attend to, and the cache after it."""
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=2)
        cache = KVCache(put(self.k_BKSH, k_BKTH), put(self.v_BKSH, v_BKTH))
        return *cache, cache


class LayerOf(NamedTuple):
    """One layer of a stacked cache that a loop over layers carries along and writes where it lies."""

    stacked: KVCache
    layer: jax.Array

    def extended(self, k_BKTH: jax.Array, v_BKTH: jax.Array, slot: Any) -> tuple[jax.Array, jax.Array, LayerOf]:
        place = tuple(jnp.int32(index) for index in (self.layer, 0, 0, slot, 0))
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new[None], place)
        cache = KVCache(put(self.stacked.k_BKSH, k_BKTH), put(self.stacked.v_BKSH, v_BKTH))
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False)
        return pick(cache.k_BKSH), pick(cache.v_BKSH), LayerOf(cache, self.layer)


def init_cache(cfg: ModelConfig, rows: int, slots: int, dtype: DTypeLike) -> KVCache:
    """An empty cache of all layers, stacked."""
    shape = (cfg.layers, rows, cfg.kv_heads, slots, cfg.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def rope_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Angular frequencies `[H/2]`, radians per position; rounded as the reference rounds them, in float32."""
    exponent = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    freq = np.float32(1.0) / np.float32(cfg.rope_theta) ** exponent
    if (scaling := cfg.rope_scaling) is None:
        return freq
    turns = scaling.original_max_positions * freq / np.float32(2 * np.pi)  # full turns within the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (freq * (smooth + (1.0 - smooth) / scaling.factor)).astype(np.float32)


def rope_angles(cfg: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each `[B, T, 1, H/2]` in float32."""
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * rope_frequencies(cfg)[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split convention of Hugging Face."""
    first, second = jnp.split(x_BTNH.astype(cos.dtype), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x_BTNH.dtype)


def product(x_BD: jax.Array, kernel_FD: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """x W^T `[B, F]`.

    XLA's CPU backend packs the right operand anew at each call. With few rows packing the weights costs more than the
    product, so there they stand on the left; the barrier keeps the compiler from turning it round again.
    """
    straight = lambda x, kernel: jnp.matmul(x, kernel.T, preferred_element_type=out_dtype)
    turned = lambda x, kernel: jax.lax.optimization_barrier(jnp.matmul(kernel, x.T, preferred_element_type=out_dtype)).T
    if x_BD.shape[0] > FEW_ROWS:
        return straight(x_BD, kernel_FD)
    return jax.lax.platform_dependent(x_BD, kernel_FD, cpu=turned, default=straight)


def attention_logits(q_BKQH: jax.Array, k_BKSH: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """q k^T `[B, K, Q, S]`; with few queries the keys stand on the left, for the reason given in `product`."""
    straight = lambda q, k: jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=out_dtype)
    turned = lambda q, k: jax.lax.optimization_barrier(
        jnp.einsum("BKSH,BKQH->BKSQ", k, q, preferred_element_type=out_dtype)
    ).swapaxes(2, 3)
    if q_BKQH.shape[2] > FEW_QUERIES:
        return straight(q_BKQH, k_BKSH)
    return jax.lax.platform_dependent(q_BKQH, k_BKSH, cpu=turned, default=straight)


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
    """Grouped-query attention with rotary positions; the R query heads of a key head are run as extra queries."""

    cfg: ModelConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD, rope, mask_BTS, cache: KVCache | LayerOf | None, slot):
        cfg = self.cfg
        B, T, D = x_BTD.shape
        N, K, H = cfg.heads, cfg.kv_heads, cfg.head_dim

        def project(name: str, heads: int) -> jax.Array:
            return Linear(heads * H, self.dtype, cfg.qkv_bias, name=name)(x_BTD).reshape(B, T, heads, H)

        q_BTNH, k_BTKH, v_BTKH = project("q", N), project("k", K), project("v", K)
        if cfg.qk_norm:
            q_BTNH = nn.RMSNorm(cfg.norm_eps, dtype=self.dtype, name="q_norm")(q_BTNH)
            k_BTKH = nn.RMSNorm(cfg.norm_eps, dtype=self.dtype, name="k_norm")(k_BTKH)
        q_BNTH = rotate(q_BTNH, *rope).swapaxes(1, 2)
        k_BKSH, v_BKSH = rotate(k_BTKH, *rope).swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        if cache is not None:
            k_BKSH, v_BKSH, cache = cache.extended(k_BKSH, v_BKSH, slot)
        q_BKQH = q_BNTH.reshape(B, K, -1, H)  # Q = R T
        logits_BKQS = attention_logits(q_BKQH, k_BKSH, accumulator(self.dtype))
        logits_BKRTS = logits_BKQS.reshape(B, K, N // K, T, -1) * H**-0.5
        weight_BKRTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], logits_BKRTS, MASKED), axis=-1)
        weight_BKQS = weight_BKRTS.reshape(logits_BKQS.shape).astype(self.dtype)
        out_BNTH = jnp.einsum("BKQS,BKSH->BKQH", weight_BKQS, v_BKSH).reshape(B, N, T, H)
        return Linear(D, self.dtype, name="o")(out_BNTH.swapaxes(1, 2).reshape(B, T, N * H)), cache


class Mlp(nn.Module):
    cfg: ModelConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD):
        gate_BTF = Linear(self.cfg.mlp_width, self.dtype, name="gate")(x_BTD)
        up_BTF = Linear(self.cfg.mlp_width, self.dtype, name="up")(x_BTD)
        return Linear(self.cfg.width, self.dtype, name="down")(jax.nn.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    cfg: ModelConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD, rope, mask_BTS, cache: KVCache | LayerOf | None, slot):
        norm = lambda name: nn.RMSNorm(self.cfg.norm_eps, dtype=self.dtype, name=name)
        attention = Attention(self.cfg, self.dtype, name="attn")
        out_BTD, cache = attention(norm("attn_norm")(x_BTD), rope, mask_BTS, cache, slot)
        x_BTD = x_BTD + out_BTD
        return x_BTD + Mlp(self.cfg, self.dtype, name="mlp")(norm("mlp_norm")(x_BTD)), cache


INIT = nn.initializers.normal(0.02)


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """The dtype of softmax and log-probabilities: float32, or float64 where the model computes in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters; layers stacked `[L, ...]`. Embedding and head get different keys."""
    embed_key, head_key, layer_key = jax.random.split(key, 3)
    x_BTD, positions_BT = jnp.zeros((1, 1, cfg.width)), jnp.zeros((1, 1), jnp.int32)
    args = (x_BTD, rope_angles(cfg, positions_BT), jnp.ones((1, 1, 1), bool), None, 0)
    init_layer = lambda key: Block(cfg, jnp.float32).init(key, *args)["params"]
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
    pick = lambda layer: jax.tree.map(lambda leaf: leaf[layer], tree)
    return tuple(pick(layer) for layer in range(jax.tree.leaves(tree)[0].shape[0]))


def attention_mask(start_B: jax.Array, query_slot_T: jax.Array, slots: int) -> jax.Array:
    """`[B, T, S]`: a query sees the slots from the row's first token (`start_B`) up to its own slot."""
    slot_S = jnp.arange(slots)
    causal_TS = slot_S[None, :] <= query_slot_T[:, None]
    return causal_TS[None] & (slot_S[None, None, :] >= start_B[:, None, None])


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    cache: Any = None,
    slot: jax.Array | int = 0,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
) -> tuple[jax.Array, Any]:
    """Final hidden states of the decoder, before the head, for rows whose tokens lie one after another in their slots.

    Args:
      tokens_BT: int32 ids. Token t of a row sits in slot `slot + t`.
      start_B: int32, the slot of each row's first real token (0 unless left-padded); its position is 0 there.
        What stands before it is never seen. Right padding needs no mark: no earlier token sees it.
      cache, slot, dtype, remat: as in `run_layers`.

    Returns:
      hidden_BTD in `dtype`, and the new cache in the form of the old (None without one).
    """
    query_slot_T = slot + jnp.arange(tokens_BT.shape[1])
    slots = tokens_BT.shape[1] if cache is None else jax.tree.leaves(cache)[0].shape[-2]
    mask_BTS = attention_mask(start_B, query_slot_T, slots)
    positions_BT = jnp.maximum(query_slot_T[None] - start_B[:, None], 0)
    return run_layers(cfg, params, tokens_BT, positions_BT, mask_BTS, cache, slot, dtype=dtype, remat=remat)


def run_layers(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    mask_BTS: jax.Array,
    cache: Any = None,
    slot: jax.Array | int = 0,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    in_place: bool = False,
) -> tuple[jax.Array, Any]:
    """Final hidden states of the decoder, before the head.

    Layers run under `lax.scan` where parameters (and cache) are stacked, unrolled where they are tuples (`unstack`).

    Args:
      tokens_BT, positions_BT: int32 ids and their positions (of RoPE).
      mask_BTS: which slots each token sees, its own among them.
      cache: what earlier tokens left; the tokens are written at `slot`, `slot + 1`, ...
      dtype: of the computation.
      remat: what the backward pass computes again, a key of REMAT.
      in_place: a scan writes into the stacked cache it carries, where a backward pass would keep it for each layer.
    """
    rope = rope_angles(cfg, positions_BT)

    def block(x_BTD: jax.Array, layer: Any) -> Any:  # layer: its parameters and its cache (or None)
        return Block(cfg, dtype).apply({"params": layer[0]}, x_BTD, rope, mask_BTS, layer[1], slot)

    if remat != "none":
        block = jax.checkpoint(block, policy=REMAT[remat])
    x_BTD = params["embed"]["embedding"][tokens_BT].astype(dtype)
    if isinstance(params["layers"], tuple):
        written = []
        for index, layer in enumerate(params["layers"]):
            x_BTD, layer_cache = block(x_BTD, (layer, None if cache is None else cache[index]))
            written.append(layer_cache)
        cache = None if cache is None else tuple(written)
    elif in_place:

        def step(carry: tuple[jax.Array, Any], layer: Any) -> Any:
            x_BTD, of = block(carry[0], (layer[0], LayerOf(carry[1], layer[1])))
            return (x_BTD, of.stacked), None

        (x_BTD, cache), _ = jax.lax.scan(step, (x_BTD, cache), (params["layers"], jnp.arange(cfg.layers)))
    else:
        x_BTD, cache = jax.lax.scan(block, x_BTD, (params["layers"], cache))
    norm = nn.RMSNorm(cfg.norm_eps, dtype=dtype)
    return cast(jax.Array, norm.apply({"params": params["norm"]}, x_BTD)), cache


def logits(cfg: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits `[..., V]` of hidden states `[..., D]`, accumulated in float32 (float64 for a float64 model)."""
    kernel_VD = params["embed"]["embedding"] if cfg.tie_embeddings else params["head"]["kernel"]
    flat = hidden.reshape(-1, cfg.width)
    out = product(flat, kernel_VD.astype(flat.dtype), accumulator(flat.dtype))
    return out.reshape(*hidden.shape[:-1], cfg.vocab)
