"""Credit and objective against hand-worked golden numbers and an independent float64 transcription."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgrpo_jax.config.options import ObjectiveConfig
from cgrpo_jax.learning import credit, objective
from cgrpo_jax.learning.credit import group_advantages, group_weights
from cgrpo_jax.learning.objective import Tokens, binds, k3, shaped_probability, token_loss
from cgrpo_jax.records import Attempt, Completion, Group, Problem
from cgrpo_jax.workdir.metrics import group_metrics

P_VALUES = [0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0]
PROBLEM = Problem("q", "1", ({"role": "user", "content": "q"},), "exact")
CONSTANT = 6.0


def test_golden_shaping_and_its_gradient():
    logp = jnp.log(jnp.array(P_VALUES))
    expected = [0.0099, 0.0909, 0.3333, 0.5, 0.75, 0.8333, 0.9, 0.9091]
    np.testing.assert_allclose(shaped_probability(logp, 0.1), expected, atol=5e-5)
    psi = jax.vmap(jax.grad(lambda x: shaped_probability(x, 0.1)))(logp)  # with respect to log p
    np.testing.assert_allclose(psi, [0.0098, 0.0826, 0.2222, 0.25, 0.1875, 0.1389, 0.09, 0.0826], atol=5e-5)


def test_golden_advantages():
    zeros_and_one, refined = np.array([0.0] * 7 + [1.0]), np.array([False] * 7 + [True])
    np.testing.assert_allclose(group_advantages(zeros_and_one, refined), [-0.125] * 7 + [0.875])
    expected = [-0.35355] * 7 + [2.4749]
    np.testing.assert_allclose(group_advantages(zeros_and_one, refined, divide_by_std=True), expected, atol=2e-4)
    np.testing.assert_allclose(group_advantages(1 - zeros_and_one, refined), [0.125] * 7 + [-0.875])
    for same in (0.0, 1.0):
        for std in (False, True):
            assert (group_advantages(np.full(8, same), refined, divide_by_std=std) == 0).all()


def test_a_baseline_over_the_responses_alone():
    """Worked by hand: responses 1, 0, 0, 0 (mean 1/4, unbiased deviation 1/2), refinements 1 and 0."""
    reward = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    refined = np.array([False] * 4 + [True] * 2)
    expected = np.array([0.75, -0.25, -0.25, -0.25, 0.75, -0.25])
    np.testing.assert_allclose(group_advantages(reward, refined, baseline="responses"), expected)
    scaled = group_advantages(reward, refined, baseline="responses", divide_by_std=True)
    np.testing.assert_allclose(scaled, 2 * expected, rtol=1e-5)
    np.testing.assert_allclose(group_advantages(reward, refined), reward - 1 / 3)


@pytest.mark.parametrize("same", [0.0, 1.0, 0.1, 1 / 3])
def test_responses_that_are_all_alike_have_no_deviation_to_divide_by(same):
    """LUFFY's split: std 0 -> 1. Over 1e-6 a refinement's advantage was a million, which the clip hid; also of a mean
    that is rounded (0.1 x 7). It is counted; a group whose rewards are all alike, or that has a deviation, is not."""
    reward, refined = np.array([same] * 7 + [1.0 - same]), np.array([False] * 7 + [True])
    found = group_advantages(reward, refined, baseline="responses", divide_by_std=True)
    np.testing.assert_allclose(found, [0.0] * 7 + [1.0 - 2 * same], atol=1e-15)

    def undivided(*rewards):
        ids = np.zeros(1, np.int32)
        made = [Attempt(Completion(ids, ids, ids, True), "", r, r == 1, None, "ok") for r in rewards]
        return credit.undivided(Group(PROBLEM, [1], tuple(made[:-1]), (made[-1],), tuple(range(len(made) - 1)), (0,)))

    assert undivided(same, same, 1.0 - same) and not undivided(same, same, same) and not undivided(same, 0.7, 1.0)


def test_weights():
    refined, all_ = np.array([False] * 7 + [True]), np.ones(8, bool)
    np.testing.assert_allclose(group_weights(refined, all_), [1 / 7] * 7 + [1.0])
    np.testing.assert_allclose(group_weights(refined[:7], all_[:7]), [1 / 7] * 7)
    np.testing.assert_allclose(group_weights(refined, all_, weights="uniform"), [1 / 8] * 8)
    np.testing.assert_allclose(group_weights(refined, all_, weights="sum"), [1.0] * 8)


def test_literal_clip_on_the_refined_term():
    """For A < 0 the gradient is 0 below p = gamma (1-eps)/eps = 0.4 and not above (eps 0.2, gamma 0.1)."""

    def gain(logp, adv):
        return objective.surrogate(shaped_probability(logp, 0.1), adv, (0.2, 0.2))

    slope = jax.grad(gain)
    for p in (0.05, 0.2, 0.39):
        assert slope(jnp.log(jnp.float32(p)), jnp.float32(-1.0)) == 0
        assert slope(jnp.log(jnp.float32(p)), jnp.float32(1.0)) > 0
    for p in (0.41, 0.7, 1.0):
        assert slope(jnp.log(jnp.float32(p)), jnp.float32(-1.0)) < 0


def test_the_clip_binds_exactly_where_it_takes_the_gradient():
    ratio, pg = (
        x.ravel() for x in jnp.meshgrid(jnp.array([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0]), jnp.array([-1.0, 0.5]))
    )
    for clip, bound in (((0.2, 0.2), 4), ((0.2, 0.5), 3)):  # 1.21 gains up to 1.5 where the clip is higher
        slope = jax.vmap(jax.grad(lambda r, a, clip=clip: objective.surrogate(r, a, clip)))(ratio, pg)
        np.testing.assert_array_equal(binds(ratio, pg, clip), slope == 0)
        assert binds(ratio, pg, clip).sum() == bound
    assert not binds(ratio, pg, None).any()


# ---- Two groups, with responses and a refinement each ----

LENGTHS = [[6, 3, 5, 4], [1, 6, 2, 3]]
REWARDS = [[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.5]]
REFINED = [False, False, False, True]


def groups():
    """The last of four attempts of a group is a refinement."""

    def attempt(length, reward):
        ones = np.ones(length, np.float32)
        return Attempt(
            Completion(np.arange(length, dtype=np.int32), -ones, ones, True), "", reward, reward == 1, None, "ok"
        )

    made = []
    for lengths, rewards in zip(LENGTHS, REWARDS, strict=True):
        attempts = tuple(map(attempt, lengths, rewards))
        made.append(Group(PROBLEM, [1, 2], attempts[:3], attempts[3:], (0, 1, 2), (0,)))
    return made


def make_logps(rng):
    """Ragged float64 log-probabilities of each row: current, old, reference, and entropies."""
    rows = [length for lengths in LENGTHS for length in lengths]

    def draw():
        return [rng.normal(-1.5, 0.8, n).clip(max=-1e-3) for n in rows]

    return {"logp": draw(), "old": draw(), "ref": draw(), "entropy": [rng.uniform(0, 2, n) for n in rows]}


def transcription(rows, cfg):
    """The loss of the two groups, token by token, in plain Python floats, written from the paper's equations."""
    total, tokens = 0.0, sum(map(sum, LENGTHS))
    for index, (logps, olds, refs, entropies) in enumerate(
        zip(rows["logp"], rows["old"], rows["ref"], rows["entropy"], strict=True)
    ):
        rewards, refined = REWARDS[index // 4], REFINED[index % 4]
        adv = rewards[index % 4] - (sum(rewards[:3]) / 3 if cfg.baseline == "responses" else sum(rewards) / 4)
        if cfg.divide_by_std:
            mean = sum(rewards) / 4
            adv /= (sum((r - mean) ** 2 for r in rewards) / 3) ** 0.5 + 1e-6
        weight = {"per_kind": 1.0 if refined else 1 / 3, "uniform": 1 / 4, "sum": 1.0}[cfg.weights]
        for logp, old, ref, entropy in zip(logps, olds, refs, entropies, strict=True):
            ratio, p = np.exp(logp - old), np.exp(logp)
            value, clip = ratio, cfg.clip_responses
            if refined:
                shapes = {"shaped": p / (p + cfg.gamma), "probability": p, "ratio": ratio, "log_probability": logp}
                shapes |= {"ratio_to_sampler": np.exp(logp + 1.0)}  # the attempts were sampled at log q = -1
                value = shapes[cfg.refined_shape]
                clip = cfg.clip_refinements and cfg.refined_shape != "log_probability"
            gain = value * adv
            if clip:
                gain = min(gain, min(max(value, 1 - cfg.clip_eps), 1 + (cfg.clip_high or cfg.clip_eps)) * adv)
            d = ref - logp
            gain -= cfg.kl_coef * (np.exp(d) - d - 1)
            if cfg.entropy_mean == "as_loss":
                gain += cfg.entropy_coef * entropy
            else:  # the total is divided below
                whole = {"constant": 2 * CONSTANT, "token_mean": tokens, "sequence_mean": 2}[cfg.aggregation]
                total -= cfg.entropy_coef * entropy / tokens * whole
            row = {"constant": weight, "token_mean": 1.0, "sequence_mean": weight / len(logps)}[cfg.aggregation]
            total -= gain * row
    return total / {"constant": 2 * CONSTANT, "token_mean": tokens, "sequence_mean": 2}[cfg.aggregation]


def padded(rows):
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


def to_tokens(cfg, rows):
    """What `credit` makes of the groups, as the arrays that the device sees: a row a segment."""
    made = credit.segments(groups(), cfg, CONSTANT)
    assert [len(s.ids) for s in made] == [n for lengths in LENGTHS for n in lengths]
    return Tokens(
        scored_BT=jnp.asarray(padded([np.ones(len(s.ids), bool) for s in made])),
        refined_BT=jnp.asarray(padded([np.full(len(s.ids), s.refined) for s in made])),
        pg_BT=jnp.asarray(padded([s.pg_T for s in made])),
        ce_BT=jnp.asarray(padded([s.ce_T for s in made])),
        ent_BT=jnp.asarray(padded([s.ent_T for s in made])),
        kl_BT=jnp.asarray(padded([s.kl_T for s in made])),
        sampler_logp_BT=jnp.asarray(padded([s.sampler_logp_T for s in made])),
        old_logp_BT=jnp.asarray(padded(rows["old"])),
        ref_logp_BT=jnp.asarray(padded(rows["ref"])),
    )


CONFIGS = [
    ObjectiveConfig(),
    ObjectiveConfig(aggregation="token_mean", weights="uniform", clip_responses=False, gamma=0.5),
    ObjectiveConfig(aggregation="sequence_mean", refined_shape="ratio", kl_coef=0.1, divide_by_std=True),
    ObjectiveConfig(refined_shape="probability", clip_refinements=False, entropy_coef=0.01, clip_eps=0.1),
    ObjectiveConfig(refined_shape="log_probability", baseline="responses", clip_high=0.4),
    ObjectiveConfig(refined_shape="ratio_to_sampler", clip_eps=0.3, clip_high=0.5),
    ObjectiveConfig(weights="sum", entropy_coef=0.02, entropy_mean="token_mean", clip_eps=0.1, clip_high=0.3),
]


@pytest.mark.parametrize("cfg", CONFIGS)
def test_loss_and_gradient_equal_the_transcription(rng, cfg):
    """Host and device halves together; the gradient by central differences of code that knows no jax, at every token."""
    rows = make_logps(rng)
    with jax.enable_x64(True):
        tokens, entropy_BT = to_tokens(cfg, rows), jnp.asarray(padded(rows["entropy"]))

        def loss(logp_BT):
            return token_loss(logp_BT, entropy_BT, tokens, cfg)[0]

        logp_BT = jnp.asarray(padded(rows["logp"]))
        value, slope_BT = loss(logp_BT), np.asarray(jax.grad(loss)(logp_BT))
    np.testing.assert_allclose(value, transcription(rows, cfg), rtol=1e-9)
    assert np.abs(slope_BT).max() > 1e-3
    for b, logps in enumerate(rows["logp"]):
        for t in range(len(logps)):
            ends = []
            for move in (1e-6, -1e-6):
                moved = [row.copy() for row in rows["logp"]]
                moved[b][t] += move
                ends.append(transcription(rows | {"logp": moved}, cfg))
            np.testing.assert_allclose(slope_BT[b, t], (ends[0] - ends[1]) / 2e-6, atol=1e-8)
        assert (slope_BT[b, len(logps) :] == 0).all()


def test_golden_group_of_seven_and_one():
    """Spec 8.4: rewards 0 x 7 and a correct refinement; 1/7 and 1; divided by the questions and the constant."""
    ids = np.zeros(3, np.int32)
    attempt = [
        Attempt(Completion(ids, ids - 1.0, ids + 1.0, True), "", r, r == 1, None, "ok") for r in [0.0] * 7 + [1.0]
    ]
    group = Group(PROBLEM, [1], tuple(attempt[:7]), (attempt[7],), tuple(range(7)), (0,))
    made = credit.segments([group, group], ObjectiveConfig(), 100.0)
    pg = [s.pg_T[0] * 2 * 100 for s in made[:8]]
    np.testing.assert_allclose(pg, [-0.125 / 7] * 7 + [0.875])
    assert [s.refined for s in made[:8]] == [False] * 7 + [True] and len(made) == 16
    assert all(s.pg_T.dtype == np.float64 and (s.pg_T == s.pg_T[0]).all() for s in made)


def test_golden_rltf_sd():
    """arXiv 2602.02482: the first-turn baseline. Responses 0 x 7, a right refinement: A0 = 1, gradient -A0 grad log p."""
    ids = np.zeros(2, np.int32)
    attempt = [
        Attempt(Completion(ids, ids - 1.0, ids + 1.0, True), "", r, r == 1, None, "ok") for r in [0.0] * 7 + [1.0]
    ]
    group = Group(PROBLEM, [1], tuple(attempt[:7]), (attempt[7],), tuple(range(7)), (0,))
    cfg = ObjectiveConfig(refined_shape="log_probability", baseline="responses")
    made = credit.segments([group], cfg, 10.0)
    assert not any(s.pg_T.any() for s in made) and not any(s.ce_T.any() for s in made[:7])
    np.testing.assert_allclose(made[7].ce_T, [0.1, 0.1])
    tokens = Tokens(jnp.ones((1, 2), bool), jnp.ones((1, 2), bool), jnp.zeros((1, 2)), jnp.asarray(made[7].ce_T)[None])
    slope = jax.grad(lambda logp: token_loss(logp, 0 * logp, tokens, cfg)[0])(jnp.array([[-3.0, -0.1]]))
    np.testing.assert_allclose(slope, [[-0.1, -0.1]], rtol=1e-6)


def cut_short(group, *indices):
    """The group, where the limit cut these of its rows."""
    rows = [*group.responses, *group.refinements]
    for i in indices:
        rows[i] = dataclasses.replace(rows[i], completion=rows[i].completion._replace(finished=False))
    return dataclasses.replace(group, responses=tuple(rows[:3]), refinements=tuple(rows[3:]))


MASKED = [
    {},
    {"weights": "uniform"},
    {"weights": "sum"},
    {"aggregation": "sequence_mean"},
    {"aggregation": "token_mean", "weights": "uniform"},
    {"entropy_mean": "token_mean"},
]


@pytest.mark.parametrize("changes", MASKED)
def test_rows_that_the_limit_cut_may_have_no_loss(changes):
    """They stay in the baseline, and nothing of the loss counts them: it is that of the rows that are left, alone.

    The first question loses a response (of 6 tokens) and its refinement, a third one all of its rows.
    """
    cfg = ObjectiveConfig(entropy_coef=0.1, kl_coef=0.2, overlong="mask", **changes)
    first, second = groups()
    made = [cut_short(first, 0, 3), second, cut_short(groups()[0], 0, 1, 2, 3)]
    masked = credit.segments(made, cfg, CONSTANT)
    assert [s.silent for s in masked] == [True, False, False, True] + [False] * 4 + [True] * 4
    left = dataclasses.replace(first, kept=(1, 2), selected=())
    alone = credit.segments([left, second], dataclasses.replace(cfg, overlong="train"), CONSTANT)
    weighted = [s for s in masked if not s.silent]
    for one, other in zip(weighted, alone, strict=True):
        np.testing.assert_allclose(one.kl_T, other.kl_T, rtol=1e-12)
        np.testing.assert_allclose(one.ent_T, other.ent_T, rtol=1e-12)
    advantages = [s.pg_T[0] / s.kl_T[0] * 0.2 for s in weighted]
    np.testing.assert_allclose(advantages[:2], [-0.25, -0.25])  # of the whole group: its right refinement was cut


def test_correction_by_what_the_sampler_was():
    """Two segments in a row, worked by hand: ratios 3, 1/2, 1 (geometric mean 1.145) and 4, 4 (4)."""
    sampler = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.1, 0.1, 0.5]]))
    logp = jnp.log(jnp.array([[0.3, 0.2, 0.3, 0.4, 0.4, 0.9]]))
    tokens = Tokens(
        scored_BT=jnp.array([[True, True, True, True, True, False]]), refined_BT=jnp.zeros((1, 6), bool),
        pg_BT=jnp.ones((1, 6)), sampler_logp_BT=sampler, segment_BT=jnp.array([[1, 1, 1, 2, 2, 0]]),
    )  # fmt: skip
    for how, weight in (("none", [1, 1, 1, 1, 1]), ("token", [2, 0.5, 1, 2, 2]), ("sequence", [1, 1, 1, 0, 0])):
        cfg = ObjectiveConfig(correction=how, correction_limit=2.0)
        slope = jax.grad(lambda x, cfg=cfg: token_loss(x, 0 * x, tokens, cfg)[0])(logp)
        np.testing.assert_allclose(slope, [[-w for w in weight] + [0]], rtol=1e-5)
    _, sums = token_loss(logp, 0 * logp, tokens, ObjectiveConfig(correction="token"))
    np.testing.assert_allclose(sums["correction"], 7.5, rtol=1e-5)
    refined = tokens._replace(refined_BT=jnp.ones((1, 6), bool))  # they have no ratio to what they were sampled from
    values = [token_loss(logp, 0 * logp, refined, ObjectiveConfig(correction=how))[0] for how in ("none", "token")]
    assert values[0] == values[1]


