"""Log-probability and entropy of the trained tokens of a bin, at the sampling temperature.

The head goes over the vocabulary in chunks and has a backward pass of its own:

    z = (x W^T) / temperature,  lse = log sum exp z,  log p = z_y - lse,  H = lse - sum p z
    d log p / dz = 1_y - p,     dH / dz = -p (z - lse + H)

No `[tokens, vocabulary]` array exists. A chunk's part of the head is gathered, used and dropped, and its gradient is
complete at once and goes back in parts at once, so neither a whole head nor a whole gradient of it exists either.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cgrpo_jax.learning.packing import Bins
from cgrpo_jax.model.attention import (
    Extend,
    KVCache,
    Seen,
    after_prompt,
    among_themselves,
    attend,
    attend_to_own,
    follow,
    keep_own,
)
from cgrpo_jax.model.decoder import CLOSED, Attend, ModelConfig, Params, accumulator, run_layers
from cgrpo_jax.model.parts import WHOLE, Parts, scattered

LANES = 128  # a chunk is a multiple of it


@dataclasses.dataclass(frozen=True)
class Head:
    """The static arguments of the head (the projection to the vocabulary) in a compiled program.

    Attributes:
      vocab, used: entries of the head, and those that may be drawn: the others have probability 0.
      entries: of a chunk of logits `[tokens of one device, vocabulary]` at most.
      axis: along which the kernel `[V, D]` is divided, see `Parts`; -1: not at all.
    """

    vocab: int
    used: int
    temperature: float
    dtype: DTypeLike
    entries: int
    axis: int = -1
    parts: Parts = WHOLE

    def chunk(self, tokens: int) -> int:
        """Entries of a chunk: such that its logits stay within `entries`, and chunks are of like size."""
        fits = max(LANES, self.entries // max(1, tokens) // LANES * LANES)
        count = -(-self.vocab // fits)
        return min(self.vocab, -(-self.vocab // (count * LANES)) * LANES)

    def starts(self, chunk: int) -> jax.Array:
        """The first entry of each chunk; the last begins early where the vocabulary is no multiple."""
        return jnp.minimum(jnp.arange(-(-self.vocab // chunk)) * chunk, self.vocab - chunk).astype(jnp.int32)


def _kernel_of(head: Head, kernel_VD: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    part = jax.lax.dynamic_slice_in_dim(kernel_VD, start, chunk, axis=0)
    return head.parts.whole(part, head.axis, head.dtype).astype(head.dtype)


def _chunk_logits(
    head: Head, hidden_ID: jax.Array, kernel_WD: jax.Array, start: jax.Array, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scaled logits `[I, W]` of chunk `number`, and the index of each entry; -1 for what another chunk counts."""
    chunk = kernel_WD.shape[0]
    logits_IW = jnp.matmul(hidden_ID, kernel_WD.T, preferred_element_type=accumulator(head.dtype))
    index_W = start + jnp.arange(chunk, dtype=jnp.int32)
    open_W = (index_W >= number * chunk) & (index_W < head.used)
    return jnp.where(open_W[None], logits_IW / head.temperature, CLOSED), jnp.where(open_W, index_W, -1)


