"""Log-probability and entropy of the trained tokens of a bin, at the sampling temperature."""

from __future__ import annotations

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
    attend_to_own,
    follow,
    keep_own,
)
from cgrpo_jax.model.decoder import ModelConfig, Params, logits, run_layers

LOGIT_ENTRIES = 1 << 24  # of one chunk of logits [rows of one device, time, V]: 64 MB in float32


def time_chunk(rows: int, steps: int, vocab: int) -> int:
    """The largest divisor of `steps` at which the logits of `rows` rows stay within LOGIT_ENTRIES (at least 1)."""
    fits = [c for c in range(1, steps + 1) if steps % c == 0 and rows * c * vocab <= LOGIT_ENTRIES]
    return fits[-1] if fits else 1


def hidden_states(cfg: ModelConfig, params: Params, one: Bins, *, dtype: DTypeLike, remat: str) -> jax.Array:
    """Final hidden states `[B, T, D]` of one bin (arrays without their leading [A])."""
    if one.prompt_AQS is None or one.prompt_length_AQ is None:
        seen = among_themselves(one.segment_ABT, one.position_ABT)
        past: KVCache | None = None
        extend: Extend = attend_to_own
    else:
        past, seen = _after_prompts(cfg, params, one.prompt_AQS, one.prompt_length_AQ, one, dtype=dtype, remat=remat)
        extend = follow
    hidden_BTD, _ = run_layers(
        cfg, params, one.token_ABT, one.position_ABT, seen, past, extend, dtype=dtype, remat=remat
    )
    return hidden_BTD


def _after_prompts(
    cfg: ModelConfig,
    params: Params,
    prompt_QS: jax.Array,
    length_Q: jax.Array,
    one: Bins,
    *,
    dtype: DTypeLike,
    remat: str,
) -> tuple[KVCache, Seen]:
    """Keys and values of each row's prompt, which ran once for all rows behind it, and what the rows see."""
    (Q, S), B = prompt_QS.shape, len(one.token_ABT)
    slot_QS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (Q, S))
    among = among_themselves((slot_QS < length_Q[:, None]).astype(jnp.int32), slot_QS)
    _, cache = run_layers(cfg, params, prompt_QS, slot_QS, among, None, keep_own, dtype=dtype, remat=remat)
    past = KVCache(*(jnp.repeat(x_LQKSH, B // Q, axis=1) for x_LQKSH in cache))
    return past, after_prompt(one.segment_ABT, one.position_ABT, jnp.repeat(length_Q, B // Q), S)


def token_logps(
    cfg: ModelConfig,
    params: Params,
    one: Bins,
    *,
    temperature: float,
    row_devices: int,
    dtype: DTypeLike,
    remat: str,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy (nats) of each target of one bin, `[B, T]`; what stands at padding means nothing.

    The head is applied a chunk of time at a time and recomputed in the backward pass, so no [B, T, V] array exists.
    """
    hidden_BTD = hidden_states(cfg, params, one, dtype=dtype, remat=remat)
    B, T = one.target_ABT.shape
    chunk = time_chunk(-(-B // row_devices), T, cfg.vocab)

    @jax.checkpoint
    def one_chunk(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BCD, target_BC = piece
        logp_BCV = jax.nn.log_softmax(logits(cfg, params, hidden_BCD) / temperature, axis=-1)
        logp_BC = jnp.take_along_axis(logp_BCV, target_BC[..., None], axis=-1)[..., 0]
        return logp_BC, -(jnp.exp(logp_BCV) * logp_BCV).sum(axis=-1)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    logp, entropy = jax.lax.map(one_chunk, (split(hidden_BTD), split(one.target_ABT)))
    return jnp.moveaxis(logp, 0, 1).reshape(B, T), jnp.moveaxis(entropy, 0, 1).reshape(B, T)
