"""The Critique-GRPO objective as pure functions of arrays (arXiv 2506.03106, section 4).

For a question q with n responses y_i and k selected refinements yref_j, all under the question-only prompt:

    A      = R - mean({R_1..R_n} u {Rref_1..Rref_k})                         `group_advantages`
    J_init = 1/n sum_i sum_t min(r_it A_i,     clip(r_it,   1-eps, 1+eps) A_i)
    J_refi = 1/k sum_j sum_t min(rho_jt Aref_j, clip(rho_jt, 1-eps, 1+eps) Aref_j)
    r_it   = pi(y_it | q, y_i<t) / pi_old(y_it | q, y_i<t)                   `importance_ratio`
    rho_jt = p / (p + gamma),  p = pi(yref_jt | q, yref_j<t)                 `shaped_probability`

and the loss is -(J_init + J_refi) averaged over questions (`policy_loss`). Where they are switched on, the term of each
token also gains entropy_coef H(pi) - kl_coef k3(pi, ref), weighted and aggregated like the token it belongs to.
The gradient of rho is Psi(p) = gamma p / (p + gamma)^2 per unit of d log p, at most 1/4, at p = gamma.

With one update per rollout pi_old is `stop_gradient` of the current policy, so r = 1 in value and the gradient of
J_init is REINFORCE with a baseline. Everything returned is a sum; the caller divides once, by `loss_denominator`,
after adding up micro-batches, so that their split never changes the gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cgrpo_jax.options import ObjectiveConfig

LOG_RATIO_LIMIT = 20.0  # of exponents: beyond it float32 overflows and the ratio means nothing
AGGREGATIONS = ("constant", "token_mean", "sequence_mean")
SHAPES = ("shaped", "probability", "ratio")
WEIGHTS = ("per_kind", "uniform")


def group_advantages(reward_PG: jax.Array, mask_PG: jax.Array, *, divide_by_std: bool = False) -> jax.Array:
    """Rewards minus the mean over the group, responses and refinements together.

    Args:
      reward_PG, mask_PG: rewards, and which of them exist (groups may have different sizes).
      divide_by_std: also divide by the unbiased standard deviation + 1e-6.

    Returns:
      advantages `[P, G]`, zero where the mask is False.
    """
    count_P1 = jnp.maximum(mask_PG.sum(axis=-1, keepdims=True), 1)
    centred_PG = reward_PG - jnp.where(mask_PG, reward_PG, 0.0).sum(axis=-1, keepdims=True) / count_P1
    centred_PG = jnp.where(mask_PG, centred_PG, 0.0)
    if not divide_by_std:
        return centred_PG
    variance_P1 = (centred_PG**2).sum(axis=-1, keepdims=True) / jnp.maximum(count_P1 - 1, 1)
    return centred_PG / (jnp.sqrt(variance_P1) + 1e-6)


def group_weights(refined_PG: jax.Array, mask_PG: jax.Array, *, weights: str = "per_kind") -> jax.Array:
    """Weight of each row within its group `[P, G]`: 1/n and 1/k (paper), or one over the rows of the group."""
    total_PG = mask_PG.sum(axis=-1, keepdims=True) * jnp.ones(mask_PG.shape)
    if weights == "per_kind":
        refined_PG = refined_PG & mask_PG
        k_P1 = refined_PG.sum(axis=-1, keepdims=True)
        total_PG = jnp.where(refined_PG, k_P1, total_PG - k_P1)
    return jnp.where(mask_PG, 1.0 / jnp.maximum(total_PG, 1.0), 0.0)


def importance_ratio(logp_BT: jax.Array, old_logp_BT: jax.Array) -> jax.Array:
    """r = pi / pi_old per token."""
    return jnp.exp(jnp.clip(logp_BT - old_logp_BT, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def shaped_probability(logp_BT: jax.Array, gamma: float) -> jax.Array:
    """rho = p / (p + gamma), in [0, 1)."""
    prob_BT = jnp.exp(logp_BT)
    return prob_BT / (prob_BT + gamma)


def surrogate(ratio_BT: jax.Array, adv_B: jax.Array, clip_eps: float | None) -> jax.Array:
    """min(ratio A, clip(ratio) A) per token; plain ratio A where clip_eps is None."""
    plain_BT = ratio_BT * adv_B[:, None]
    if clip_eps is None:
        return plain_BT
    return jnp.minimum(plain_BT, jnp.clip(ratio_BT, 1.0 - clip_eps, 1.0 + clip_eps) * adv_B[:, None])


def k3(logp_BT: jax.Array, ref_logp_BT: jax.Array) -> jax.Array:
    """KL(pi || ref) per token by the k3 estimator: exp(d) - d - 1, d = log ref - log pi, d within +-10."""
    d_BT = jnp.clip(ref_logp_BT - logp_BT, -10.0, 10.0)
    return jnp.exp(d_BT) - d_BT - 1.0


def loss_denominator(mask_BT: jax.Array, groups: jax.Array, constant: float, cfg: ObjectiveConfig) -> jax.Array:
    """What the summed loss of a whole update (all its micro-batches) is divided by."""
    if cfg.aggregation == "token_mean":
        return jnp.maximum(mask_BT.sum(), 1).astype(jnp.float32)
    return groups * (constant if cfg.aggregation == "constant" else 1.0)


def policy_loss(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array | None,
    ref_logp_BT: jax.Array | None,
    entropy_BT: jax.Array,
    mask_BT: jax.Array,
    adv_B: jax.Array,
    weight_B: jax.Array,
    refined_B: jax.Array,
    cfg: ObjectiveConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of some rows, to be divided by `loss_denominator` of the whole update.

    Args:
      logp_BT: log-probabilities of the current policy under the question-only prompt, full support, at the sampling
        temperature, of every row's tokens.
      old_logp_BT: the trainer's own, from before the first update of this rollout; None means `stop_gradient(logp_BT)`.
      ref_logp_BT: of the reference policy; None exactly where `kl_coef` is 0.
      entropy_BT: of the current policy at each token, nats.
      mask_BT: True on a row's tokens. Rows that only fill the batch have none.
      adv_B, weight_B, refined_B: advantage, weight within the group, and whether the row is a refinement.

    Returns:
      (loss_sum, sums): a scalar to differentiate, and sums over tokens for the metrics (each with its count).
    """
    old_logp_BT = jax.lax.stop_gradient(logp_BT) if old_logp_BT is None else old_logp_BT
    ratio_BT = importance_ratio(logp_BT, old_logp_BT)
    if cfg.refined_shape == "shaped":
        refined_ratio_BT = shaped_probability(logp_BT, cfg.gamma)
    else:
        refined_ratio_BT = jnp.exp(logp_BT) if cfg.refined_shape == "probability" else ratio_BT
    on_BT = surrogate(ratio_BT, adv_B, cfg.clip_eps if cfg.clip_responses else None)
    off_BT = surrogate(refined_ratio_BT, adv_B, cfg.clip_eps if cfg.clip_refinements else None)
    gain_BT = jnp.where(refined_B[:, None], off_BT, on_BT) + cfg.entropy_coef * entropy_BT
    if ref_logp_BT is not None:
        gain_BT -= cfg.kl_coef * k3(logp_BT, ref_logp_BT)

    length_B = mask_BT.sum(axis=-1)
    per_row = {
        "constant": weight_B,
        "sequence_mean": weight_B / jnp.maximum(length_B, 1),
        "token_mean": jnp.ones_like(weight_B),
    }
    loss_BT = jnp.where(mask_BT, -gain_BT * per_row[cfg.aggregation][:, None], 0.0)
    off_mask_BT, on_mask_BT = mask_BT & refined_B[:, None], mask_BT & ~refined_B[:, None]
    total = lambda x_BT, where_BT: jax.lax.stop_gradient(jnp.where(where_BT, x_BT, 0.0).sum())
    sums = {
        "tokens": mask_BT.sum(),
        "response_tokens": on_mask_BT.sum(),
        "refined_tokens": off_mask_BT.sum(),
        "response_loss": total(loss_BT, on_mask_BT),
        "refined_loss": total(loss_BT, off_mask_BT),
        "entropy": total(entropy_BT, mask_BT),
        "logp": total(logp_BT, mask_BT),
        "refined_prob": total(jnp.exp(logp_BT), off_mask_BT),
        "clipped": total(jnp.abs(ratio_BT - 1.0) > cfg.clip_eps, on_mask_BT),
        "kl": jnp.zeros(()) if ref_logp_BT is None else total(k3(logp_BT, ref_logp_BT), mask_BT),
    }
    return loss_BT.sum(), sums
