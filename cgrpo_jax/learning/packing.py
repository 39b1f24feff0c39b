"""Groups of text -> fixed-shape arrays, in numpy."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from cgrpo_jax.learning.objective import group_advantages, group_weights
from cgrpo_jax.learning.update import Batch
from cgrpo_jax.options import ObjectiveConfig
from cgrpo_jax.records import Group
from cgrpo_jax.sampling.sizes import ladder


class Row(NamedTuple):
    """One response to train on."""

    ids: np.ndarray  # int32
    sampler_logp: np.ndarray  # float32, as long as ids
    advantage: float
    weight: float
    refined: bool


class Prompted(NamedTuple):
    """One problem's prompt and the rows trained under it."""

    prompt_ids: Sequence[int]
    rows: list[Row]


@functools.partial(jax.jit, static_argnums=3)
def _credit(reward_PG: jax.Array, refined_PG: jax.Array, mask_PG: jax.Array, cfg: ObjectiveConfig):
    adv_PG = group_advantages(reward_PG, mask_PG, divide_by_std=cfg.divide_by_std)
    return adv_PG, group_weights(refined_PG, mask_PG, weights=cfg.weights)


def group_rows(groups: Sequence[Group], cfg: ObjectiveConfig) -> list[Prompted]:
    """The rows of each group with their advantages and weights."""
    rows_P = [group.rows() for group in groups]
    shape = (len(groups), max(map(len, rows_P)))
    reward_PG = np.zeros(shape, np.float32)
    refined_PG, mask_PG = np.zeros((2, *shape), bool)
    for p, rows in enumerate(rows_P):
        mask_PG[p, : len(rows)] = True
        reward_PG[p, : len(rows)] = [attempt.reward for attempt, _ in rows]
        refined_PG[p, : len(rows)] = [refined for _, refined in rows]
    adv_PG, weight_PG = jax.device_get(_credit(reward_PG, refined_PG, mask_PG, cfg))

    def row(p: int, g: int) -> Row:
        attempt, refined = rows_P[p][g]
        return Row(attempt.completion.ids, attempt.completion.logp, adv_PG[p, g], weight_PG[p, g], refined)

    return [Prompted(group.prompt_ids, [row(p, g) for g in range(len(rows_P[p]))]) for p, group in enumerate(groups)]


def make_batch(prompted: Sequence[Prompted], *, rows_per_prompt: int, micro_batch: int) -> Batch:
    """Pads to fixed shapes; a problem with fewer rows than `rows_per_prompt` gets rows of length and weight 0.

    Args:
      micro_batch: Q, problems in a micro-batch; divides their number.

    Raises:
      ValueError: a problem has more rows than `rows_per_prompt`, or the problems do not fill the micro-batches.
    """
    P, G = len(prompted), rows_per_prompt
    if P % micro_batch or any(len(item.rows) > G for item in prompted):
        raise ValueError(f"{P} problems of at most {G} rows do not fit micro-batches of {micro_batch}")
    prompt_slots = ladder(max(len(item.prompt_ids) for item in prompted))
    response_slots = ladder(max(len(row.ids) for item in prompted for row in item.rows))
    prompt, start = np.zeros((P, prompt_slots), np.int32), np.zeros(P, np.int32)
    response, length = np.zeros((P, G, response_slots), np.int32), np.zeros((P, G), np.int32)
    adv, weight = np.zeros((2, P, G), np.float32)
    refined = np.zeros((P, G), bool)
    sampler_logp = np.zeros((P, G, response_slots), np.float32)
    for p, item in enumerate(prompted):
        start[p] = prompt_slots - len(item.prompt_ids)
        prompt[p, start[p] :] = item.prompt_ids
        for g, row in enumerate(item.rows):
            length[p, g] = len(row.ids)
            response[p, g, : length[p, g]] = row.ids
            sampler_logp[p, g, : length[p, g]] = row.sampler_logp
            adv[p, g], weight[p, g], refined[p, g] = row.advantage, row.weight, row.refined
    by_prompt = lambda x: x.reshape(-1, micro_batch, *x.shape[1:])
    by_row = lambda x: x.reshape(-1, micro_batch * G, *x.shape[2:])
    return Batch(
        prompt_AQT=by_prompt(prompt),
        start_AQ=by_prompt(start),
        response_ABT=by_row(response),
        length_AB=by_row(length),
        adv_AB=by_row(adv),
        weight_AB=by_row(weight),
        refined_AB=by_row(refined),
        sampler_logp_ABT=by_row(sampler_logp),
        groups=np.asarray(P, np.float32),
    )
