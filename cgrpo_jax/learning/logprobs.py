"""Log-probability and entropy of the trained tokens of a bin, at the sampling temperature."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cgrpo_jax.learning.head import Head, make_head
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
from cgrpo_jax.model.decoder import Attend, ModelConfig, Params, run_layers
from cgrpo_jax.model.parts import WHOLE, Parts


@dataclasses.dataclass(frozen=True)
class Pass:
    """What is static in a pass of the trained model over a bin."""

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
    return _run(static, params, one.token_ABT, one.position_ABT, seen, past, extend)[0]


def _run(
    static: Pass,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    seen: Seen,
    past: KVCache | None,
    extend: Extend,
) -> tuple[jax.Array, KVCache]:
    return run_layers(
        static.model,
        params,
        tokens_BT,
        positions_BT,
        seen,
        past,
        extend,
        dtype=static.dtype,
        remat=static.remat,
        attend=static.attend,
        parts=static.parts,
    )


def _after_prompts(
    static: Pass, params: Params, prompt_QS: jax.Array, length_Q: jax.Array, one: Bins
) -> tuple[KVCache, Seen]:
    """Keys and values of each row's prompt, which ran once for all rows behind it, and what the rows see."""
    (Q, S), B = prompt_QS.shape, len(one.token_ABT)
    slot_QS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (Q, S))
    among = among_themselves((slot_QS < length_Q[:, None]).astype(jnp.int32), slot_QS)
    _, cache = _run(static, params, prompt_QS, slot_QS, among, None, keep_own)
    past = KVCache(*(jnp.repeat(x_LQKSH, B // Q, axis=1) for x_LQKSH in cache))
    return past, after_prompt(one.segment_ABT, one.position_ABT, jnp.repeat(length_Q, B // Q), S)


def head_of(static: Pass) -> tuple[Head, tuple[str, str]]:
    """The head of a pass, and where its kernel stands among the parameters."""
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
