"""The update: bins, layouts and splits change nothing; log-probabilities, optimizer, non-finite gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from plain_forward import forward

from cgrpo_jax.config.options import ObjectiveConfig, OptimizerConfig
from cgrpo_jax.errors import TrainingError
from cgrpo_jax.learning import update as learning
from cgrpo_jax.learning.finite import nonfinite_steps
from cgrpo_jax.learning.packing import Terms, bin_size, pack
from cgrpo_jax.learning.update import Learner, make_logps, make_optimizer, make_update, put_bins
from cgrpo_jax.model import sharding
from cgrpo_jax.model.decoder import init_params, logits
from cgrpo_jax.model.sharding import joined
from cgrpo_jax.records import Segment

MODEL = tiny_config("qwen3")
CFG = Learner(
    MODEL, ObjectiveConfig(), OptimizerConfig(learning_rate=1e-2, clip_norm=1e9), temperature=0.7, total_updates=10,
    dtype=jnp.float32, remat="dots",
)  # fmt: skip
NO_TERMS = Terms()


@pytest.fixture(scope="module")
def params(mesh):
    """Where a run has them: a program compiled for arrays that lie nowhere yet would be another one."""
    params = init_params(MODEL, jax.random.key(0))
    return jax.device_put(params, sharding.param_shardings(mesh, params))


def segments(rng, problems=4, ent=0.0):
    """Problems of three or four rows of different lengths; the fourth is a refinement."""
    made = []
    for p in range(problems):
        prompt = rng.integers(0, MODEL.vocab, rng.integers(1, 9)).tolist()
        for g in range(4 - p % 2):
            length = int(rng.integers(2, 9))
            ids, ones = rng.integers(0, MODEL.vocab, length).astype(np.int32), np.ones(length)
            pg_T = rng.normal() * ones / 100
            made.append(Segment(prompt, ids, g == 3, pg_T, 0 * ones, ent * ones, 0 * ones, np.float32(-ones)))
    return made


def to_bins(made, share=True, at_once=2, terms=NO_TERMS):
    size = bin_size(
        share=share, problems=8, group=4, at_once=at_once, row_devices=1, longest_prompt=9, longest_ids=9
    )  # fmt: skip
    return pack(made, size, terms)


def run_update(cfg, mesh, params, bins, steps=1, frozen=None):
    state = learning.init_state(cfg, mesh, jax.tree.map(jnp.copy, params))
    update = make_update(cfg, mesh, params)
    for _ in range(steps):
        state, scalars = update(state, frozen or {}, put_bins(mesh, bins))
    return state, {name: float(value) for name, value in scalars.items()}


def gradient(state):
    """Adam's first moment after one update: a tenth of the gradient."""
    return jax.tree.leaves(state.opt_state.inner_state[1][0].mu)


