"""The sampler: distributions, random numbers, stopping, log-probabilities, schedules, compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cgrpo_jax.sampling.queue import Generator, RequestError, rows_that_fit
from conftest import tiny_config

from cgrpo_jax.model.decoder import forward, init_params, logits
from cgrpo_jax.options import OptimizerConfig, SamplerMemory, SamplingConfig
from cgrpo_jax.records import Kind, Request
from cgrpo_jax.sampling import programs
from cgrpo_jax.sampling.draw import categorical, draw, first_above, keep_top, row_keys, step_key
from cgrpo_jax.sampling.sizes import prefill_size, ring_size, row_sizes, split_count

CFG = tiny_config("qwen3")


@pytest.fixture(scope="module")
def params():
    """Weights large enough that the distribution is far from uniform."""
    return jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, init_params(CFG, jax.random.key(0)))


@pytest.fixture(scope="module")
def generator(mesh):
    return Generator(CFG, mesh, (), 0, max_rows=4, dtype=jnp.float32, unrolled=True, chunk=8)


SAMPLING = SamplingConfig(temperature=0.8, max_new_tokens=12)
PROMPT = [5, 9, 2, 33, 7]


def ask(generator, params, *requests, sampling=SAMPLING, step=0, then=None):
    return generator.bind(params, step, sampling)(list(requests), then)


def request(prompt=PROMPT, problem=0, sample=0, kind=Kind.RESPONSE, limit=None):
    return Request(prompt, kind, problem, sample, limit)


def same(one, other, atol=1e-4):
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_allclose(one.logp, other.logp, atol=atol)
    assert one.finished == other.finished


def full_logits(params, prompt, ids):
    """Logits before each of `ids`, by one plain forward over prompt and ids."""
    tokens = jnp.asarray(np.concatenate([prompt, ids])[None], jnp.int32)
    hidden, _ = forward(CFG, params, tokens, jnp.zeros(1, jnp.int32))
    return np.asarray(logits(CFG, params, hidden)[0])[len(prompt) - 1 : -1]


def test_log_probs_are_those_of_the_full_forward(generator, params):
    """Full support and temperature-scaled, also where top-k and top-p cut the distribution; and the mass they kept."""
    sampling = SamplingConfig(temperature=0.7, top_k=20, top_p=0.8, max_new_tokens=12)
    prompts = [PROMPT, PROMPT[2:], [3]]
    for prompt, got in zip(prompts, ask(generator, params, *map(request, prompts), sampling=sampling), strict=True):
        scaled = full_logits(params, prompt, got.ids) / 0.7
        logp = np.asarray(jax.nn.log_softmax(scaled))
        np.testing.assert_allclose(got.logp, logp[np.arange(12), got.ids], atol=2e-4)
        kept = np.where([reference_keep(row, 20, 0.8) for row in scaled], np.exp(logp), 0).sum(-1)
        np.testing.assert_allclose(got.kept, kept, atol=1e-4)
        assert (got.kept < 1).all()


def test_the_sampler_and_the_trainer_agree_on_smollm2(smollm2, mesh):
    """Log-probabilities of sampled tokens, as the update computes them, within 1e-4 in float32."""
    from cgrpo_jax.learning.objective import ObjectiveConfig
    from cgrpo_jax.learning.packing import Prompted, Row, make_batch
    from cgrpo_jax.learning.update import LearnerConfig, make_logps, put_batch
    from cgrpo_jax.model import hf, sharding
    from cgrpo_jax.model.hf_config import config_from_hf
    from cgrpo_jax.text.prompts import question_messages
    from cgrpo_jax.text.tokenizer import Tokenizer

    cfg, encode = config_from_hf(smollm2), Tokenizer(smollm2).encode_chat
    weights = hf.load_params(smollm2, cfg, functools.partial(sharding.param_sharding, mesh), jnp.float32)
    prompts = [encode(question_messages(text)) for text in ("What is 12+30?", "Name three rivers of Africa, please.")]
    requests = [Request(prompts[i % 2], Kind.RESPONSE, i % 2, i // 2, [40, 9, 24, 40][i]) for i in range(4)]
    generator = Generator(cfg, mesh, (), 0, 2, jnp.float32, unrolled=True)  # two slots for four rows: refill
    got = generator.bind(weights, 0, SamplingConfig(0.9))(requests)
    rows = [[Row(c.ids, c.logp, 1.0, 1.0, False) for c in got[q::2]] for q in range(2)]
    batch = make_batch([Prompted(prompts[q], rows[q]) for q in range(2)], rows_per_prompt=2, micro_batch=2)
    static = (cfg, ObjectiveConfig(), OptimizerConfig(), 0.9, 40.0, 1, jnp.float32, "dots")
    logp_BT = np.asarray(make_logps(LearnerConfig(*static), mesh)(weights, put_batch(mesh, batch)))[0]
    gaps = [logp_BT[2 * q + g, : len(row.ids)] - row.sampler_logp for q in range(2) for g, row in enumerate(rows[q])]
    assert np.abs(np.concatenate(gaps)).max() < 1e-4


def test_greedy_is_the_argmax(generator, params):
    (got,) = ask(generator, params, request(), sampling=SamplingConfig(temperature=0.0, max_new_tokens=8))
    np.testing.assert_array_equal(got.ids, full_logits(params, PROMPT, got.ids).argmax(-1))
    assert (got.kept == 1).all()


def test_random_numbers_depend_only_on_the_name(generator, params):
    """Another crowd, order, padding or bucket changes nothing; each part of the name changes the sample."""
    named = request(problem=3, sample=2)
    (alone,) = ask(generator, params, named)
    others = [request([1, 2, 3, 4, 5, 6, 7, 8] * 9), request([4], 9, 1), named, request([8, 8], 3, 2, Kind.CRITIQUE)]
    same(ask(generator, params, *others)[2], alone)
    variants = [
        ask(generator, params, request(problem=3, sample=2, kind=Kind.REFINEMENT)),
        ask(generator, params, request(problem=4, sample=2)),
        ask(generator, params, request(problem=3, sample=1)),
        ask(dataclasses.replace(generator, seed=1), params, named),
        ask(generator, params, named, step=1),
    ]
    assert all((other.ids != alone.ids).any() for (other,) in variants)


def test_a_set_of_end_ids_stops_rows_apart(generator, params):
    """The end id is the last token counted; rows without one are cut by their limit and not finished."""
    requests = [request(sample=g, limit=[None, None, 5, None][g]) for g in range(4)]
    free = ask(generator, params, *[r._replace(limit=None) for r in requests])
    eos = (int(free[0].ids[0]), int(free[1].ids[6]))
    got = ask(dataclasses.replace(generator, eos_ids=eos), params, *requests)
    assert len(got[0].ids) == 1 and got[0].finished
    for row, limit in enumerate([12, 12, 5, 12]):
        ends = np.isin(free[row].ids[:limit], eos).nonzero()[0]
        length = ends[0] + 1 if len(ends) else limit
        assert len(got[row].ids) == len(got[row].logp) == length and got[row].finished == bool(len(ends))
        np.testing.assert_array_equal(got[row].ids, free[row].ids[:length])


def crowd(rng, count=36):
    """Requests of few prompts, several samples each, with lengths from 1 to far beyond a bucket, and mixed limits."""
    prompts = [rng.integers(0, CFG.vocab, n).tolist() for n in (1, 5, 65, 70, 140)]
    limits = [1, 3, 9, 20, 45, None]
    pick = lambda values: values[rng.integers(len(values))]
    return [request(pick(prompts), i // 3, i % 3, limit=pick(limits)) for i in range(count)]


def test_any_schedule_gives_the_same_tokens(generator, params, rng):
    """Rows, chunk and order of admission: refill, rings that grow and turn over, rows that shrink."""
    requests = crowd(rng)
    plain = [ask(generator, params, r)[0] for r in requests]
    for max_rows, chunk in [(1, 8), (2, 3), (32, 8), (4, 5)]:
        order = rng.permutation(len(requests))
        other = dataclasses.replace(generator, max_rows=max_rows, chunk=chunk)
        got = ask(other, params, *[requests[i] for i in order])
        for place, i in enumerate(order):
            same(got[place], plain[i])


def test_unrolled_layers_and_a_loop_over_them_give_the_same(generator, params, rng):
    """The same tokens, also where rows are refilled and rings grow; weights that need no change are not copied."""
    requests = crowd(rng, 9)
    looped = dataclasses.replace(generator, unrolled=False)
    for one, other in zip(ask(generator, params, *requests), ask(looped, params, *requests), strict=True):
        same(one, other)
    weights = looped.bind(params, 0, SAMPLING).weights
    pointers = lambda tree: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]
    assert pointers(weights) == pointers(params)


def test_follow_ups_enter_as_others_end(generator, params):
    """Asked for by the completions, numbered on, and like any other request; each completion is told once."""
    first = [request(sample=g, limit=2 + 3 * g) for g in range(3)]
    told = []

    def then(number, completion):
        told.append(number)
        if number >= 3:
            return []
        return [request([*PROMPT, *completion.ids.tolist()], number, 0, Kind.REFINEMENT, 4)] * (
            number + 1 if number else 0
        )

    got = ask(generator, params, *first, then=then)
    assert len(got) == 8 and sorted(told) == list(range(8)) and told[0] == 0
    again = ask(generator, params, request([*PROMPT, *got[1].ids.tolist()], 1, 0, Kind.REFINEMENT, 4))
    same(got[3], again[0])
    same(got[4], again[0])


def test_each_prompt_is_prefilled_once_and_rows_are_used(generator, params):
    """Tokens, row-steps and prefilled tokens add up; a long tail does not hold the others up."""
    requests = [request([7, p, 3, 4], p, g, limit=40 if (p + g) % 4 == 0 else 4) for p in range(4) for g in range(4)]
    bound = dataclasses.replace(generator, chunk=4).bind(params, 0, SAMPLING)
    got = bound(requests)
    assert bound.stats.prefilled == 4 * 3 and bound.stats.tokens == sum(len(c.ids) for c in got) == 4 * 40 + 12 * 4
    static = 4 * 4 * 40  # four batches of four, each as long as its longest row
    assert bound.stats.row_steps < 0.5 * static and bound.stats.slot_use > 0.75
    assert bound.stats.row_steps >= bound.stats.tokens


def test_what_cannot_fit_is_refused_by_name(generator, params):
    with pytest.raises(RequestError, match="response of problem 3: a prompt of 1024 tokens leaves no room"):
        ask(generator, params, request([1] * 1024, 3))
    with pytest.raises(RequestError, match="a prompt of 0 tokens"):
        ask(generator, params, request([]))
    (got,) = ask(generator, params, request([1] * 1020))  # what room there is
    assert len(got.ids) == 4 and not got.finished


def test_the_budget_decides_the_rows(mesh):
    row = 2 * CFG.layers * CFG.kv_heads * CFG.head_dim * 128 * 4 / 2**20  # megabytes of a ring of 128 slots
    fit = lambda rows: rows_that_fit(CFG, mesh, SamplerMemory(rows * row), 100, jnp.float32)
    assert [fit(n) for n in (0.9, 1, 1.9, 7.9, 8, 100)] == [0, 1, 1, 4, 8, 64]


def test_few_sizes_bound_the_programs():
    assert [prefill_size(n) for n in (0, 1, 64, 65, 96, 97, 129, 193)] == [64, 64, 64, 96, 96, 128, 192, 256]
    assert [ring_size(n) for n in (1, 128, 129, 513, 769, 1025)] == [128, 128, 256, 640, 1024, 1536]
    for size, most in ((prefill_size, 16), (ring_size, 13)):
        assert len({size(n) for n in range(1, 8193)}) <= most and all(n <= size(n) for n in range(1, 8193))
    assert row_sizes(1024, 1) == [8, 32, 128, 1024] and row_sizes(64, 2) == [16, 64] and row_sizes(16, 1) == [16]
    assert (
        split_count(7, 64) == [4, 1, 1, 1] and split_count(86, 64) == [64, 16, 4, 1, 1] and split_count(9, 0) == [1] * 9
    )


def test_programs_are_compiled_once_per_shape(generator, params):
    requests = [request([5, p, 2], p, g) for p in range(3) for g in range(3)]
    ask(generator, params, *requests)
    before = [f._cache_size() for f in (programs.prefill, programs.enter, programs.resize, programs.decode)]
    for step in range(1, 4):
        ask(dataclasses.replace(generator, seed=step), params, *requests[::-1], step=step)
    assert [f._cache_size() for f in (programs.prefill, programs.enter, programs.resize, programs.decode)] == before


def test_decoding_copies_neither_weights_nor_cache(mesh):
    """The compiled program: the cache is updated where it lies, and all temporaries are small beside it."""
    cfg = tiny_config("qwen3", layers=8, width=64, mlp_width=256, vocab=64)
    params = init_params(cfg, jax.random.key(0))
    layout = {"dtype": jnp.float32, "mesh": mesh, "unrolled": programs.unrolls("cpu")}
    weights = programs.weights_for_sampling(params, **layout)
    slots = programs.empty_slots(cfg=cfg, rows=32, slots=256, **layout)
    static = {"cfg": cfg, "sampling": SAMPLING, "dtype": jnp.float32, "mesh": mesh, "chunk": 8}
    program = programs.decode.lower(weights, slots, np.zeros(0, np.int32), np.int32(9), **static).compile()
    memory = program.memory_analysis()
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(slots.cache))
    layer_bytes = cache_bytes / cfg.layers
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < layer_bytes / 2
    big = f"f32[32,{cfg.kv_heads},256,{cfg.head_dim}]"
    lines = program.as_text().splitlines()
    assert any("dynamic-update-slice" in line and big in line for line in lines)  # the shape is spelled like this
    assert not [line for line in lines if " copy(" in line and big in line]


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
    name_B3 = jnp.array([(0, p, 0) for p in range(256)], jnp.int32)
    keys = row_keys(step_key(0, 0), name_B3)
    tokens, _, kept = draw(logits_BV, keys, jnp.zeros(256, jnp.int32), SamplingConfig(top_k=3))
    prob = np.sort(np.asarray(jax.nn.softmax(logits_BV[0])))
    np.testing.assert_allclose(kept, prob[-3:].sum(), rtol=1e-5)
    assert set(np.asarray(tokens)) == set(np.argsort(-np.asarray(logits_BV[0]))[:3])