@pytest.mark.parametrize(("drift", "kept"), [(0.04, 1.0), (-0.04, 1.0), (0.06, 0.0), (-0.06, 0.0)])
def test_a_sequence_that_drifts_a_little_at_each_token_is_left_out(drift, kept):
    """The limit of a geometric mean is no limit of one token: 0.06 nats a token are e^6 in a hundred tokens."""
    logp = jnp.full((1, 100), -1.0)
    tokens = Tokens(
        scored_BT=jnp.ones((1, 100), bool), refined_BT=jnp.zeros((1, 100), bool), pg_BT=jnp.ones((1, 100)),
        sampler_logp_BT=logp - drift, segment_BT=jnp.ones((1, 100), jnp.int32),
    )  # fmt: skip
    _, sums = token_loss(logp, 0 * logp, tokens, ObjectiveConfig(correction="sequence"))
    assert sums["correction"] == 100 * kept
    _, sums = token_loss(logp, 0 * logp, tokens, ObjectiveConfig(correction="token"))
    np.testing.assert_allclose(sums["correction"], 100 * np.exp(drift), rtol=1e-5)


def test_what_each_row_depends_on(rng):
    """Refined tokens ignore old log-probs; the others ignore gamma."""
    rows, cfg = make_logps(rng), ObjectiveConfig()
    tokens, entropy_BT = to_tokens(cfg, rows), jnp.asarray(padded(rows["entropy"]), jnp.float32)
    logp_BT = jnp.asarray(padded(rows["logp"]), jnp.float32)

    def loss(kept_BT, cfg=cfg, shift=0.0):
        chosen = tokens._replace(scored_BT=tokens.scored_BT & kept_BT, old_logp_BT=tokens.old_logp_BT - shift)
        return float(token_loss(logp_BT, entropy_BT, chosen, cfg)[0])

    refined_BT, other = tokens.refined_BT, ObjectiveConfig(gamma=0.7)
    assert loss(refined_BT) == loss(refined_BT, shift=0.3) and loss(~refined_BT) != loss(~refined_BT, shift=0.3)
    assert loss(~refined_BT) == loss(~refined_BT, other) and loss(refined_BT) != loss(refined_BT, other)


