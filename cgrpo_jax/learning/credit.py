"""Turns rewards into one weight per token and term of the loss, in numpy float64 (arXiv 2506.03106, section 4).

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

from cgrpo_jax.config.options import ObjectiveConfig
from cgrpo_jax.records import Attempt, Group, Segment


def group_advantages(
    reward_G: np.ndarray, refined_G: np.ndarray, *, baseline: str = "group", divide_by_std: bool = False
) -> np.ndarray:
    """The advantages of a group: rewards minus a mean, `[G]`.

    Args:
      refined_G: bool, which rows are refinements.
      baseline: whose mean: of the whole group, or of the responses alone.
      divide_by_std: also divide by the unbiased standard deviation of the same rows + 1e-6. Where those rows are all
        alike there is none to divide by, and a refinement that differs from them keeps its plain advantage: LUFFY's
        rule of its split baseline, std 0 -> 1. 1e-6 in its place would make an advantage of 1 one of a million.
    """
    known = reward_G if baseline == "group" else reward_G[~refined_G]
    centred_G = reward_G - known.mean()
    if not divide_by_std or (known == known[0]).all():
        return centred_G
    variance = ((known - known.mean()) ** 2).sum() / max(len(known) - 1, 1)
    return centred_G / (np.sqrt(variance) + 1e-6)


def undivided(group: Group) -> bool:
    """Whether the rewards of the responses are all alike and some refinement's is another, see `group_advantages`."""
    known = {attempt.reward for attempt, refined in group.rows() if not refined}
    return len(known) == 1 and any(attempt.reward not in known for attempt, refined in group.rows() if refined)


def group_weights(refined_G: np.ndarray, counted_G: np.ndarray, *, weights: str = "per_kind") -> np.ndarray:
    """Weight of each row within its group `[G]`: 1/n and 1/k (paper), one over the rows of the group, or 1.

    Args:
      refined_G: bool, which rows are refinements.
      counted_G: bool, which rows have a loss. n and k count those alone, and the weight of any other is 0.
    """
    if weights == "sum":
        return counted_G.astype(np.float64)
    if weights == "uniform":
        return counted_G / max(int(counted_G.sum()), 1)
    k, n = int((refined_G & counted_G).sum()), int((~refined_G & counted_G).sum())
    return np.where(refined_G, 1.0 / max(k, 1), 1.0 / max(n, 1)) * counted_G


def _token_weights(
    lengths: np.ndarray, counted: np.ndarray, weight: np.ndarray, groups: int, constant: float, how: str
) -> np.ndarray:
    """What each sampled token of a row counts in the loss of the whole update, one number a row; 0 without a loss.

    constant: row weight / (groups x constant) | sequence_mean: row weight / (groups x length) | token_mean: 1 / tokens.
    Groups and tokens are those with a loss.
    """
    if how == "token_mean":
        return counted / max(lengths[counted].sum(), 1)
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

    With `overlong` = "mask" a row that the limit cut stays in its group's baseline and has no loss: n, k, the tokens
    and the questions that a loss is averaged over are then those that have one.

    Args:
      constant: what a token sum is divided by where `aggregation` is "constant": max_new_tokens.
    """
    rows: list[Row] = []
    advantages, weights, counts = [], [], []
    questions = 0  # with a loss
    for group in groups:
        has_loss = False
        for own in _trained(group):
            refined_G = np.array([refined for _, _, refined in own])
            reward_G = np.array([attempt.reward for _, attempt, _ in own], np.float64)
            counted_G = np.array([cfg.overlong == "train" or attempt.completion.finished for _, attempt, _ in own])
            rows += own
            advantages.append(
                group_advantages(reward_G, refined_G, baseline=cfg.baseline, divide_by_std=cfg.divide_by_std)
            )
            weights.append(group_weights(refined_G, counted_G, weights=cfg.weights))
            counts.append(counted_G)
            has_loss |= bool(counted_G.any())
        questions += has_loss
    lengths = np.array([attempt.completion.tokens for _, attempt, _ in rows])
    advantage, weight, counted = (np.concatenate(parts) for parts in (advantages, weights, counts))

    def per_token(how: str) -> np.ndarray:
        return _token_weights(lengths, counted, weight, max(questions, 1), constant, how)

    token = per_token(cfg.aggregation)
    entropy = cfg.entropy_coef * per_token("token_mean" if cfg.entropy_mean == "token_mean" else cfg.aggregation)

    def segment(index: int) -> Segment:
        prompt_ids, attempt, refined = rows[index]
        one_T = attempt.completion.has_loss_T.astype(np.float64)
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
            sampled_T=attempt.completion.sampled_T,
        )

    return [segment(index) for index in range(len(rows))]


def of_updates(groups: Sequence[Group], cfg: ObjectiveConfig, limit: float, updates: int) -> list[list[Segment]]:
    """The segments of each update of a rollout, each of an equal share of the problems. Replaced problems have none.

    Args:
      limit: see `segments`, where it is `constant`.
      updates: of the rollout.
    """
    groups = [group for group in groups if group.rows()]
    share = len(groups) // updates
    return [segments(groups[first : first + share], cfg, limit) for first in range(0, len(groups), share)]


def supervised(rows: Sequence[tuple[Sequence[int], np.ndarray]]) -> list[Segment]:
    """Segments of (prompt ids, answer ids) whose loss is the mean negative log-likelihood of all answer tokens."""
    tokens = sum(len(ids) for _, ids in rows)

    def segment(prompt_ids: Sequence[int], ids: np.ndarray) -> Segment:
        zero_T = np.zeros(len(ids))
        return Segment(prompt_ids, ids, False, pg_T=zero_T, ce_T=zero_T + 1.0 / tokens, ent_T=zero_T, kl_T=zero_T)

    return [segment(prompt_ids, ids) for prompt_ids, ids in rows]
