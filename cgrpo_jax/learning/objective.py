"""The Critique-GRPO objective as pure functions of arrays (arXiv 2506.03106, section 4).

    loss   = - sum_t [ surrogate(x_t, pg_t) + ce_t log p_t + ent_t H_t - kl_t k3_t ]          `token_loss`
    surrogate(x, pg) = min(x pg, clip(x, 1-eps, 1+eps) pg)
    x = r_t   = pi(y_t | q, y_<t) / pi_old(y_t | q, y_<t)          of responses               `importance_ratio`
    x = rho_t = p / (p + gamma),  p = pi(yref_t | q, yref_<t)      of refinements             `shaped_probability`
    x = pi(yref_t | q, yref_<t) / pi_old(yref_t | refinement prompt, yref_<t)   by the sampler (Guide, 2506.13923)
    x = log p_t, without a clip, is the ce term with a signed weight                          (`credit.segments`)

`correction` weighs the surrogate of responses by what the trainer's own p_t makes of the sampler's q_t: min(p_t/q_t, c)
per token, or 0 for a sequence whose geometric mean of p_t/q_t lies outside of [1/c, c].

pg is weight x advantage of the token (signed), with every normaliser divided out: `credit.py` makes it, on the host.
The weight is not negative, so min and clip commute with it. The gradient of rho is Psi(p) = gamma p / (p + gamma)^2 per
unit of d log p, at most 1/4, at p = gamma. With one update per rollout pi_old is `stop_gradient` of the current policy,
so r = 1 in value and the gradient of its term is REINFORCE with a baseline. Nothing is divided here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cgrpo_jax.config.options import CORRECTION_LIMITS, ObjectiveConfig

LOG_RATIO_LIMIT = 20.0  # of exponents: beyond it float32 overflows and the ratio means nothing


def importance_ratio(logp_BT: jax.Array, old_logp_BT: jax.Array) -> jax.Array:
    """The importance ratio r = pi / pi_old of each token."""
    return jnp.exp(jnp.clip(logp_BT - old_logp_BT, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def shaped_probability(logp_BT: jax.Array, gamma: float) -> jax.Array:
    """The shaped probability rho = p / (p + gamma) of each token, in [0, 1)."""
    prob_BT = jnp.exp(logp_BT)
    return prob_BT / (prob_BT + gamma)


Clip = tuple[float, float]  # the ratio is clipped to [1 - low, 1 + high]


def clip_of(cfg: ObjectiveConfig) -> Clip:
    """The lower and the upper bound of the clip."""
    return cfg.clip_eps, cfg.clip_high or cfg.clip_eps


def surrogate(ratio_BT: jax.Array, pg_BT: jax.Array, clip: Clip | None) -> jax.Array:
    """PPO's surrogate min(r A, clip(r) A) of each token, with A in `pg`; without a clip r A."""
    plain_BT = ratio_BT * pg_BT
    if clip is None:
        return plain_BT
    return jnp.minimum(plain_BT, jnp.clip(ratio_BT, 1.0 - clip[0], 1.0 + clip[1]) * pg_BT)


def binds(ratio_BT: jax.Array, pg_BT: jax.Array, clip: Clip | None) -> jax.Array:
    """Where the clip removes the gradient: above 1 + high for an advantage above 0, below 1 - low for one below."""
    if clip is None:
        return jnp.zeros(ratio_BT.shape, bool)
    return ((pg_BT > 0) & (ratio_BT > 1.0 + clip[1])) | ((pg_BT < 0) & (ratio_BT < 1.0 - clip[0]))


def correction_weight(
    logp_BT: jax.Array, sampler_logp_BT: jax.Array, segment_BT: jax.Array, scored_BT: jax.Array, cfg: ObjectiveConfig
) -> jax.Array:
    """What a response's token counts, given the trainer's log-probability and the sampler's; no gradient flows.

    Args:
      logp_BT: of the trainer, before the first update of this rollout.
      segment_BT: int32, which segment of its row a token belongs to, from 1 on.
    """
    limit = cfg.correction_limit or CORRECTION_LIMITS[cfg.correction]
    log_ratio_BT = jnp.where(scored_BT, jax.lax.stop_gradient(logp_BT) - sampler_logp_BT, 0.0)
    if cfg.correction == "token":
        return jnp.minimum(jnp.exp(jnp.minimum(log_ratio_BT, LOG_RATIO_LIMIT)), limit)

    def of_row(log_ratio_T: jax.Array, segment_T: jax.Array, scored_T: jax.Array) -> jax.Array:
        total = jax.ops.segment_sum(log_ratio_T, segment_T, len(segment_T) + 1)
        count = jax.ops.segment_sum(scored_T.astype(total.dtype), segment_T, len(segment_T) + 1)
        return (total / jnp.maximum(count, 1))[segment_T]

    mean_BT = jax.vmap(of_row)(log_ratio_BT, segment_BT, scored_BT)
    return (jnp.abs(mean_BT) <= jnp.log(limit)).astype(log_ratio_BT.dtype)


