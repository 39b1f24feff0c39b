"""Log-probability and entropy of targets over the vocabulary, in chunks of it, with a backward pass of its own.

    z = (x W^T) / temperature,  lse = log sum exp z,  log p = z_y - lse,  H = lse - sum p z
    d log p / dz = 1_y - p,     dH / dz = -p (z - lse + H)

No `[tokens, vocabulary]` array exists. A chunk's part of the head is gathered, used and dropped, and its gradient is
complete at once and goes back in parts at once, so neither a whole head nor a whole gradient of it exists either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cgrpo_jax.model.decoder import CLOSED, accumulator
from cgrpo_jax.model.parts import WHOLE, Parts, scattered

LANES = 128  # a chunk is a multiple of it


@dataclasses.dataclass(frozen=True)
class Head:
    """What is static in the head of a program.

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
    head: Head, hidden_ND: jax.Array, kernel_CD: jax.Array, start: jax.Array, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scaled logits `[N, C]` of chunk `number`, and the index of each entry; -1 for what another chunk counts."""
    chunk = kernel_CD.shape[0]
    logits_NC = jnp.matmul(hidden_ND, kernel_CD.T, preferred_element_type=accumulator(head.dtype))
    index_C = start + jnp.arange(chunk, dtype=jnp.int32)
    open_C = (index_C >= number * chunk) & (index_C < head.used)
    return jnp.where(open_C[None], logits_NC / head.temperature, CLOSED), jnp.where(open_C, index_C, -1)


def _forward(
    head: Head, hidden_ND: jax.Array, kernel_VD: jax.Array, target_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability, entropy and log-sum-exp `[N]`; a running maximum keeps the sums finite."""
    chunk, real = head.chunk(len(hidden_ND)), accumulator(head.dtype)
    starts_X = head.starts(chunk)

    def step(carry: tuple[jax.Array, ...], of: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        (peak_N, total_N, moment_N, chosen_N), (start, number) = carry, of
        kernel_CD = _kernel_of(head, kernel_VD, start, chunk)
        logits_NC, index_C = _chunk_logits(head, hidden_ND, kernel_CD, start, number)
        new_N = jnp.maximum(peak_N, logits_NC.max(axis=-1))
        weight_NC, shrink_N = jnp.exp(logits_NC - new_N[:, None]), jnp.exp(peak_N - new_N)
        hit_NC = index_C[None] == target_N[:, None]
        total_N = total_N * shrink_N + weight_NC.sum(axis=-1)
        moment_N = moment_N * shrink_N + (weight_NC * logits_NC).sum(axis=-1)
        return (new_N, total_N, moment_N, chosen_N + jnp.where(hit_NC, logits_NC, 0).sum(axis=-1)), None

    zero_N = jnp.zeros(len(hidden_ND), real)
    start: tuple[jax.Array, ...] = (zero_N + CLOSED, zero_N, zero_N, zero_N)
    numbers_X = jnp.arange(len(starts_X), dtype=jnp.int32)
    (peak_N, total_N, moment_N, chosen_N), _ = jax.lax.scan(step, start, (starts_X, numbers_X))
    lse_N = peak_N + jnp.log(total_N)
    return chosen_N - lse_N, lse_N - moment_N / total_N, lse_N


def _backward(
    head: Head, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    hidden_ND, kernel_VD, target_N, entropy_N, lse_N = saved
    d_logp_N, d_entropy_N = cotangents
    chunk, real = head.chunk(len(hidden_ND)), accumulator(head.dtype)
    starts_X = head.starts(chunk)

    def step(carry: tuple[jax.Array, jax.Array], of: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (d_hidden_ND, d_kernel_VD), (start, number) = carry, of
        kernel_CD = _kernel_of(head, kernel_VD, start, chunk)
        logits_NC, index_C = _chunk_logits(head, hidden_ND, kernel_CD, start, number)
        logp_NC = logits_NC - lse_N[:, None]
        hit_NC = index_C[None] == target_N[:, None]
        falls_NC = d_logp_N[:, None] + d_entropy_N[:, None] * (logp_NC + entropy_N[:, None])
        d_NC = jnp.where(hit_NC, d_logp_N[:, None], 0) - jnp.exp(logp_NC) * falls_NC
        d_NC = (d_NC / head.temperature).astype(head.dtype)
        d_kernel_CD = scattered(jnp.matmul(d_NC.T, hidden_ND), head.axis).astype(d_kernel_VD.dtype)
        d_hidden_ND += jnp.matmul(d_NC, kernel_CD, preferred_element_type=real)
        before_CD = jax.lax.dynamic_slice_in_dim(d_kernel_VD, start, chunk, axis=0)
        return (d_hidden_ND, jax.lax.dynamic_update_slice_in_dim(d_kernel_VD, before_CD + d_kernel_CD, start, 0)), None

    zeros = jnp.zeros(hidden_ND.shape, real), jnp.zeros_like(kernel_VD)
    numbers_X = jnp.arange(len(starts_X), dtype=jnp.int32)
    (d_hidden_ND, d_kernel_VD), _ = jax.lax.scan(step, zeros, (starts_X, numbers_X))
    return d_hidden_ND.astype(hidden_ND.dtype), d_kernel_VD, None


def make_head(head: Head) -> Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(hidden `[N, D]`, kernel `[V, D]` or its part, targets `[N]`) -> log-probabilities and entropies (nats) `[N]`."""

    @jax.custom_vjp
    def logps(hidden_ND: jax.Array, kernel_VD: jax.Array, target_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _forward(head, hidden_ND, kernel_VD, target_N)[:2]

    def forward(hidden_ND: jax.Array, kernel_VD: jax.Array, target_N: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        logp_N, entropy_N, lse_N = _forward(head, hidden_ND, kernel_VD, target_N)
        return (logp_N, entropy_N), (hidden_ND, kernel_VD, target_N, entropy_N, lse_N)

    def backward(saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]) -> Any:
        return _backward(head, saved, cotangents)

    logps.defvjp(forward, backward)
    return logps


def top_logps(head: Head, hidden_ND: jax.Array, kernel_VD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest log-probabilities of each position, largest first, and their ids, `[N, k]`. No gradient."""
    N, chunk, real = len(hidden_ND), head.chunk(len(hidden_ND)), accumulator(head.dtype)
    starts_X = head.starts(chunk)

    def step(carry: tuple[jax.Array, ...], of: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        (best_Nk, id_Nk, lse_N), (start, number) = carry, of
        kernel_CD = _kernel_of(head, kernel_VD, start, chunk)
        logits_NC, index_C = _chunk_logits(head, hidden_ND, kernel_CD, start, number)
        lse_N = jnp.logaddexp(lse_N, jax.nn.logsumexp(logits_NC, axis=-1))
        both_NX = jnp.concatenate([best_Nk, logits_NC], axis=1)
        ids_NX = jnp.concatenate([id_Nk, jnp.broadcast_to(index_C[None], (N, chunk))], axis=1)
        best_Nk, place_Nk = jax.lax.top_k(both_NX, k)
        return (best_Nk, jnp.take_along_axis(ids_NX, place_Nk, axis=1), lse_N), None

    nothing_Nk, no_id_Nk = jnp.full((N, k), CLOSED, real), jnp.full((N, k), -1, jnp.int32)
    closed: tuple[jax.Array, ...] = (nothing_Nk, no_id_Nk, jnp.full(N, CLOSED, real))
    numbers_X = jnp.arange(len(starts_X), dtype=jnp.int32)
    (best_Nk, id_Nk, lse_N), _ = jax.lax.scan(step, closed, (starts_X, numbers_X))
    return best_Nk - lse_N[:, None], id_Nk
