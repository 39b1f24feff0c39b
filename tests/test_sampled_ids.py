"""Ids that the policy did not draw have no loss: a forced beginning, and the turn of somebody else in the middle.

Completions -> credit -> bins -> update, against formulas of the paper and of `learning/objective.py` written out here
for one sequence at a time, in float64. A mask that credit, packing or a metric forgets has been seen to fail each.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from plain_forward import forward

from cgrpo_jax.config.options import ObjectiveConfig, OptimizerConfig
from cgrpo_jax.learning import credit
from cgrpo_jax.learning import update as learning
from cgrpo_jax.learning.packing import Terms, bin_size, pack
from cgrpo_jax.learning.update import Learner, make_logps, make_update, put_bins
from cgrpo_jax.model.decoder import init_params, logits
from cgrpo_jax.records import Attempt, Completion, Group, Problem
from cgrpo_jax.workdir.metrics import Writer, group_metrics

MODEL, TEMPERATURE, CONSTANT, LIMIT = tiny_config("qwen3"), 0.7, 10.0, 1.2
# Of each problem three responses and a refinement: x was drawn by the policy, - was not.
DRAWN = (("--xxxxx", "xxx---xxxx", "xxxxx", "---xxxx"), ("xxxx", "x-x", "xxxxxxxx", "xx--xx--x"))
REWARDS = ((0.0, 1.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.5))
PROMPTS = ([5, 6, 7], [9, 8, 7, 6, 5])
OBJECTIVES = [
    ObjectiveConfig(aggregation="token_mean", weights="uniform", correction="token", kl_coef=0.3, entropy_coef=0.1),
    ObjectiveConfig(aggregation="sequence_mean", correction="sequence", kl_coef=0.2, entropy_mean="token_mean",
                    entropy_coef=0.2, clip_responses=False),
    ObjectiveConfig(correction="token", kl_coef=0.1, refined_shape="ratio_to_sampler"),
]  # fmt: skip


def groups(rng):
    """Log-probabilities of the sampler around those of a uniform policy, and none where it drew nothing."""

    def attempt(drawn, reward):
        drawn_T = np.array([letter == "x" for letter in drawn])
        ids = rng.integers(0, MODEL.vocab, len(drawn)).astype(np.int32)
        near_T = -np.log(MODEL.vocab) + rng.normal(0, 0.5, len(drawn))
        logp_T = np.where(drawn_T, near_T, np.nan).astype(np.float32)
        sampled_T = None if drawn_T.all() else drawn_T
        return Attempt(Completion(ids, logp_T, np.ones(len(ids), np.float32), True, sampled_T), "", reward, reward == 1,
                       None, "ok", prompt_ids=[1])  # fmt: skip

    made = []
    for prompt, drawn, rewards in zip(PROMPTS, DRAWN, REWARDS, strict=True):
        rows = tuple(map(attempt, drawn, rewards))
        problem = Problem("q", "1", ({"role": "user", "content": "q"},))
        made.append(Group(problem, prompt, rows[:3], rows[3:], (0, 1, 2), (0,)))
    return made


@jax.jit
def table(params, text_BT):
    """Log-probability of each id given those before it, and entropy, at the temperature; causal: padding is behind."""
    logp_BTV = jax.nn.log_softmax(logits(MODEL, params, forward(MODEL, params, text_BT)) / TEMPERATURE, axis=-1)
    given_BTV = logp_BTV[:, :-1]
    logp_BT = jnp.take_along_axis(given_BTV, text_BT[:, 1:, None], axis=-1)[..., 0]
    return logp_BT, -(jnp.exp(given_BTV) * given_BTV).sum(axis=-1)


def transcription(params, old, reference, made, cfg):
    """The loss, and sums over the drawn ids: entropy, log-probability, KL, weights of the correction."""
    drawn_ids = sum(letters.count("x") for row in DRAWN for letters in row)
    rows = [(group, place, attempt) for group in made for place, attempt in
            enumerate((*group.responses, *group.refinements))]  # fmt: skip
    texts = [[*group.prompt_ids, *attempt.completion.ids] for group, _, attempt in rows]
    text_BT = jnp.asarray([text + [0] * (16 - len(text)) for text in texts], jnp.int32)
    (logp_BT, entropy_BT), (old_BT, _), (ref_BT, _) = (table(of, text_BT) for of in (params, old, reference))
    loss, sums = 0.0, dict.fromkeys(("entropy", "logp", "kl", "correction"), 0.0)
    for b, (group, place, attempt) in enumerate(rows):
        problem, refined = made.index(group), place == 3
        at = np.array([t for t, letter in enumerate(DRAWN[problem][place]) if letter == "x"])
        rewards, there = REWARDS[problem], at + len(group.prompt_ids) - 1
        logp, entropy, before, ref = (x_BT[b, there] for x_BT in (logp_BT, entropy_BT, old_BT, ref_BT))
        sampler = jnp.asarray(attempt.completion.logp[at], logp.dtype)
        weight = {"per_kind": 1.0 if refined else 1 / 3, "uniform": 1 / 4}[cfg.weights]
        weight = {"constant": weight / (2 * CONSTANT), "sequence_mean": weight / (2 * len(at)),
                  "token_mean": 1 / drawn_ids}[cfg.aggregation]  # fmt: skip
        gain = weight * (rewards[place] - sum(rewards) / 4)
        p, x, clip = jnp.exp(logp), jnp.exp(logp - before), cfg.clip_responses or refined
        if refined:
            x = p / (p + cfg.gamma) if cfg.refined_shape == "shaped" else jnp.exp(logp - sampler)
        value = x * gain
        if clip:
            value = jnp.minimum(value, jnp.clip(x, 1 - cfg.clip_eps, 1 + cfg.clip_eps) * gain)
        off = before - sampler
        trust = jnp.minimum(jnp.exp(off), LIMIT)
        if cfg.correction == "sequence":
            trust = jnp.ones(len(at)) * (jnp.abs(off.mean()) <= np.log(LIMIT))
        k3 = jnp.exp(ref - logp) - (ref - logp) - 1
        nats = cfg.entropy_coef * (1 / drawn_ids if cfg.entropy_mean == "token_mean" else weight)
        loss -= ((value if refined else trust * value) + nats * entropy - weight * cfg.kl_coef * k3).sum()
        own = {"entropy": entropy, "logp": logp, "kl": k3} | ({} if refined else {"correction": trust})
        sums |= {name: sums[name] + x.sum() for name, x in own.items()}
    return loss, sums


@pytest.mark.parametrize(("cfg", "share"), [*zip(OBJECTIVES, (True, False, True), strict=True)])
def test_gradient_and_metrics_are_those_of_the_drawn_ids_alone(mesh, rng, cfg, share):
    """Several segments in a row; log-probabilities from before the first update, and of a reference."""
    cfg, made = dataclasses.replace(cfg, correction_limit=LIMIT), groups(rng)
    optimizer = OptimizerConfig(clip_norm=1e9)
    learner = Learner(MODEL, cfg, optimizer, TEMPERATURE, 10, jnp.float64, "dots")
    size = bin_size(share=share, problems=2, group=4, at_once=1, row_devices=1, longest_prompt=5, longest_ids=40)
    segments = credit.segments(made, cfg, CONSTANT)
    in_part = [segment for segment in segments if segment.sampled_T is not None]
    assert len(in_part) == 5 and not any((s.pg_T + s.ent_T + s.kl_T)[~s.sampled_T].any() for s in in_part)
    bins = pack(segments, size, Terms(ent=bool(cfg.entropy_coef), kl=True))
    assert bins.segment_ABT.max() > 2
    with jax.enable_x64(True):
        params, old, reference = (
            jax.tree.map(lambda x: x.astype(jnp.float64), init_params(MODEL, jax.random.key(seed))) for seed in range(3)
        )
        formulas = jax.jit(jax.value_and_grad(lambda *of: transcription(*of, made, cfg), has_aux=True))
        (loss, expected), slope = formulas(params, old, reference)
        bins, own = put_bins(mesh, bins), make_logps(learner, mesh)
        bins = bins._replace(old_logp_ABT=own(old, bins), ref_logp_ABT=own(reference, bins))
        state, sums = make_update(learner, mesh, params)(learning.init_state(learner, mesh, params), {}, bins)
    tenth = state.opt_state.inner_state[1][0].mu  # of the gradient, after one update
    for a, b in zip(jax.tree.leaves(tenth), jax.tree.leaves(slope), strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(10 * a, b, atol=2e-6 * np.abs(b).max())  # the weights in bins are float32
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-6)
    assert sums["tokens"] == sum(letters.count("x") for row in DRAWN for letters in row)


def test_lengths_and_entropies_are_of_the_drawn_ids(rng, tmp_path):
    made = groups(rng)
    values = group_metrics(made)
    responses = [attempt.completion for group in made for attempt in group.responses]
    drawn = np.concatenate([one.logp[np.isfinite(one.logp)] for one in responses])
    np.testing.assert_allclose(values["policy/entropy"], -drawn.astype(np.float64).mean(), rtol=1e-12)
    assert values["tokens/responses"] == len(drawn) == 5 + 7 + 5 + 4 + 2 + 8 and values["tokens/refinements"] == 4 + 5
    assert values["length/responses"] == len(drawn) / 6 and values["length/refinements"] == 4.5
    writer = Writer(tmp_path, 0, print)
    writer.rollout(1, made, lambda ids, text: [1] * len(ids))
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()]
    assert [a["tokens"] for row in rows for a in row["responses"]] == [5, 7, 5, 4, 2, 8]
    assert ["logp" in a for row in rows for a in row["responses"]] == [False, False, True, True, False, True]