def k3(logp_BT: jax.Array, ref_logp_BT: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    """KL(pi || ref) per token by the k3 estimator, and where it is clamped, so that it has no gradient there.

    exp(d) - d - 1, d = log ref - log pi within +-LOG_RATIO_LIMIT; at most `limit`, as the release clamps it, unless
    that is 0.
    """
    gap_BT = ref_logp_BT - logp_BT
    d_BT = jnp.clip(gap_BT, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    k3_BT, clamped_BT = jnp.exp(d_BT) - d_BT - 1.0, jnp.abs(gap_BT) > LOG_RATIO_LIMIT
    if not limit:
        return k3_BT, clamped_BT
    return jnp.minimum(k3_BT, limit), clamped_BT | (k3_BT > limit)


class Tokens(NamedTuple):
    """What the loss needs of each token `[B, T]`; a term that a run does not have is None."""

    scored_BT: jax.Array  # bool: a token of a segment, not prompt or padding
    refined_BT: jax.Array  # bool
    pg_BT: jax.Array  # float32, as the rest
    ce_BT: jax.Array | None = None
    ent_BT: jax.Array | None = None
    kl_BT: jax.Array | None = None
    old_logp_BT: jax.Array | None = None  # the trainer's own, from before the first update of this rollout
    ref_logp_BT: jax.Array | None = None  # exactly where there is kl_BT
    sampler_logp_BT: jax.Array | None = None
    segment_BT: jax.Array | None = None  # int32; needed where there is a correction


def _ratios(logp_BT: jax.Array, tokens: Tokens, cfg: ObjectiveConfig) -> tuple[jax.Array, jax.Array]:
    """x of each token (its ratio or shape) as the loss of a response, and as that of a refinement, has it."""
    old_logp_BT = jax.lax.stop_gradient(logp_BT) if tokens.old_logp_BT is None else tokens.old_logp_BT
    ratio_BT = importance_ratio(logp_BT, old_logp_BT)
    if cfg.refined_shape == "ratio_to_sampler":
        assert tokens.sampler_logp_BT is not None  # what was sampled has it
        return ratio_BT, importance_ratio(logp_BT, tokens.sampler_logp_BT)
    if cfg.refined_shape == "shaped":
        return ratio_BT, shaped_probability(logp_BT, cfg.gamma)
    return ratio_BT, jnp.exp(logp_BT) if cfg.refined_shape == "probability" else ratio_BT  # log p: weight 0 here


def token_loss(
    logp_BT: jax.Array, entropy_BT: jax.Array, tokens: Tokens, cfg: ObjectiveConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of some tokens, a sum, and sums for the metrics (each with its count).

    Args:
      logp_BT: log-probabilities of the current policy under the question-only prompt, full support, at the sampling
        temperature.
      entropy_BT: of the current policy at each token, nats.
    """
    scored_BT, off_BT = tokens.scored_BT, tokens.refined_BT & tokens.scored_BT
    on_BT = scored_BT & ~off_BT
    ratio_BT, refined_ratio_BT = _ratios(logp_BT, tokens, cfg)
    clip_on = clip_of(cfg) if cfg.clip_responses else None
    clip_off = clip_of(cfg) if cfg.clip_refinements else None
    on_gain_BT = surrogate(ratio_BT, tokens.pg_BT, clip_on)
    off_gain_BT = surrogate(refined_ratio_BT, tokens.pg_BT, clip_off)
    weight_BT = None
    if cfg.correction != "none" and tokens.sampler_logp_BT is not None and tokens.segment_BT is not None:
        before_BT = logp_BT if tokens.old_logp_BT is None else tokens.old_logp_BT
        weight_BT = correction_weight(before_BT, tokens.sampler_logp_BT, tokens.segment_BT, scored_BT, cfg)
        on_gain_BT *= weight_BT
    gain_BT = jnp.where(off_BT, off_gain_BT, on_gain_BT)

    def total(x_BT: jax.Array, where_BT: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(jnp.where(where_BT, x_BT, 0.0).sum())

    sums = {
        "tokens": scored_BT.sum(),
        "response_tokens": on_BT.sum(),
        "refined_tokens": off_BT.sum(),
        "entropy": total(entropy_BT, scored_BT),
        "logp": total(logp_BT, scored_BT),
        "nonfinite_tokens": (scored_BT & ~(jnp.isfinite(logp_BT) & jnp.isfinite(entropy_BT))).sum(),
        "refined_prob": total(jnp.exp(logp_BT), off_BT),
        "clipped": total(binds(ratio_BT, tokens.pg_BT, clip_on), on_BT),
        "refined_clipped": total(binds(refined_ratio_BT, tokens.pg_BT, clip_off), off_BT),
    }
    if weight_BT is not None:
        sums |= {"correction": total(weight_BT, on_BT)}
    if tokens.ce_BT is not None:
        gain_BT += tokens.ce_BT * logp_BT
    if tokens.ent_BT is not None:
        gain_BT += tokens.ent_BT * entropy_BT
    if tokens.kl_BT is not None and tokens.ref_logp_BT is not None:
        k3_BT, clamped_BT = k3(logp_BT, tokens.ref_logp_BT, cfg.kl_limit)
        gain_BT -= tokens.kl_BT * k3_BT
        sums |= {"kl": total(k3_BT, scored_BT), "kl_clamped": total(clamped_BT, scored_BT)}
    loss_BT = jnp.where(scored_BT, -gain_BT, 0.0)
    sums |= {"response_loss": total(loss_BT, on_BT), "refined_loss": total(loss_BT, off_BT)}
    if tokens.sampler_logp_BT is not None:
        gap_BT = jnp.abs(jax.lax.stop_gradient(logp_BT) - tokens.sampler_logp_BT)
        sums |= {"logp_gap": total(gap_BT, on_BT), "logp_gap_max": jnp.where(on_BT, gap_BT, 0.0).max()}
    return loss_BT.sum(), sums
