"""The objective against hand-worked golden numbers and an independent float64 transcription in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgrpo_jax.learning import objective
from cgrpo_jax.learning.objective import group_advantages, group_weights, policy_loss, shaped_probability
from cgrpo_jax.options import ObjectiveConfig

P_VALUES = [0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0]


def test_golden_shaping_and_its_gradient():
    logp = jnp.log(jnp.array(P_VALUES))
    expected = [0.0099, 0.0909, 0.3333, 0.5, 0.75, 0.8333, 0.9, 0.9091]
    np.testing.assert_allclose(shaped_probability(logp, 0.1), expected, atol=5e-5)
    psi = jax.vmap(jax.grad(lambda x: shaped_probability(x, 0.1)))(logp)  # with respect to log p
    np.testing.assert_allclose(psi, [0.0098, 0.0826, 0.2222, 0.25, 0.1875, 0.1389, 0.09, 0.0826], atol=5e-5)


def advantages(rewards, **kwargs):
    reward_PG = jnp.array([rewards], jnp.float32)
    return np.asarray(group_advantages(reward_PG, jnp.ones(reward_PG.shape, bool), **kwargs))[0]


def test_golden_advantages():
    np.testing.assert_allclose(advantages([0] * 7 + [1]), [-0.125] * 7 + [0.875])
    np.testing.assert_allclose(advantages([0] * 7 + [1], divide_by_std=True), [-0.35355] * 7 + [2.4749], atol=2e-4)
    np.testing.assert_allclose(advantages([1] * 7 + [0]), [0.125] * 7 + [-0.875])
    for same in (0.0, 1.0):
        for std in (False, True):
            assert (advantages([same] * 8, divide_by_std=std) == 0).all()


def test_advantages_of_a_smaller_group_ignore_what_does_not_exist():
    reward_PG = jnp.array([[1.0, 0.0, 99.0], [1.0, 0.0, 0.5]])
    mask_PG = jnp.array([[True, True, False], [True, True, True]])
    np.testing.assert_allclose(group_advantages(reward_PG, mask_PG), [[0.5, -0.5, 0.0], [0.5, -0.5, 0.0]])


def test_weights():
    refined_PG = jnp.array([[False] * 7 + [True], [False] * 7 + [False]])
    mask_PG = jnp.array([[True] * 8, [True] * 7 + [False]])
    np.testing.assert_allclose(group_weights(refined_PG, mask_PG)[0], [1 / 7] * 7 + [1.0], rtol=1e-6)
    np.testing.assert_allclose(group_weights(refined_PG, mask_PG)[1], [1 / 7] * 7 + [0.0], rtol=1e-6)
    np.testing.assert_allclose(group_weights(refined_PG, mask_PG, weights="uniform")[0], [1 / 8] * 8, rtol=1e-6)


def test_literal_clip_on_the_refined_term():
    """For A < 0 the gradient is 0 below p = gamma (1-eps)/eps = 0.4 and not above (eps 0.2, gamma 0.1)."""
    gain = lambda logp, adv: objective.surrogate(shaped_probability(logp, 0.1)[None, None], adv[None], 0.2).sum()
    slope = jax.grad(gain)
    for p in (0.05, 0.2, 0.39):
        assert slope(jnp.log(jnp.float32(p)), jnp.float32(-1.0)) == 0
        assert slope(jnp.log(jnp.float32(p)), jnp.float32(1.0)) > 0
    for p in (0.41, 0.7, 1.0):
        assert slope(jnp.log(jnp.float32(p)), jnp.float32(-1.0)) < 0


def make_rows(rng, rows=8, steps=6):
    """Two groups of rows 0-3 and 4-7; the last of each is a refinement; lengths differ, one row is empty."""
    length_B = np.array([6, 3, 5, 4, 1, 6, 2, 0])[:rows]
    refined_B = np.array([False, False, False, True] * 2)[:rows]
    return {
        "logp_BT": rng.normal(-1.5, 0.8, (rows, steps)).clip(max=-1e-3),
        "old_logp_BT": rng.normal(-1.5, 0.8, (rows, steps)).clip(max=-1e-3),
        "ref_logp_BT": rng.normal(-1.5, 0.8, (rows, steps)).clip(max=-1e-3),
        "entropy_BT": rng.uniform(0, 2, (rows, steps)),
        "mask_BT": np.arange(steps)[None] < length_B[:, None],
        "adv_B": rng.normal(size=rows),
        "weight_B": np.where(refined_B, 1.0, 1 / 3),
        "refined_B": refined_B,
    }


def transcription(rows, cfg):
    """The loss, token by token, in plain Python floats, written from the equations."""
    total, tokens = 0.0, int(rows["mask_BT"].sum())
    for b in range(len(rows["adv_B"])):
        length = int(rows["mask_BT"][b].sum())
        for t in range(length):
            logp, adv = rows["logp_BT"][b, t], rows["adv_B"][b]
            ratio = np.exp(logp - rows["old_logp_BT"][b, t])
            if rows["refined_B"][b]:
                p = np.exp(logp)
                value = {"shaped": p / (p + cfg.gamma), "probability": p, "ratio": ratio}[cfg.refined_shape]
                clip = cfg.clip_refinements
            else:
                value, clip = ratio, cfg.clip_responses
            gain = value * adv
            if clip:
                gain = min(gain, min(max(value, 1 - cfg.clip_eps), 1 + cfg.clip_eps) * adv)
            d = rows["ref_logp_BT"][b, t] - logp
            gain += cfg.entropy_coef * rows["entropy_BT"][b, t] - cfg.kl_coef * (np.exp(d) - d - 1)
            weight = {"constant": rows["weight_B"][b], "token_mean": 1.0, "sequence_mean": rows["weight_B"][b] / length}
            total -= gain * weight[cfg.aggregation]
    return total / {"constant": 2 * 6.0, "token_mean": tokens, "sequence_mean": 2}[cfg.aggregation]


CONFIGS = [
    ObjectiveConfig(),
    ObjectiveConfig(aggregation="token_mean", clip_responses=False, gamma=0.5),
    ObjectiveConfig(aggregation="sequence_mean", refined_shape="ratio", kl_coef=0.1),
    ObjectiveConfig(refined_shape="probability", clip_refinements=False, entropy_coef=0.01, clip_eps=0.1),
]


@pytest.mark.parametrize("cfg", CONFIGS)
def test_loss_equals_the_transcription(rng, cfg):
    with jax.enable_x64(True):
        rows = make_rows(rng)
        arrays = {name: jnp.asarray(value) for name, value in rows.items()}
        loss_sum, _ = policy_loss(**arrays, cfg=cfg)
        denominator = objective.loss_denominator(arrays["mask_BT"], jnp.float64(2), 6.0, cfg)
        np.testing.assert_allclose(loss_sum / denominator, transcription(rows, cfg), rtol=1e-7)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_gradient_equals_finite_differences_of_the_transcription(rng, cfg):
    """Central differences in float64 of code that knows no jax, at every token."""
    with jax.enable_x64(True):
        rows = make_rows(rng)
        arrays = {name: jnp.asarray(value) for name, value in rows.items()}
        loss = lambda logp_BT: policy_loss(**(arrays | {"logp_BT": logp_BT}), cfg=cfg)[0]
        denominator = float(objective.loss_denominator(arrays["mask_BT"], jnp.float64(2), 6.0, cfg))
        slope_BT = np.asarray(jax.grad(loss)(arrays["logp_BT"])) / denominator
    assert np.abs(slope_BT).max() > 1e-3
    for b, t in np.ndindex(slope_BT.shape):
        ends = []
        for move in (1e-6, -1e-6):
            moved = rows["logp_BT"].copy()
            moved[b, t] += move
            ends.append(transcription(rows | {"logp_BT": moved}, cfg))
        np.testing.assert_allclose(slope_BT[b, t], (ends[0] - ends[1]) / 2e-6, atol=1e-8)


def test_what_each_row_depends_on(rng):
    """Refined rows ignore old log-probs; the others ignore gamma."""
    arrays = {
        name: jnp.asarray(value, jnp.float32 if value.dtype == np.float64 else None)
        for name, value in make_rows(rng).items()
    }
    other = arrays | {"old_logp_BT": arrays["old_logp_BT"] - 0.3}
    only_refined = {"mask_BT": arrays["mask_BT"] & arrays["refined_B"][:, None]}
    only_responses = {"mask_BT": arrays["mask_BT"] & ~arrays["refined_B"][:, None]}
    cfg = ObjectiveConfig(kl_coef=0.0)
    loss = lambda rows, cfg=cfg: float(policy_loss(**rows, cfg=cfg)[0])
    assert loss(arrays | only_refined) == loss(other | only_refined)
    assert loss(arrays | only_responses) != loss(other | only_responses)
    assert loss(arrays | only_responses) == loss(arrays | only_responses, ObjectiveConfig(gamma=0.7))
    assert loss(arrays | only_refined) != loss(arrays | only_refined, ObjectiveConfig(gamma=0.7))


def test_first_update_is_reinforce_with_baseline(rng):
    """With no old log-probs the ratio is 1: loss = -A w per token, gradient -A w grad log p."""
    arrays = {name: jnp.asarray(value) for name, value in make_rows(rng).items()}
    arrays |= {"old_logp_BT": None, "ref_logp_BT": None, "refined_B": jnp.zeros(8, bool)}
    loss = lambda logp_BT: policy_loss(**(arrays | {"logp_BT": logp_BT}), cfg=ObjectiveConfig())[0]
    expected = -(arrays["adv_B"] * arrays["weight_B"])[:, None] * arrays["mask_BT"]
    np.testing.assert_allclose(loss(arrays["logp_BT"]), expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(arrays["logp_BT"]), expected, rtol=1e-5)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_sums_add_up_over_any_split(rng, cfg):
    arrays = {name: jnp.asarray(value) for name, value in make_rows(rng).items()}
    whole, sums = policy_loss(**arrays, cfg=cfg)
    for cut in (1, 3, 4):
        parts = [policy_loss(**{k: v[s] for k, v in arrays.items()}, cfg=cfg) for s in (slice(0, cut), slice(cut, 8))]
        np.testing.assert_allclose(parts[0][0] + parts[1][0], whole, rtol=1e-5)
        for name, value in sums.items():
            np.testing.assert_allclose(parts[0][1][name] + parts[1][1][name], value, rtol=1e-5)


def test_extreme_log_probs_give_finite_values():
    rows = {name: jnp.asarray(value) for name, value in make_rows(np.random.default_rng(0)).items()}
    rows |= {"logp_BT": jnp.full((8, 6), -200.0), "old_logp_BT": jnp.zeros((8, 6)), "ref_logp_BT": jnp.zeros((8, 6))}
    for cfg in CONFIGS:
        value, slope = jax.value_and_grad(lambda x, cfg=cfg: policy_loss(**(rows | {"logp_BT": x}), cfg=cfg)[0])(
            rows["logp_BT"]
        )
        assert np.isfinite(value) and np.isfinite(slope).all()
