"""The update: split invariance, log-probabilities, optimizer, non-finite gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from cgrpo_jax.learning.packing import Prompted, Row, make_batch
from cgrpo_jax.learning.update import LearnerConfig, init_state, make_logps, make_optimizer, make_update, put_batch
from cgrpo_jax.model.decoder import forward, init_params, logits
from cgrpo_jax.options import ObjectiveConfig, OptimizerConfig
from cgrpo_jax.sampling.sizes import ladder

MODEL = tiny_config("qwen3")
CFG = LearnerConfig(
    MODEL, ObjectiveConfig(), OptimizerConfig(learning_rate=1e-2), temperature=0.7, loss_constant=10.0, total_updates=10,
    dtype=jnp.float32, remat="dots",
)  # fmt: skip


@pytest.fixture
def params():
    return init_params(MODEL, jax.random.key(0))


def problems(rng, count=4):
    """Problems of three or four rows of different lengths; the last of each is a refinement."""

    def row(g):
        length = int(rng.integers(2, 9))
        ids = rng.integers(0, MODEL.vocab, length).astype(np.int32)
        return Row(ids, np.full(length, -1.0, np.float32), float(rng.normal()), 0.25, g == 3)

    def problem(p):
        return Prompted(list(rng.integers(0, MODEL.vocab, rng.integers(3, 9))), [row(g) for g in range(4 - p % 2)])

    return [problem(p) for p in range(count)]


def to_batch(data, micro_batch=2, rows_per_prompt=4):
    return make_batch(data, rows_per_prompt=rows_per_prompt, micro_batch=micro_batch)


def run_update(cfg, mesh, params, batch, steps=1):
    state = init_state(cfg, mesh, jax.tree.map(jnp.copy, params))
    update = make_update(cfg, mesh, params)
    for _ in range(steps):
        state, scalars = update(state, put_batch(mesh, batch))
    return state, {name: float(value) for name, value in scalars.items()}


@pytest.mark.parametrize("aggregation", ["constant", "token_mean", "sequence_mean"])
def test_the_micro_batch_split_changes_nothing(mesh, params, rng, aggregation):
    """1 x 8 = 8 x 1 = 2 x 4 problems, in the gradient norm, the metrics and the gradient itself."""
    objective = ObjectiveConfig(aggregation=aggregation, entropy_coef=0.01)
    cfg = dataclasses.replace(CFG, objective=objective, optimizer=OptimizerConfig(learning_rate=1e-2, clip_norm=1e9))
    data = problems(rng, 8)
    results = [run_update(cfg, mesh, params, to_batch(data, size)) for size in (8, 4, 1)]
    for state, scalars in results[1:]:
        for name, value in results[0][1].items():
            np.testing.assert_allclose(scalars[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
        mu = lambda s: jax.tree.leaves(s.opt_state.inner_state[1][0].mu)
        for one, other in zip(mu(results[0][0]), mu(state), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_micro_batches_without_an_advantage_are_only_measured(mesh, params, rng):
    """The same metrics and gradient as where each runs a backward pass (which an entropy term asks for)."""
    data = problems(rng)
    silent = [row._replace(advantage=0.0) for row in data[2].rows]
    data[2:] = [Prompted(data[2].prompt_ids, silent)] * 2
    cfg = dataclasses.replace(CFG, optimizer=OptimizerConfig(learning_rate=1e-2, clip_norm=1e9))
    all_run = dataclasses.replace(cfg, objective=ObjectiveConfig(entropy_coef=1e-30))
    (state, sums), (other, expected) = (run_update(c, mesh, params, to_batch(data)) for c in (cfg, all_run))
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    for one, two in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    branches = lambda c: make_update(c, mesh, params).lower(state, to_batch(data)).as_text().count("stablehlo.case")
    assert branches(cfg) > branches(all_run)


def test_filling_rows_change_nothing(mesh, params, rng):
    data = problems(rng)
    exact = run_update(CFG, mesh, params, to_batch(data))[1]
    filled = run_update(CFG, mesh, params, to_batch(data, rows_per_prompt=7))[1]
    for name, value in exact.items():
        np.testing.assert_allclose(filled[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_log_probs_equal_the_plain_computation(mesh, params, rng, monkeypatch):
    """A prompt run once for its rows, logits chunked over time: as if each row had been run alone."""
    monkeypatch.setattr("cgrpo_jax.learning.update.LOGIT_ENTRIES", 8 * MODEL.vocab * 2)  # two time steps at once
    data = problems(rng)
    got = np.asarray(make_logps(CFG, mesh)(params, put_batch(mesh, to_batch(data)))).reshape(4, 4, -1)
    run = jax.jit(lambda params, ids: logits(MODEL, params, forward(MODEL, params, ids, jnp.zeros(1, jnp.int32))[0]))
    for p, item in enumerate(data):
        for g, row in enumerate(item.rows):
            ids = jnp.asarray([*item.prompt_ids, *row.ids], jnp.int32)[None]
            logp = jax.nn.log_softmax(run(params, ids)[0] / 0.7, axis=-1)
            expected = logp[np.arange(len(item.prompt_ids) - 1, ids.shape[1] - 1), row.ids]
            np.testing.assert_allclose(got[p, g, : len(row.ids)], expected, atol=1e-5)


def test_gradients_equal_those_of_separate_rows(mesh, params, rng):
    """What the rows of a problem send back through their common prompt adds up."""
    data = problems(rng)
    alone = [Prompted(item.prompt_ids, [row]) for item in data for row in item.rows]
    one = run_update(CFG, mesh, params, to_batch(data))
    batch = to_batch(alone, micro_batch=len(alone), rows_per_prompt=1)
    other = run_update(CFG, mesh, params, batch._replace(groups=np.float32(4)))
    mu = lambda result: jax.tree.leaves(result[0].opt_state.inner_state[1][0].mu)
    for a, b in zip(mu(one), mu(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(one[1]["grad_norm"], other[1]["grad_norm"], rtol=1e-5)


def test_no_array_of_all_logits_exists(mesh, params):
    """The compiled update of a large vocabulary needs far less memory than one [B, T, V] array."""
    model = tiny_config("qwen3", vocab=40_000)
    cfg = dataclasses.replace(CFG, model=model)
    big = init_params(model, jax.random.key(0))
    row = Row(np.arange(96, dtype=np.int32), np.zeros(96, np.float32), 1.0, 1.0, False)
    batch = put_batch(mesh, to_batch([Prompted([1, 2, 3], [row] * 8)] * 4, 4, 8))
    state = init_state(cfg, mesh, big)
    memory = make_update(cfg, mesh, big).lower(state, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.8 * 32 * 96 * 40_000 * 4


def test_old_log_probs_of_the_same_policy_change_nothing(mesh, params, rng):
    batch = to_batch(problems(rng))
    device = put_batch(mesh, batch)
    old = np.asarray(make_logps(CFG, mesh)(params, device))
    one = run_update(CFG, mesh, params, batch)[1]
    other = run_update(CFG, mesh, params, batch._replace(old_logp_ABT=old))[1]
    np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=1e-4)
    moved = run_update(CFG, mesh, params, batch._replace(old_logp_ABT=old - 0.5))[1]
    assert one["clipped"] == other["clipped"] == 0 and moved["clipped"] == moved["response_tokens"]


def test_an_update_raises_the_probability_of_what_was_good(mesh, params, rng):
    better = lambda item, sign: item._replace(rows=[row._replace(advantage=sign, refined=False) for row in item.rows])
    batch = to_batch([better(item, 1.0 if p < 2 else -1.0) for p, item in enumerate(problems(rng))])
    logps = make_logps(CFG, mesh)
    before = np.asarray(logps(params, put_batch(mesh, batch)))
    state, _ = run_update(CFG, mesh, params, batch, steps=3)
    after = np.asarray(logps(state.params, put_batch(mesh, batch)))
    mask = np.arange(before.shape[-1])[None, None] < batch.length_AB[..., None]
    gain = np.where(mask, after - before, 0).sum(-1)[batch.length_AB > 0]
    assert (gain[:7] > 0).all() and (gain[7:] < 0).all()


def test_a_non_finite_gradient_changes_nothing_and_is_counted(mesh, params, rng):
    batch = to_batch(problems(rng))
    bad = batch._replace(adv_AB=np.full_like(batch.adv_AB, np.nan))
    state = init_state(CFG, mesh, jax.tree.map(jnp.copy, params))
    update = make_update(CFG, mesh, params)
    state, scalars = update(state, put_batch(mesh, bad))
    state, scalars = update(state, put_batch(mesh, bad))
    assert scalars["notfinite_in_a_row"] == 2 and not np.isfinite(scalars["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    state, scalars = update(state, put_batch(mesh, batch))
    assert scalars["notfinite_in_a_row"] == 0 and scalars["notfinite_total"] == 2
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True))


def test_schedule_decay_and_clip():
    """AdamW by hand: the first step moves every weight by the learning rate, and only matrices decay."""
    params = {"a": {"kernel": jnp.full((2, 2), 3.0)}, "b": {"scale": jnp.full(2, 3.0)}}
    grads = jax.tree.map(lambda x: 1e3 * jnp.ones_like(x), params)
    cfg = OptimizerConfig(learning_rate=0.1, warmup_updates=1, weight_decay=0.5, schedule="cosine", final_fraction=0.1)
    tx = make_optimizer(cfg, total_updates=5)
    state, moves = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update(grads, state, params)
        moves.append((float(updates["a"]["kernel"][0, 0]), float(updates["b"]["scale"][0])))
    rates = [0.05, 0.1] + [0.1 * (0.1 + 0.9 * (1 + np.cos(np.pi * i / 4)) / 2) for i in (1, 2, 3, 4)]
    np.testing.assert_allclose([b for _, b in moves], [-r for r in rates], rtol=1e-4)
    np.testing.assert_allclose([a for a, _ in moves], [-r * (1 + 0.5 * 3.0) for r in rates], rtol=1e-4)


def test_ladder_bounds_the_shapes():
    assert [ladder(n) for n in (1, 64, 65, 97, 128, 129)] == [64, 64, 80, 112, 128, 160]
    sizes = {ladder(n) for n in range(1, 8193)}
    assert len(sizes) < 32 and all(n <= ladder(n) < max(65, 1.25 * n + 8) for n in range(1, 8193))