def test_first_update_is_reinforce_with_baseline(rng):
    """With no old log-probs the ratio is 1: loss = -pg per token, gradient -pg grad log p."""
    rows = make_logps(rng)
    tokens = to_tokens(ObjectiveConfig(), rows)
    tokens = tokens._replace(old_logp_BT=None, ref_logp_BT=None, refined_BT=jnp.zeros_like(tokens.refined_BT))

    def loss(logp_BT):
        return token_loss(logp_BT, jnp.zeros_like(logp_BT), tokens, ObjectiveConfig())[0]

    logp_BT = jnp.asarray(padded(rows["logp"]), jnp.float32)
    np.testing.assert_allclose(loss(logp_BT), -tokens.pg_BT.sum(), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(jax.grad(loss)(logp_BT), -tokens.pg_BT, rtol=1e-5)


def test_supervised_segments_are_the_mean_negative_log_likelihood(rng):
    made = credit.supervised([([1], np.arange(n, dtype=np.int32)) for n in (3, 5)])
    logp = [rng.normal(size=n) for n in (3, 5)]
    tokens = Tokens(
        scored_BT=jnp.asarray(padded([np.ones(n, bool) for n in (3, 5)])), refined_BT=jnp.zeros((2, 5), bool),
        pg_BT=jnp.zeros((2, 5)), ce_BT=jnp.asarray(padded([s.ce_T for s in made])),
    )  # fmt: skip
    loss, _ = token_loss(jnp.asarray(padded(logp), jnp.float32), jnp.zeros((2, 5)), tokens, ObjectiveConfig())
    np.testing.assert_allclose(loss, -np.concatenate(logp).mean(), rtol=1e-5)
    assert not any(s.silent for s in made)


def test_k3_is_plain_up_to_its_limit_and_what_is_clamped_is_counted():
    """Without a limit value and slope at 19.9 are those of the formula; the release's limit is in test_release.py."""
    for d in (-19.9, -3.0, 0.0, 3.0, 12.0, 19.9):
        value, slope = jax.value_and_grad(lambda logp, d=d: k3(logp, jnp.float32(d), 0.0)[0])(jnp.float32(0.0))
        np.testing.assert_allclose(value, np.exp(d) - d - 1, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(slope, 1 - np.exp(d), rtol=1e-5, atol=1e-6)
    one = jnp.ones((1, 4))
    tokens = Tokens(
        scored_BT=jnp.array([[True, True, True, False]]), refined_BT=jnp.zeros((1, 4), bool), pg_BT=0 * one, kl_BT=one,
        ref_logp_BT=jnp.array([[25.0, 5.0, -30.0, 50.0]]),
    )  # fmt: skip
    _, sums = token_loss(0 * one, one, tokens, ObjectiveConfig(kl_coef=1.0))
    assert sums["kl_clamped"] == 2
    for limit, clamped in ((10.0, 3), (150.0, 2)):  # k3 at 5 is 142.4
        loss, sums = token_loss(0 * one, one, tokens, ObjectiveConfig(kl_coef=1.0, kl_limit=limit))
        assert sums["kl_clamped"] == clamped and loss <= 3 * limit


def test_extreme_log_probs_give_finite_values():
    for cfg in CONFIGS:
        far = -200.0 * jnp.ones((1, 3))
        tokens = Tokens(
            scored_BT=jnp.ones((1, 3), bool), refined_BT=jnp.array([[False, True, True]]),
            pg_BT=jnp.array([[1.0, -1.0, 1.0]]), kl_BT=0.1 * jnp.ones((1, 3)),
            old_logp_BT=0 * far, ref_logp_BT=0 * far, sampler_logp_BT=0 * far,
        )  # fmt: skip
        (value, sums), slope = jax.value_and_grad(lambda x, t=tokens, c=cfg: token_loss(x, -x, t, c), has_aux=True)(far)
        assert np.isfinite(value) and np.isfinite(slope).all() and sums["nonfinite_tokens"] == 0
        _, sums = token_loss(far * jnp.array([[1.0, np.nan, np.inf]]), far, tokens, cfg)
        assert sums["nonfinite_tokens"] == 2


def test_the_entropy_of_what_was_sampled_is_measured_whatever_is_trained():
    """Each outcome as often as its probability: minus the mean of the logarithms is the entropy, of each kind apart.

    Under top-p it is that of what was left to draw from; a text that the policy did not sample has none.
    """

    def made(probs, kept, **changes):
        prob = np.repeat(np.array(probs, np.float32), [round(16 * p) for p in np.array(probs) / kept])
        done = Completion(np.zeros(len(prob), np.int32), np.log(prob), np.full(len(prob), kept, np.float32), True)
        return Attempt(done, "", 0.0, False, None, "ok", **changes)

    def entropy(probs):
        return -sum(p * np.log(p) for p in probs)

    responses = (made([0.5, 0.25, 0.25], 1.0), made([0.5, 0.25, 0.25], 1.0))
    refinements = (made([0.25, 0.125, 0.125], 0.5, prompt_ids=[1]), made([0.5, 0.5], 1.0))
    group = Group(PROBLEM, [1], responses, refinements, (), ())  # nothing of it is trained on
    values = group_metrics([group])
    np.testing.assert_allclose(values["policy/entropy"], entropy([0.5, 0.25, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(values["policy/entropy_refinements"], entropy([0.5, 0.25, 0.25]), rtol=1e-6)