def assert_same(one, other):
    for name, value in one[1].items():
        np.testing.assert_allclose(other[1][name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    for a, b in zip(gradient(one[0]), gradient(other[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7 + 2e-5 * np.abs(a).max())


@pytest.mark.thorough
def test_neither_bins_nor_layout_change_anything(mesh, params, rng):
    """1, 2, 4 or 8 problems at once, prompts shared or each row with its own: gradient and metrics."""
    made = segments(rng, 8, ent=1e-4)
    terms = Terms(ent=True)
    reference = run_update(CFG, mesh, params, to_bins(made, terms=terms, at_once=8))
    assert reference[1]["tokens"] == sum(len(s.ids) for s in made) and reference[1]["grad_norm"] > 1e-3
    for share, at_once in [(True, 1), (False, 2), (False, 8)]:
        assert_same(reference, run_update(CFG, mesh, params, to_bins(made, share, at_once, terms)))


def test_gradients_equal_those_of_rows_run_alone(mesh, params, rng):
    """Each segment differentiated by itself, by a plain forward over prompt and ids (of one length: one program)."""
    made = []
    for s in segments(rng):
        ids = rng.integers(0, MODEL.vocab, 6).astype(np.int32)
        ones = np.ones(6)
        made.append(
            Segment((s.prompt_ids * 5)[:5], ids, False, s.pg_T[0] * ones, 0 * ones, 0 * ones, 0 * ones, ids - 1.0)
        )

    @jax.jit
    def slope(params, text, pg_T):
        def loss(params):
            prompt = len(text) - len(pg_T)
            logp_TV = jax.nn.log_softmax(logits(MODEL, params, forward(MODEL, params, text[None]))[0] / 0.7, axis=-1)
            logp_T = logp_TV[np.arange(prompt - 1, len(text) - 1), text[prompt:]]
            return -(pg_T * jnp.exp(logp_T - jax.lax.stop_gradient(logp_T))).sum()

        return jax.grad(loss)(params)

    total = jax.tree.map(jnp.zeros_like, params)
    for s in made:
        own = slope(params, jnp.asarray([*s.prompt_ids, *s.ids.tolist()], jnp.int32), jnp.asarray(s.pg_T, jnp.float32))
        total = jax.tree.map(jnp.add, total, own)
    state, _ = run_update(CFG, mesh, params, to_bins(made))
    for a, b in zip(gradient(state), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(a, b / 10, atol=1e-7 + 2e-5 * np.abs(b).max())


def test_segments_without_weight_change_nothing(mesh, params, rng):
    """The update of them alone is that of a zero gradient: no bin, and the optimizer's own decay."""
    made = segments(rng)
    silent = [s._replace(pg_T=0 * s.pg_T) for s in made[4:]]
    assert_same(
        run_update(CFG, mesh, params, to_bins(made[:4])), run_update(CFG, mesh, params, to_bins(made[:4] + silent))
    )
    state, scalars = run_update(CFG, mesh, params, to_bins(silent))
    assert scalars["grad_norm"] == scalars["tokens"] == scalars["loss"] == scalars["notfinite_total"] == 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        before = params
        for part in path:
            before = before[part.key]
        decayed = before * (1 - 1e-2 * 0.01) if path[-1].key in ("kernel", "embedding") else before
        np.testing.assert_allclose(leaf, decayed, rtol=1e-6)


def test_an_update_gives_up_the_memory_of_the_state_before(mesh, params, rng):
    """Without donation a step holds parameters and moments twice."""
    before = learning.init_state(CFG, mesh, jax.tree.map(jnp.copy, params))
    make_update(CFG, mesh, params)(before, {}, put_bins(mesh, to_bins(segments(rng))))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if leaf.ndim)


def test_one_program_serves_any_number_of_bins(mesh, params, rng):
    update = make_update(CFG, mesh, params)
    state = learning.init_state(CFG, mesh, jax.tree.map(jnp.copy, params))
    for count in (0, 1, 3, 8):
        state, _ = update(state, {}, put_bins(mesh, to_bins(segments(rng, count), at_once=1)))
    assert update._cache_size() == 1


def test_log_probs_equal_the_plain_computation(mesh, params, rng):
    """A prompt run once for its rows, logits in chunks of the vocabulary: as if each row had been run alone."""
    cfg = dataclasses.replace(CFG, logit_entries=1)
    made = segments(rng)

    @jax.jit
    def plain(params, ids):
        return jax.nn.log_softmax(logits(MODEL, params, forward(MODEL, params, ids))[0] / 0.7, axis=-1)

    expected = {}
    for s in made:
        text = jnp.asarray([*s.prompt_ids, *s.ids.tolist()], jnp.int32)
        where = np.arange(len(s.prompt_ids) - 1, len(text) - 1)
        expected[tuple(text.tolist())] = np.asarray(plain(params, text[None]))[where, s.ids]
    for share in (True, False):
        bins = to_bins(made, share)
        logp_ABT = np.asarray(make_logps(cfg, mesh)(params, put_bins(mesh, bins)))
        got = np.sort(logp_ABT[bins.scored_ABT])
        np.testing.assert_allclose(got, np.sort(np.concatenate(list(expected.values()))), atol=1e-5)


def test_no_array_of_all_logits_exists(mesh):
    """The compiled update of a large vocabulary needs far less memory than one [B, T, V] array."""
    model = tiny_config("qwen3", vocab=40_000)
    cfg = dataclasses.replace(CFG, model=model)
    big = init_params(model, jax.random.key(0))
    ones = np.ones(96)
    made = [Segment([1, 2, p], np.arange(96, dtype=np.int32), False, ones, ones, ones, ones, np.float32(ones))
            for p in range(4) for _ in range(8)]  # fmt: skip
    size = bin_size(
        share=True, problems=4, group=8, at_once=4, row_devices=1, longest_prompt=3, longest_ids=96
    )  # fmt: skip
    bins = put_bins(mesh, pack(made, size, NO_TERMS))
    state = learning.init_state(cfg, mesh, big)
    memory = make_update(cfg, mesh, big).lower(state, {}, bins).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.8 * 32 * 96 * 40_000 * 4


def test_old_log_probs_of_the_same_policy_change_nothing(mesh, params, rng):
    bins = to_bins(segments(rng))
    old = np.asarray(make_logps(CFG, mesh)(params, put_bins(mesh, bins)))
    one = run_update(CFG, mesh, params, bins)[1]
    other = run_update(CFG, mesh, params, bins._replace(old_logp_ABT=old))[1]
    np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=1e-4)
    assert one["clipped"] == other["clipped"] == 0


def test_clipped_tokens_respect_the_sign_and_the_kind(mesh, params, rng):
    """Ratios of exp(0.5): gains are clipped, losses are not; refinements are counted apart, by their own x."""
    made = segments(rng)
    bins = to_bins(made)
    old = np.asarray(make_logps(CFG, mesh)(params, put_bins(mesh, bins)))
    scalars = run_update(CFG, mesh, params, bins._replace(old_logp_ABT=old - 0.5))[1]
    assert scalars["clipped"] == sum(len(s.ids) for s in made if not s.refined and s.pg_T[0] > 0) > 0
    down = run_update(CFG, mesh, params, bins._replace(old_logp_ABT=old + 0.5))[1]
    assert down["clipped"] == sum(len(s.ids) for s in made if not s.refined and s.pg_T[0] < 0) > 0
    # p is near 1/211 everywhere, so rho is far below 1 - eps: each refined token with a loss is clipped
    losses = sum(len(s.ids) for s in made if s.refined and s.pg_T[0] < 0)
    assert scalars["refined_clipped"] == down["refined_clipped"] == losses


def test_an_update_raises_the_probability_of_what_was_good(mesh, params, rng):
    made = [s._replace(refined=False, pg_T=np.sign(s.pg_T) / 100) for s in segments(rng)]
    bins = to_bins(made)
    logps = make_logps(CFG, mesh)
    before = np.asarray(logps(params, put_bins(mesh, bins)))
    state, _ = run_update(CFG, mesh, params, bins, steps=3)
    after = np.asarray(logps(state.params, put_bins(mesh, bins)))
    for sign in (1, -1):
        chosen = bins.scored_ABT & (np.sign(bins.pg_ABT) == sign)
        assert sign * (after - before)[chosen].sum() > 0


def test_what_is_frozen_is_neither_changed_nor_donated(mesh, params, rng):
    """The gradient of the rest is as if everything were trained."""
    bins = put_bins(mesh, to_bins(segments(rng)))
    frozen = {"embed": jax.tree.map(jnp.copy, params["embed"])}
    trained = {name: part for name, part in params.items() if name != "embed"}
    assert jax.tree.structure(joined(trained, frozen)) == jax.tree.structure(params)
    whole, _ = run_update(CFG, mesh, params, bins)
    part, _ = run_update(CFG, mesh, trained, bins, frozen=frozen)
    jax.tree.map(np.testing.assert_array_equal, frozen["embed"], params["embed"])
    expected = jax.tree.leaves({n: m for n, m in whole.opt_state.inner_state[1][0].mu.items() if n != "embed"})
    for a, b in zip(gradient(part), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7 + 1e-5 * np.abs(b).max())


@pytest.mark.parametrize("value", [np.nan, 1e26])
def test_a_non_finite_gradient_changes_nothing_and_is_counted(mesh, params, rng, value):
    """Not a number, and finite but so large that its norm overflows: clipping by that would make zeros of it."""
    bins = to_bins(segments(rng))
    bad = bins._replace(pg_ABT=np.full_like(bins.pg_ABT, value))
    state = learning.init_state(CFG, mesh, jax.tree.map(jnp.copy, params))
    update = make_update(CFG, mesh, params)
    state, scalars = update(state, {}, put_bins(mesh, bad))
    state, scalars = update(state, {}, put_bins(mesh, bad))
    assert scalars["notfinite_in_a_row"] == 2 and not np.isfinite(scalars["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert all(np.isfinite(leaf).all() and not leaf.any() for leaf in jax.tree.leaves(state.opt_state.inner_state))
    state, scalars = update(state, {}, put_bins(mesh, bins))
    assert scalars["notfinite_in_a_row"] == 0 and scalars["notfinite_total"] == 2
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True))


def test_non_finite_steps_are_counted_by_what_they_were():
    assert nonfinite_steps(1, 3, {"gradients": 0, "sampled log-probabilities": 0}) == 0
    assert nonfinite_steps(1, 3, {"gradients": 0, "sampled log-probabilities": 7}) == 2
    with pytest.raises(TrainingError, match=r"step 4: 3 steps in a row were not finite, in this one 7 sampled log"):
        nonfinite_steps(2, 4, {"gradients": 0, "sampled log-probabilities": 7})


def test_schedule_decay_and_clip():
    """AdamW by hand: the first step moves every weight by the learning rate; norms and biases (Qwen2) do not decay."""
    three = jnp.full(2, 3.0)
    params = {"a": {"kernel": jnp.full((2, 2), 3.0)}, "b": {"scale": three}, "c": {"bias": three}}
    grads = jax.tree.map(lambda x: 1e3 * jnp.ones_like(x), params)
    cfg = OptimizerConfig(learning_rate=0.1, warmup_updates=1, weight_decay=0.5, schedule="cosine", final_fraction=0.1)
    tx = make_optimizer(cfg, total_updates=5)
    state, moves = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update(grads, state, params)
        moves.append((float(updates["a"]["kernel"][0, 0]), float(updates["b"]["scale"][0])))
        assert (updates["c"]["bias"] == updates["b"]["scale"]).all()
    rates = [0.05, 0.1] + [0.1 * (0.1 + 0.9 * (1 + np.cos(np.pi * i / 4)) / 2) for i in (1, 2, 3, 4)]
    np.testing.assert_allclose([b for _, b in moves], [-r for r in rates], rtol=1e-4)
    np.testing.assert_allclose([a for a, _ in moves], [-r * (1 + 0.5 * 3.0) for r in rates], rtol=1e-4)


def test_bfloat16_stays_near_float32(mesh, params, rng):
    """Log-probabilities of the trained tokens, and the direction of the gradient (bounds: twice what was measured)."""
    made = segments(rng)
    bins = to_bins(made)
    half = dataclasses.replace(CFG, dtype=jnp.bfloat16)
    one, other = (
        np.asarray(make_logps(cfg, mesh)(params, put_bins(mesh, bins)))[bins.scored_ABT] for cfg in (CFG, half)
    )
    assert np.abs(one - other).mean() < 0.02 and np.abs(one - other).max() < 0.1
    full, rounded = (run_update(cfg, mesh, params, bins)[0] for cfg in (CFG, half))
    a, b = (np.concatenate([np.ravel(x) for x in gradient(state)]) for state in (full, rounded))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99
