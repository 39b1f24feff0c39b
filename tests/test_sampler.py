"""The sampler: distributions, random numbers, stopping, log-probabilities, compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from cgrpo_jax.model import forward, init_params, logits
from cgrpo_jax.sampler import SamplingConfig, categorical, draw, first_above, keep_top, row_keys, sample

CFG = tiny_config("qwen3")


@pytest.fixture(scope="module")
def params():
    """Weights large enough that the distribution is far from uniform."""
    return jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, init_params(CFG, jax.random.key(0)))


def names(kind, problems, samples):
    return jnp.array([(kind, p, g) for p in problems for g in samples], jnp.int32)


def run(params, prompts, name_B3, *, sampling, eos=(), seed=0, step=0, slots=None):
    slots = slots or max(map(len, prompts))
    prompt_BT = np.zeros((len(prompts), slots), np.int32)
    for row, ids in enumerate(prompts):
        prompt_BT[row, slots - len(ids) :] = ids
    start_B = jnp.array([slots - len(ids) for ids in prompts], jnp.int32)
    keys = row_keys(jnp.uint32(seed), jnp.int32(step), name_B3)
    wanted_B = jnp.ones(len(prompts), bool)
    out = sample(
        params, jnp.asarray(prompt_BT), start_B, jnp.arange(len(prompts)), wanted_B, keys, jnp.array(eos, jnp.int32),
        cfg=CFG, sampling=sampling, dtype=jnp.float32,
    )  # fmt: skip
    return jax.device_get(out)


SAMPLING = SamplingConfig(temperature=0.8, max_new_tokens=12)
PROMPT = [5, 9, 2, 33, 7]


def test_log_probs_are_those_of_the_full_forward(params):
    """Full support and temperature-scaled, also where top-k and top-p cut the distribution."""
    sampling = SamplingConfig(temperature=0.7, top_k=20, top_p=0.8, max_new_tokens=12)
    out = run(params, [PROMPT, PROMPT[2:]], names(0, [0], [0, 1]), sampling=sampling)
    for row, prompt in enumerate([PROMPT, PROMPT[2:]]):
        ids = jnp.asarray(np.concatenate([prompt, out.tokens_BT[row]])[None], jnp.int32)
        hidden, _ = forward(CFG, params, ids, jnp.zeros(1, jnp.int32))
        logp = jax.nn.log_softmax(logits(CFG, params, hidden)[0] / 0.7)
        expected = logp[np.arange(len(prompt) - 1, ids.shape[1] - 1), out.tokens_BT[row]]
        np.testing.assert_allclose(out.logp_BT[row], expected, atol=2e-4)


def test_a_shared_prompt_is_as_good_as_its_copies(params, mesh):
    """The generator prefills each different prompt once; rows come back in the order asked, whatever the chunks."""
    from cgrpo_jax.generation import Generator
    from cgrpo_jax.types import Kind, Request

    requests = [Request([5 + p, 9, 2][: 3 - p % 2], Kind.RESPONSE, p, g) for p in range(3) for g in range(4)]
    results = []
    for max_rows in (16, 4, 1):
        generator = Generator(CFG, mesh, (), 0, max_rows, jnp.float32)
        results.append(generator.bind(params, 0, SAMPLING)(requests))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one.ids, two.ids)
            np.testing.assert_allclose(one.logp, two.logp, atol=1e-4)
    assert len({tuple(c.ids) for c in results[0]}) == 12


def test_greedy_is_the_argmax(params):
    out = run(params, [PROMPT], names(0, [0], [0]), sampling=SamplingConfig(temperature=0.0, max_new_tokens=8))
    ids = jnp.asarray(np.concatenate([PROMPT, out.tokens_BT[0]])[None], jnp.int32)
    hidden, _ = forward(CFG, params, ids, jnp.zeros(1, jnp.int32))
    best = np.asarray(logits(CFG, params, hidden)[0].argmax(-1))
    np.testing.assert_array_equal(out.tokens_BT[0], best[len(PROMPT) - 1 : -1])


def test_random_numbers_depend_only_on_the_name(params):
    """Another batch, order, padding or bucket changes nothing; each part of the name changes the sample."""
    alone = run(params, [PROMPT], names(0, [3], [2]), sampling=SAMPLING)
    others = [[1, 2, 3, 4, 5, 6, 7, 8], [4], PROMPT, [8, 8]]
    named = jnp.array([(0, 0, 0), (0, 9, 1), (0, 3, 2), (1, 3, 2)], jnp.int32)
    crowd = run(params, others, named, sampling=SAMPLING, slots=16)
    np.testing.assert_array_equal(crowd.tokens_BT[2], alone.tokens_BT[0])
    variants = [
        run(params, [PROMPT], names(1, [3], [2]), sampling=SAMPLING),
        run(params, [PROMPT], names(0, [4], [2]), sampling=SAMPLING),
        run(params, [PROMPT], names(0, [3], [1]), sampling=SAMPLING),
        run(params, [PROMPT], names(0, [3], [2]), sampling=SAMPLING, seed=1),
        run(params, [PROMPT], names(0, [3], [2]), sampling=SAMPLING, step=1),
    ]
    assert all((other.tokens_BT[0] != alone.tokens_BT[0]).any() for other in variants)


def test_a_set_of_end_ids_stops_rows_apart(params):
    """The end id is the last token counted; rows without one are cut by the limit and not finished."""
    free = run(params, [PROMPT] * 4, names(0, [0], range(4)), sampling=SAMPLING)
    eos = (int(free.tokens_BT[0][3]), int(free.tokens_BT[1][6]))
    out = run(params, [PROMPT] * 4, names(0, [0], range(4)), sampling=SAMPLING, eos=eos)
    for row in range(4):
        ends = np.isin(free.tokens_BT[row], eos).nonzero()[0]
        length = ends[0] + 1 if len(ends) else 12
        assert out.length_B[row] == length and out.finished_B[row] == bool(len(ends))
        np.testing.assert_array_equal(out.tokens_BT[row][:length], free.tokens_BT[row][:length])


def test_an_end_id_at_once(params):
    free = run(params, [PROMPT], names(0, [0], [0]), sampling=SAMPLING)
    out = run(params, [PROMPT], names(0, [0], [0]), sampling=SAMPLING, eos=(int(free.tokens_BT[0][0]),))
    assert out.length_B[0] == 1 and out.finished_B[0]


def test_frequencies_follow_the_probabilities():
    weights = np.array([0.0, 1.0, 5.0, 0.0, 2.0] + [0.0] * 300 + [2.0])
    u_B = (jnp.arange(20_000) + 0.5) / 20_000
    ids = np.asarray(categorical(jnp.tile(jnp.asarray(weights, jnp.float32)[None], (20_000, 1)), u_B))
    np.testing.assert_allclose(np.bincount(ids, minlength=len(weights)) / 20_000, weights / weights.sum(), atol=2e-3)


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-24])
def test_extreme_uniform_numbers_never_draw_a_zero(rng, u):
    """At V = 151,936 a float32 running sum is neither monotone nor exact; the ends must still be possible ids."""
    weights = np.where(rng.random((4, 151_936)) < 0.01, rng.exponential(size=(4, 151_936)), 0.0).astype(np.float32)
    weights[:, [0, -1]] = 0.0
    ids = np.asarray(categorical(jnp.asarray(weights), jnp.full(4, u, jnp.float32)))
    positive = [np.flatnonzero(row) for row in weights]
    assert all(weights[row, token] > 0 for row, token in enumerate(ids))
    if u == 0.0:
        assert [p[0] for p in positive] == list(ids)


def test_a_target_above_the_sum_takes_the_last_positive():
    index, _ = first_above(jnp.array([[0.0, 1.0, 2.0, 0.0]]), jnp.array([99.0]))
    assert index[0] == 2


def reference_keep(logits_V, top_k, top_p):
    """By sorting, in float64; top-p after top-k, on what top-k left."""
    keep = np.ones(len(logits_V), bool)
    if top_k:
        keep = logits_V >= np.sort(logits_V)[-min(top_k, len(logits_V))]
    if top_p < 1:
        prob = np.where(keep, np.exp(logits_V.astype(np.float64) - logits_V.max()), 0)
        prob /= prob.sum()
        order = np.argsort(-prob)
        needed = np.searchsorted(np.cumsum(prob[order]), top_p) + 1
        keep &= prob >= prob[order[min(needed, len(order)) - 1]]
    return keep


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (7, 1.0), (0, 0.3), (0, 0.95), (50, 0.9), (9999, 1.0)])
def test_filters_equal_sorting(rng, top_k, top_p):
    logits_BV = (rng.normal(size=(6, 500)) * 3).astype(np.float32)
    kept = np.asarray(keep_top(jnp.asarray(logits_BV), top_k, top_p))
    for row in range(6):
        np.testing.assert_array_equal(kept[row], reference_keep(logits_BV[row], top_k, top_p))


def test_only_kept_tokens_are_drawn(rng):
    logits_BV = jnp.asarray(np.tile(rng.normal(size=(1, 64)), (256, 1)), jnp.float32)
    keys = row_keys(jnp.uint32(0), jnp.int32(0), names(0, range(256), [0]))
    tokens, _ = draw(logits_BV, keys, jnp.int32(0), SamplingConfig(top_k=3))
    assert set(np.asarray(tokens)) == set(np.argsort(-np.asarray(logits_BV[0]))[:3])


def test_one_compilation_per_shape(params):
    run(params, [PROMPT], names(0, [0], [0]), sampling=SAMPLING)
    before = sample._cache_size()
    for seed in range(3):
        run(params, [PROMPT], names(0, [0], [0]), sampling=SAMPLING, seed=seed, step=seed)
    assert sample._cache_size() == before
    run(params, [PROMPT], names(0, [0], [0]), sampling=SAMPLING, slots=8)
    assert sample._cache_size() == before + 1
