"""Segments as the leader tells the other hosts of them: by the name of what was sampled, which each host has already.

A segment of a sampled sequence is a name, a prompt that it shares with others, and four numbers, however long it is. So
896 sequences are told in less than a megabyte, and each host packs its bins alike. The bins themselves would be 215 MB
for sequences of 9,216 tokens, which every host would read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cgrpo_jax.config.options import ObjectiveConfig
from cgrpo_jax.learning import credit
from cgrpo_jax.records import Completion, Group, Name, Segment

TokenWeights = float | np.ndarray  # of each token that has a loss; or of every token, float64 [T], where they differ


class Written(NamedTuple):
    """Ids that no engine of this run sampled, as they are trained on; see `records.Segment`."""

    ids: np.ndarray
    sampler_logp_T: np.ndarray | None
    sampled_T: np.ndarray | None


class Told(NamedTuple):
    """A segment without the arrays that every host has."""

    prompt: int  # index of its prompt
    source: Name | Written
    refined: bool
    weights: tuple[TokenWeights, TokenWeights, TokenWeights, TokenWeights]  # pg, ce, ent, kl


class Update(NamedTuple):
    """The segments of one update."""

    prompts: Sequence[np.ndarray]  # int32, each once
    segments: Sequence[Told]


def told(segments: Sequence[Segment], completions: Mapping[Name, Completion]) -> Update:
    """The segments of an update, as short as can be.

    Args:
      completions: what every host sampled in this step.
    """
    names = {id(completion.ids): name for name, completion in completions.items()}
    prompts: dict[tuple[int, ...], int] = {}
    made = []
    for segment in segments:
        prompt = prompts.setdefault(tuple(segment.prompt_ids), len(prompts))
        name = names.get(id(segment.ids))
        same = name is not None and _same(segment, completions[name])
        source = name if same and name else Written(segment.ids, segment.sampler_logp_T, segment.sampled_T)
        one_T = _has_loss(len(segment.ids), segment.sampled_T)
        weights = tuple(
            _short(weight_T, one_T) for weight_T in (segment.pg_T, segment.ce_T, segment.ent_T, segment.kl_T)
        )
        made.append(Told(prompt, source, segment.refined, weights))  # type: ignore[arg-type]  # they are four
    return Update([np.asarray(ids, np.int32) for ids in prompts], made)


def told_groups(
    groups: Sequence[Group], cfg: ObjectiveConfig, limit: float, updates: int, completions: Mapping[Name, Completion]
) -> list[Update]:
    """What each of the updates of a rollout learns: its own share of the problems, in their order.

    Args:
      limit: tokens of a response at most, see `credit.segments`.
    """
    return [told(segments, completions) for segments in credit.of_updates(groups, cfg, limit, updates)]


def told_rows(rows: Sequence[tuple[Sequence[int], np.ndarray]]) -> Update:
    """What an update of supervised training learns, see `credit.supervised`."""
    return told(credit.supervised(rows), {})


def heard(update: Update, completions: Mapping[Name, Completion]) -> list[Segment]:
    """The segments again, equal to the bit, on any host."""
    prompts = [ids.tolist() for ids in update.prompts]
    return [_segment(prompts[one.prompt], one, completions) for one in update.segments]


def _segment(prompt_ids: Sequence[int], one: Told, completions: Mapping[Name, Completion]) -> Segment:
    ids, logp_T, sampled_T = one.source if isinstance(one.source, Written) else _of(completions[one.source])
    one_T = _has_loss(len(ids), sampled_T)
    pg_T, ce_T, ent_T, kl_T = (weight if isinstance(weight, np.ndarray) else weight * one_T for weight in one.weights)
    return Segment(prompt_ids, ids, one.refined, pg_T, ce_T, ent_T, kl_T, logp_T, sampled_T)


def _of(completion: Completion) -> Written:
    return Written(completion.ids, completion.logp, completion.sampled_T)


def _same(segment: Segment, completion: Completion) -> bool:
    return segment.sampler_logp_T is completion.logp and segment.sampled_T is completion.sampled_T


def _has_loss(length: int, sampled_T: np.ndarray | None) -> np.ndarray:
    return np.ones(length) if sampled_T is None else sampled_T.astype(np.float64)


def _short(weight_T: np.ndarray, one_T: np.ndarray) -> TokenWeights:
    """The one weight of all tokens that have a loss, or the array where they differ.

    Bits are compared, not values, so that -0.0 stays -0.0.
    """
    first = float(weight_T[int(one_T.argmax())]) if len(weight_T) else 0.0
    return first if (first * one_T).tobytes() == weight_T.astype(np.float64).tobytes() else weight_T
