"""Groups of text -> fixed-shape arrays, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from cgrpo_jax.learner import Batch
from cgrpo_jax.objective import ObjectiveConfig, group_advantages, group_weights
from cgrpo_jax.types import Group


class Row(NamedTuple):
    """One sequence to train on."""

    prompt_ids: Sequence[int]
    ids: np.ndarray  # int32
    sampler_logp: np.ndarray  # float32, as long as ids
    advantage: float
    weight: float
    refined: bool


def ladder(length: int) -> int:
    """The smallest of 8, 16, ..., 64, 80, 96, 112, 128, 160, ... that holds `length`.

    Four sizes an octave bound the shapes ever compiled, and the padding by a quarter.
    """
    step = max(8, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def group_rows(groups: Sequence[Group], cfg: ObjectiveConfig) -> list[Row]:
    """All rows of some groups with their advantages and weights."""
    rows_P = [group.rows() for group in groups]
    widest = max(len(rows) for rows in rows_P)
    reward_PG = np.zeros((len(groups), widest), np.float32)
    refined_PG, mask_PG = np.zeros((2, len(groups), widest), bool)
    for p, rows in enumerate(rows_P):
        mask_PG[p, : len(rows)] = True
        reward_PG[p, : len(rows)] = [attempt.reward for attempt, _ in rows]
        refined_PG[p, : len(rows)] = [refined for _, refined in rows]
    exists_PG = jnp.asarray(mask_PG)
    adv_PG = np.asarray(group_advantages(jnp.asarray(reward_PG), exists_PG, divide_by_std=cfg.divide_by_std))
    weight_PG = np.asarray(group_weights(jnp.asarray(refined_PG), exists_PG, weights=cfg.weights))
    return [
        Row(group.prompt_ids, attempt.completion.ids, attempt.completion.logp, adv_PG[p, g], weight_PG[p, g], refined)
        for p, group in enumerate(groups)
        for g, (attempt, refined) in enumerate(rows_P[p])
    ]


def make_batch(rows: Sequence[Row], groups: int, *, micro_batch: int, micro_batches: int) -> Batch:
    """Pads rows to `[micro_batches, micro_batch, ...]`; rows that only fill have length 0 and weight 0.

    Raises:
      ValueError: more rows than the shape holds.
    """
    count = micro_batch * micro_batches
    if len(rows) > count:
        raise ValueError(f"{len(rows)} rows do not fit {micro_batches} micro-batches of {micro_batch}")
    prompt_slots = ladder(max(len(row.prompt_ids) for row in rows))
    response_slots = ladder(max(len(row.ids) for row in rows))
    tokens = np.zeros((count, prompt_slots + response_slots), np.int32)
    start = np.full(count, prompt_slots - 1, np.int32)
    length = np.zeros(count, np.int32)
    adv, weight = np.zeros((2, count), np.float32)
    refined = np.zeros(count, bool)
    sampler_logp = np.zeros((count, response_slots), np.float32)
    for i, row in enumerate(rows):
        start[i], length[i] = prompt_slots - len(row.prompt_ids), len(row.ids)
        tokens[i, start[i] : prompt_slots] = row.prompt_ids
        tokens[i, prompt_slots : prompt_slots + length[i]] = row.ids
        sampler_logp[i, : length[i]] = row.sampler_logp
        adv[i], weight[i], refined[i] = row.advantage, row.weight, row.refined
    shape = lambda x: x.reshape(micro_batches, micro_batch, *x.shape[1:])
    return Batch(
        tokens_ABT=shape(tokens),
        start_AB=shape(start),
        length_AB=shape(length),
        adv_AB=shape(adv),
        weight_AB=shape(weight),
        refined_AB=shape(refined),
        sampler_logp_ABT=shape(sampler_logp),
        groups=np.asarray(groups, np.float32),
    )
