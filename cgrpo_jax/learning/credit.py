"""From rewards to plain numbers per token, in numpy float64 (arXiv 2506.03106, section 4).

For a question q with n responses y_i and k selected refinements yref_j:

    A = R - mean({R_1..R_n} u {Rref_1..Rref_k})                         `group_advantages`
    A = R - mean({R_1..R_n})                                            baseline=responses (2602.02482)
    J = 1/n sum_i sum_t [r term] + 1/k sum_j sum_t [rho term]           `group_weights` (1/n, 1/k)

    J += 1/n sum_j sum_t [r term of yref_j given the prompt it was sampled from], A = Rref_j - mean({Rref})
                                                                        refine.own_group (GOLF, 2603.04597)

and the loss of an update is -J averaged over its questions. Every normaliser is known before the update, so it is
divided out here, once: the device only adds up. So neither micro-batches nor packing nor a mesh can change a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cgrpo_jax.options import ObjectiveConfig
from cgrpo_jax.records import Attempt, Group, Segment


def group_advantages(
    reward_G: np.ndarray, refined_G: np.ndarray, *, baseline: str = "group", divide_by_std: bool = False
) -> np.ndarray:
    """Rewards minus a mean `[G]`.

    Args:
      refined_G: bool, which rows are refinements.
      baseline: whose mean: of the whole group, or of the responses alone.
      divide_by_std: also divide by the unbiased standard deviation of the same rows + 1e-6.
    """
    known = reward_G if baseline == "group" else reward_G[~refined_G]
    centred_G = reward_G - known.mean()
    if not divide_by_std:
        return centred_G
    variance = ((known - known.mean()) ** 2).sum() / max(len(known) - 1, 1)
    return centred_G / (np.sqrt(variance) + 1e-6)


def group_weights(refined_G: np.ndarray, *, weights: str = "per_kind") -> np.ndarray:
    """Weight of each row within its group `[G]`: 1/n and 1/k (paper), one over the rows of the group, or 1."""
    if weights == "sum":
        return np.ones(len(refined_G))
    if weights == "uniform":
        return np.full(len(refined_G), 1.0 / len(refined_G))
    k = int(refined_G.sum())
    return np.where(refined_G, 1.0 / max(k, 1), 1.0 / max(len(refined_G) - k, 1))


def _token_weights(lengths: np.ndarray, weight: np.ndarray, groups: int, constant: float, how: str) -> np.ndarray:
    """What each token of a row counts in the loss of the whole update, one number a row.

    constant: row weight / (groups x constant) | sequence_mean: row weight / (groups x length) | token_mean: 1 / tokens.
    """
    if how == "token_mean":
        return np.full(len(lengths), 1.0 / max(lengths.sum(), 1))
    if how == "sequence_mean":
        return weight / (groups * np.maximum(lengths, 1))
    return weight / (groups * constant)


Row = tuple[Sequence[int], Attempt, bool]  # a prompt, what is trained on under it, and whether that is a refinement


def _trained(group: Group) -> Iterator[list[Row]]:
    """The rows that share a baseline: those of the question, and the refinements under their own prompt."""
    yield [(group.prompt_ids, attempt, refined) for attempt, refined in group.rows()]
    own = [group.refinements[i] for i in group.own_group]
    if own:
        yield [(attempt.prompt_ids or (), attempt, False) for attempt in own]


def segments(groups: Sequence[Group], cfg: ObjectiveConfig, constant: float) -> list[Segment]:
    """The rows of one update, in the order of the groups.

    Args:
      constant: what a token sum is divided by where `aggregation` is "constant": max_new_tokens.
    """
    rows: list[Row] = []
    advantages, weights = [], []
    for own in (part for group in groups for part in _trained(group)):
        refined_G = np.array([refined for _, _, refined in own])
        reward_G = np.array([attempt.reward for _, attempt, _ in own], np.float64)
        rows += own
        advantage_G = group_advantages(reward_G, refined_G, baseline=cfg.baseline, divide_by_std=cfg.divide_by_std)
        advantages.append(advantage_G)
        weights.append(group_weights(refined_G, weights=cfg.weights))
    lengths = np.array([len(attempt.completion.ids) for _, attempt, _ in rows])
    weight = np.concatenate(weights)
    token = _token_weights(lengths, weight, len(groups), constant, cfg.aggregation)
    entropy_how = "token_mean" if cfg.entropy_mean == "token_mean" else cfg.aggregation
    entropy = cfg.entropy_coef * _token_weights(lengths, weight, len(groups), constant, entropy_how)
    advantage = np.concatenate(advantages)
    counted = np.array([cfg.overlong == "train" or attempt.completion.finished for _, attempt, _ in rows])

    def segment(index: int) -> Segment:
        prompt_ids, attempt, refined = rows[index]
        one_T = np.full(len(attempt.completion.ids), float(counted[index]))
        gain_T = token[index] * advantage[index] * one_T
        by_likelihood = refined and cfg.refined_shape == "log_probability"
        return Segment(
            prompt_ids=prompt_ids,
            ids=attempt.completion.ids,
            refined=refined,
            pg_T=0.0 * gain_T if by_likelihood else gain_T,
            ce_T=gain_T if by_likelihood else 0.0 * gain_T,
            ent_T=entropy[index] * one_T,
            kl_T=token[index] * cfg.kl_coef * one_T,
            sampler_logp_T=attempt.completion.logp,
        )

    return [segment(index) for index in range(len(rows))]


def supervised(rows: Sequence[tuple[Sequence[int], np.ndarray]]) -> list[Segment]:
    """(prompt ids, answer ids) -> segments whose loss is the mean negative log-likelihood per answer token."""
    tokens = sum(len(ids) for _, ids in rows)

    def segment(prompt_ids: Sequence[int], ids: np.ndarray) -> Segment:
        zero_T = np.zeros(len(ids))
        return Segment(prompt_ids, ids, False, pg_T=zero_T, ce_T=zero_T + 1.0 / tokens, ent_T=zero_T, kl_T=zero_T)

    return [segment(prompt_ids, ids) for prompt_ids, ids in rows]
