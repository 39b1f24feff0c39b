"""Estimates the seconds of a training step from those of its programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from cgrpo_jax.learning.packing import BinSize
from cgrpo_jax.model.decoder import ModelConfig
from cgrpo_jax.planner.chips import Topology
from cgrpo_jax.planner.figures import Figures
from cgrpo_jax.planner.memory import SYNC
from cgrpo_jax.run.build import Run


class Step(NamedTuple):
    """Estimated seconds of a training step, for one assumption about lengths."""

    share: float  # of the longest prompts and answers, and of the problems that are refined
    sample: float  # seconds
    prefill: float
    update: float
    others: float  # weight sync, log-probabilities
    tokens: float  # sampled

    @property
    def seconds(self) -> float:
        return self.sample + self.prefill + self.update + self.others


def step(run: Run, size: BinSize, figures: Mapping[str, Figures], share: float) -> Step:
    """Estimates a step. Raises KeyError where a program that it needs was not compiled (`--only`)."""
    cfg, updates = run.cfg, run.cfg.train.updates_per_rollout
    refining = cfg.refine.trigger != "never"
    responses = cfg.train.prompts * cfg.train.samples
    requests = responses * (1 + share * refining)
    tokens = requests * cfg.sampling.max_new_tokens * share
    rows, _ = _sizes(figures["decode"])
    turns = tokens / min(rows, max(run.policy.sampler.least_rows, responses))
    prompts = cfg.train.prompts * cfg.data.max_prompt_tokens * share
    prompts += responses * share * cfg.refine.max_prompt_tokens * share * refining
    prefill = figures["prefill"]
    bins = max(1, math.ceil(size.capacity * share)) * updates
    others = figures[SYNC].seconds.total() if SYNC in figures else 0.0
    if "logps" in figures:
        others += figures["logps"].over(bins).total() * ((updates > 1) + (cfg.objective.kl_coef > 0))
    return Step(
        share=share,
        sample=figures["decode"].over(turns).total(),
        prefill=prefill.seconds.total() * prompts / math.prod(_sizes(prefill)),
        update=figures["update"].over(bins / updates).total() * updates,
        others=others,
        tokens=tokens,
    )


def _sizes(figures: Figures) -> tuple[int, int]:
    """Rows and slots (tokens) of a program of the sampler, from its name."""
    rows, slots = figures.name.split("/")[1].split("x")
    return int(rows), int(slots)


def ideal_seconds(model: ModelConfig, size: BinSize, topology: Topology, chips: int) -> float:
    """Seconds of the matrix products of a full bin at peak: forward and backward, half of attention is masked."""
    assert topology.chip is not None
    width, heads, inner = model.width, model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = width * (heads + 2 * inner) + heads * width + 3 * width * model.mlp_width
    weights = model.layers * layer + model.vocab * width  # the embedding is a lookup, not a product
    rows, own = size.rows * size.tokens, size.rows * size.tokens**2 / 2
    pairs = own + size.rows * size.tokens * size.prompt_slots + size.prompts * size.prompt_slots**2 / 2
    prompts = 6 * model.layers * layer * size.prompts * size.prompt_slots
    flops = 6 * weights * rows + prompts + 12 * model.layers * heads * pairs
    return flops / chips / topology.chip.peak


def utilisation(
    model: ModelConfig, size: BinSize, update: Figures, topology: Topology, chips: int
) -> tuple[float, float] | None:
    """MFU of an update of one full bin, with kernels at likely rates and at peak; communication is left out."""
    if topology.chip is None or not update.seconds.computing:
        return None
    ideal = ideal_seconds(model, size, topology, chips)
    return ideal / update.seconds.total(wire=False), ideal / update.seconds.total(at_peak=True, wire=False)