def _forward(
    head: Head, hidden_ID: jax.Array, kernel_VD: jax.Array, target_I: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability, entropy and log-sum-exp `[I]`; a running maximum keeps the sums finite."""
    chunk, real = head.chunk(len(hidden_ID)), accumulator(head.dtype)
    starts_J = head.starts(chunk)

    def step(carry: tuple[jax.Array, ...], of: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        (peak_I, total_I, moment_I, chosen_I), (start, number) = carry, of
        kernel_WD = _kernel_of(head, kernel_VD, start, chunk)
        logits_IW, index_W = _chunk_logits(head, hidden_ID, kernel_WD, start, number)
        new_I = jnp.maximum(peak_I, logits_IW.max(axis=-1))
        weight_IW, shrink_I = jnp.exp(logits_IW - new_I[:, None]), jnp.exp(peak_I - new_I)
        hit_IW = index_W[None] == target_I[:, None]
        total_I = total_I * shrink_I + weight_IW.sum(axis=-1)
        moment_I = moment_I * shrink_I + (weight_IW * logits_IW).sum(axis=-1)
        return (new_I, total_I, moment_I, chosen_I + jnp.where(hit_IW, logits_IW, 0).sum(axis=-1)), None

    zero_I = jnp.zeros(len(hidden_ID), real)
    start: tuple[jax.Array, ...] = (zero_I + CLOSED, zero_I, zero_I, zero_I)
    numbers_J = jnp.arange(len(starts_J), dtype=jnp.int32)
    (peak_I, total_I, moment_I, chosen_I), _ = jax.lax.scan(step, start, (starts_J, numbers_J))
    lse_I = peak_I + jnp.log(total_I)
    return chosen_I - lse_I, lse_I - moment_I / total_I, lse_I


def _backward(
    head: Head, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    hidden_ID, kernel_VD, target_I, entropy_I, lse_I = saved
    d_logp_I, d_entropy_I = cotangents
    chunk, real = head.chunk(len(hidden_ID)), accumulator(head.dtype)
    starts_J = head.starts(chunk)

    def step(carry: tuple[jax.Array, jax.Array], of: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (d_hidden_ID, d_kernel_VD), (start, number) = carry, of
        kernel_WD = _kernel_of(head, kernel_VD, start, chunk)
        logits_IW, index_W = _chunk_logits(head, hidden_ID, kernel_WD, start, number)
        logp_IW = logits_IW - lse_I[:, None]
        hit_IW = index_W[None] == target_I[:, None]
        falls_IW = d_logp_I[:, None] + d_entropy_I[:, None] * (logp_IW + entropy_I[:, None])
        d_IW = jnp.where(hit_IW, d_logp_I[:, None], 0) - jnp.exp(logp_IW) * falls_IW
        d_IW = (d_IW / head.temperature).astype(head.dtype)
        d_kernel_WD = scattered(jnp.matmul(d_IW.T, hidden_ID), head.axis).astype(d_kernel_VD.dtype)
        d_hidden_ID += jnp.matmul(d_IW, kernel_WD, preferred_element_type=real)
        before_WD = jax.lax.dynamic_slice_in_dim(d_kernel_VD, start, chunk, axis=0)
        return (d_hidden_ID, jax.lax.dynamic_update_slice_in_dim(d_kernel_VD, before_WD + d_kernel_WD, start, 0)), None

    zeros = jnp.zeros(hidden_ID.shape, real), jnp.zeros_like(kernel_VD)
    numbers_J = jnp.arange(len(starts_J), dtype=jnp.int32)
    (d_hidden_ID, d_kernel_VD), _ = jax.lax.scan(step, zeros, (starts_J, numbers_J))
    return d_hidden_ID.astype(hidden_ID.dtype), d_kernel_VD, None


def make_head(head: Head) -> Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(hidden `[I, D]`, kernel `[V, D]` or its part, targets `[I]`) -> log-probabilities and entropies (nats) `[I]`."""

    @jax.custom_vjp
    def logps(hidden_ID: jax.Array, kernel_VD: jax.Array, target_I: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _forward(head, hidden_ID, kernel_VD, target_I)[:2]

    def forward(hidden_ID: jax.Array, kernel_VD: jax.Array, target_I: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        logp_I, entropy_I, lse_I = _forward(head, hidden_ID, kernel_VD, target_I)
        return (logp_I, entropy_I), (hidden_ID, kernel_VD, target_I, entropy_I, lse_I)

    def backward(saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]) -> Any:
        return _backward(head, saved, cotangents)

    logps.defvjp(forward, backward)
    return logps


@dataclasses.dataclass(frozen=True)
class Pass:
    """The static arguments of the trained model's forward pass over a bin."""

    model: ModelConfig
    dtype: DTypeLike
    remat: str  # a key of decoder.REMAT, or none
    temperature: float
    logit_entries: int = 1 << 24  # of a chunk of logits, see `Head`
    attend: Attend = attend
    parts: Parts = WHOLE


def hidden_states(static: Pass, params: Params, one: Bins) -> jax.Array:
    """Final hidden states `[B, T, D]` of one bin (arrays without their leading [A])."""
    if one.prompt_AQS is None or one.prompt_length_AQ is None:
        seen = among_themselves(one.segment_ABT, one.position_ABT)
        past: KVCache | None = None
        extend: Extend = attend_to_own
    else:
        past, seen = _after_prompts(static, params, one.prompt_AQS, one.prompt_length_AQ, one)
        extend = follow
    return _layers(static)(params, one.token_ABT, one.position_ABT, seen, past, extend)[0]


def _layers(static: Pass) -> Callable[..., tuple[jax.Array, KVCache]]:
    """`run_layers` of this pass: (parameters, tokens, positions, what is seen, past, extend)."""
    return functools.partial(
        run_layers, static.model, dtype=static.dtype, remat=static.remat, attend=static.attend, parts=static.parts
    )


def _after_prompts(
    static: Pass, params: Params, prompt_QS: jax.Array, length_Q: jax.Array, one: Bins
) -> tuple[KVCache, Seen]:
    """Keys and values of each row's shared prompt, which is run once for all its rows, and what the rows attend to."""
    (Q, S), B = prompt_QS.shape, len(one.token_ABT)
    slot_QS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (Q, S))
    among = among_themselves((slot_QS < length_Q[:, None]).astype(jnp.int32), slot_QS)
    _, cache = _layers(static)(params, prompt_QS, slot_QS, among, None, keep_own)
    past = KVCache(*(jnp.repeat(x_LQKSH, B // Q, axis=1) for x_LQKSH in cache))
    return past, after_prompt(one.segment_ABT, one.position_ABT, jnp.repeat(length_Q, B // Q), S)


def head_of(static: Pass) -> tuple[Head, tuple[str, str]]:
    """The static arguments of the head of a pass, and the path of its kernel among the parameters."""
    model = static.model
    where = ("embed", "embedding") if model.tie_embeddings else ("head", "kernel")
    used = model.vocab if model.vocab_used is None else model.vocab_used
    axis = static.parts.axis(*where)
    return Head(model.vocab, used, static.temperature, static.dtype, static.logit_entries, axis, static.parts), where


def token_logps(static: Pass, params: Params, one: Bins) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy (nats) of each target of one bin, `[B, T]`; what stands at padding means nothing."""
    hidden_BTD = hidden_states(static, params, one)
    head, (module, name) = head_of(static)
    flat_ID = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    logp_I, entropy_I = make_head(head)(flat_ID, params[module][name], one.target_ABT.reshape(-1))
    return logp_I.reshape(one.target_ABT.shape), entropy_I.reshape(one.target_ABT.shape)
