"""The sampler: distributions, random numbers, stopping, log-probabilities, schedules, compilation."""

import collections
import dataclasses
import functools
import gc
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import engine_of, tiny_config
from plain_forward import forward

from cgrpo_jax.config.options import ObjectiveConfig, OptimizerConfig, SamplerMemory, SamplingConfig
from cgrpo_jax.learning.packing import Terms, bin_size, pack
from cgrpo_jax.learning.update import Learner, make_logps, put_bins
from cgrpo_jax.model.attention import KVCache
from cgrpo_jax.model.decoder import init_params, logits
from cgrpo_jax.records import Kind, Name, Request, Segment
from cgrpo_jax.rollout.stories import Due, run_stories, sample_all
from cgrpo_jax.sampling import programs
from cgrpo_jax.sampling.draw import categorical, draw, first_above, keep_top, row_keys, step_key
from cgrpo_jax.sampling.engine import RequestError, weights_of
from cgrpo_jax.sampling.pool import EngineSetup
from cgrpo_jax.sampling.room import (
    PREFILL_COUNTS,
    Room,
    fixed_sizes,
    grown_rows,
    prefill_size,
    ring_size,
    room_for,
    row_sizes,
    split_count,
    unfit,
)

CFG = tiny_config("qwen3")


@pytest.fixture(scope="module")
def params():
    """Weights large enough that the distribution is far from uniform."""
    return jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, init_params(CFG, jax.random.key(0)))


@pytest.fixture(scope="module")
def setup(mesh):
    return EngineSetup(CFG, mesh, (), 0, Room(4, 4096), jnp.float32, unrolled=True, chunk=8)


SAMPLING = SamplingConfig(temperature=0.8, max_new_tokens=12)
PROMPT = [5, 9, 2, 33, 7]


def with_room(setup, rows, prompt_tokens=4096, **changes):
    return dataclasses.replace(setup, room=Room(rows, prompt_tokens), **changes)


def ask(setup, params, *requests, sampling=SAMPLING, step=0):
    return sample_all(engine_of(setup, params, step, sampling), requests)


def request(prompt=PROMPT, problem=0, sample=0, kind=Kind.RESPONSE, limit=None, round=0, task=0):
    return Request(Name(kind, problem, sample, round, task), prompt, limit)


def same(one, other, atol=1e-4):
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_allclose(one.logp, other.logp, atol=atol)
    assert one.finished == other.finished


def full_logits(params, prompt, ids):
    """Logits before each of `ids`, by one plain forward over prompt and ids."""
    tokens = jnp.asarray(np.concatenate([prompt, ids])[None], jnp.int32)
    return np.asarray(logits(CFG, params, forward(CFG, params, tokens))[0])[len(prompt) - 1 : -1]


def test_log_probs_are_those_of_the_full_forward(setup, params):
    """Full support and temperature-scaled, also where top-k and top-p cut the distribution; and the mass they kept."""
    sampling = SamplingConfig(temperature=0.7, top_k=20, top_p=0.8, max_new_tokens=12)
    prompts = [PROMPT, PROMPT[2:], [3]]
    asked = [request(prompt, p) for p, prompt in enumerate(prompts)]
    for prompt, got in zip(prompts, ask(setup, params, *asked, sampling=sampling), strict=True):
        scaled = full_logits(params, prompt, got.ids) / 0.7
        logp = np.asarray(jax.nn.log_softmax(scaled))
        np.testing.assert_allclose(got.logp, logp[np.arange(12), got.ids], atol=2e-4)
        kept = np.where([reference_keep(row, 20, 0.8) for row in scaled], np.exp(logp), 0).sum(-1)
        np.testing.assert_allclose(got.kept, kept, atol=1e-4)
        assert (got.kept < 1).all()


def trainer_gaps(setup, weights, requests, got, temperature, share):
    """Log-probabilities of the update, less those of the sampler, of all sampled tokens."""
    asked = list(zip(requests, got, strict=True))
    none = {row: np.zeros(len(done.ids)) for row, (_, done) in enumerate(asked)}
    segments = [
        Segment(r.prompt_ids, done.ids, False, none[row] + 1, none[row], none[row], none[row], done.logp)
        for row, (r, done) in enumerate(asked)
    ]
    problems = collections.Counter(tuple(r.prompt_ids) for r in requests)
    size = bin_size(
        share=share, problems=len(problems), group=max(problems.values()), at_once=len(problems), row_devices=1,
        longest_prompt=max(map(len, problems)), longest_ids=max(len(done.ids) for done in got),
    )  # fmt: skip
    bins = put_bins(setup.mesh, pack(segments, size, Terms()))
    learner = Learner(setup.model, ObjectiveConfig(), OptimizerConfig(), temperature, 1, setup.dtype, "dots", 1)
    logp_ABT = np.asarray(make_logps(learner, setup.mesh)(weights, bins))
    scored_ABT = np.asarray(bins.scored_ABT)
    assert scored_ABT.sum() == sum(len(done.ids) for done in got)
    return (logp_ABT - np.asarray(bins.sampler_logp_ABT))[scored_ABT]


def test_the_sampler_and_the_trainer_agree_on_smollm2(smollm2, mesh):
    """Log-probabilities of sampled tokens, as the update computes them, within 1e-4 in float32."""
    from cgrpo_jax.model import hf, sharding
    from cgrpo_jax.model.hf_config import config_from_hf
    from cgrpo_jax.text.prompts import question_messages
    from cgrpo_jax.text.tokenizer import Tokenizer

    cfg, encode = config_from_hf(smollm2), Tokenizer(smollm2).encode_chat
    weights = hf.load_params(smollm2, cfg, functools.partial(sharding.param_sharding, mesh), jnp.float32)
    prompts = [encode(question_messages(text)) for text in ("What is 12+30?", "Name three rivers of Africa, please.")]
    requests = [request(prompts[i % 2], i % 2, i // 2, limit=[40, 9, 24, 40][i]) for i in range(4)]
    two_rows = EngineSetup(cfg, mesh, (), 0, Room(2, 4096), jnp.float32, unrolled=True)  # for four: refill
    got = ask(two_rows, weights, *requests, sampling=SamplingConfig(0.9))
    assert np.abs(trainer_gaps(two_rows, weights, requests, got, 0.9, share=True)).max() < 1e-4


@pytest.mark.parametrize("share", [True, False])
def test_the_sampler_and_the_trainer_agree_in_bfloat16(setup, params, share):
    """In nats, measured on the CPU: 0.0065 apart in the mean, 0.087 at most, and to neither side (0.0003).

    Log-probabilities that were rounded to bfloat16 would be 0.0097 apart.
    """
    requests = [request([7, p, 3, 4], p, g, limit=40) for p in range(3) for g in range(4)]
    low = dataclasses.replace(setup, dtype=jnp.bfloat16)
    engine = engine_of(low, params, 0, SAMPLING)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(engine.weights.decoding))
    got = sample_all(engine, requests)
    gaps = trainer_gaps(low, params, requests, got, SAMPLING.temperature, share)
    assert 0 < np.abs(gaps).mean() < 0.008 and np.abs(gaps).max() < 0.2 and abs(gaps.mean()) < 0.002


def test_greedy_is_the_argmax(setup, params):
    (got,) = ask(setup, params, request(), sampling=SamplingConfig(temperature=0.0, max_new_tokens=8))
    np.testing.assert_array_equal(got.ids, full_logits(params, PROMPT, got.ids).argmax(-1))
    assert (got.kept == 1).all()


def test_random_numbers_depend_only_on_the_name(setup, params):
    """Another crowd, order, padding or bucket changes nothing; each part of the name changes the sample."""
    named = request(problem=3, sample=2)
    (alone,) = ask(setup, params, named)
    others = [request([1, 2, 3, 4, 5, 6, 7, 8] * 9), request([4], 9, 1), named, request([8, 8], 3, 2, Kind.CRITIQUE)]
    same(ask(setup, params, *others)[2], alone)
    variants = [
        ask(setup, params, request(problem=3, sample=2, kind=Kind.REFINEMENT)),
        ask(setup, params, request(problem=4, sample=2)),
        ask(setup, params, request(problem=3, sample=1)),
        ask(dataclasses.replace(setup, seed=1), params, named),
        ask(setup, params, named, step=1),
    ]
    assert all((other.ids != alone.ids).any() for (other,) in variants)


def test_a_set_of_end_ids_stops_rows_apart(setup, params):
    """The end id is the last token counted; rows without one are cut by their limit and not finished."""
    requests = [request(sample=g, limit=[None, None, 5, None][g]) for g in range(4)]
    free = ask(setup, params, *[r._replace(limit=None) for r in requests])
    eos = (int(free[0].ids[0]), int(free[1].ids[6]))
    got = ask(dataclasses.replace(setup, eos_ids=eos), params, *requests)
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

    def pick(values):
        return values[rng.integers(len(values))]

    return [request(pick(prompts), i // 3, i % 3, limit=pick(limits)) for i in range(count)]


def test_any_schedule_gives_the_same_tokens(setup, params, rng):
    """Rows, chunk and order of admission: refill, rings that grow and turn over, rows that shrink."""
    requests = crowd(rng)
    plain = [ask(setup, params, r)[0] for r in requests]
    for rows, chunk in [(1, 8), (2, 3), (32, 8), (4, 5)]:
        order = rng.permutation(len(requests))
        other = with_room(setup, rows, chunk=chunk)
        got = ask(other, params, *[requests[i] for i in order])
        for place, i in enumerate(order):
            same(got[place], plain[i])


def test_unrolled_layers_and_a_loop_over_them_give_the_same(setup, params, rng):
    """The same tokens, also where rows are refilled and rings grow; weights that need no change are not copied."""
    requests = crowd(rng, 9)
    looped, in_place = dataclasses.replace(setup, unrolled=False), dataclasses.replace(setup, stacked_cache=True)
    plain = ask(setup, params, *requests)
    for form in (looped, in_place):
        for one, other in zip(plain, ask(form, params, *requests), strict=True):
            same(one, other)
    weights = engine_of(looped, params, 0, SAMPLING).weights.decoding

    def pointers(tree):
        return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]

    assert pointers(weights) == pointers(params)


class FollowUps:
    """Each completion of the first round is asked about again, as often as its sample's number, plus one."""

    late = 0

    def __init__(self, requests):
        self.asked, self.left, self.chunks, self.idle = list(requests), len(requests), [], []

    def ended(self, done):
        self.chunks.append([(asked.name, got) for asked, got in done])
        for (_, problem, sample, round_, _), got in self.chunks[-1]:
            self.left -= 1
            for task in range(sample + 1 if not round_ else 0):
                self.left += 1
                prompt = [*PROMPT, *got.ids.tolist()]
                self.asked.append(request(prompt, problem, sample, Kind.REFINEMENT, 4, round=1, task=task))

    def due(self, idle):
        self.idle.append(idle)
        asked, self.asked = self.asked, []
        return Due(asked, self.left > 0)


def test_follow_ups_enter_as_others_end(setup, params, monkeypatch):
    """Like any other request, and before the rest has ended; each completion is told once, in the order of names."""
    decoded = []
    decode = programs.decode
    monkeypatch.setattr(programs, "decode", lambda *args, **static: decoded.append(0) or decode(*args, **static))
    # The first two end together, and their rows are not in the order of their names.
    source = FollowUps([request(sample=g, limit=[2, 2, 40][g]) for g in (2, 1, 0)])
    run_stories(source, [engine_of(setup, params, 0, SAMPLING)])
    names = [[name for name, _ in chunk] for chunk in source.chunks]
    assert len(names) == len(decoded) and [] in names and all(chunk == sorted(chunk) for chunk in names)
    told = [name for chunk in names for name in chunk]
    assert len(told) == len(set(told)) == 3 + 6
    assert names[0] == [Name(Kind.RESPONSE, 0, 0), Name(Kind.RESPONSE, 0, 1)]
    last = told.index(Name(Kind.RESPONSE, 0, 2))
    assert last == 2 + 3 and [name.sample for name in told[2:last]] == [0, 1, 1]
    assert source.idle[0] and source.idle[1:].count(True) == 2  # with nothing under way: before the last ones; the end
    found = {name: got for chunk in source.chunks for name, got in chunk}
    for g in range(3):
        prompt = [*PROMPT, *found[Name(Kind.RESPONSE, 0, g)].ids.tolist()]
        (again,) = ask(setup, params, request(prompt, 0, g, Kind.REFINEMENT, 4, round=1))
        for task in range(g + 1):
            same(found[Name(Kind.REFINEMENT, 0, g, 1, task)], again)


def test_a_name_asked_for_twice_is_refused(setup, params):
    words = r"response of problem 3: \(0, 3, 1, 0, 0\) is asked for while it is under way"
    with pytest.raises(RequestError, match=words):
        ask(setup, params, request(problem=3, sample=1), request([4, 4], 3, 1))
    source = FollowUps([request(problem=3, sample=g, limit=[2, 40][g]) for g in range(2)])
    ended = source.ended

    def ask_again(done):
        ended(done)
        source.asked = [request(problem=3, sample=1)]

    source.ended = ask_again
    with pytest.raises(RequestError, match=words):
        run_stories(source, [engine_of(setup, params, 0, SAMPLING)])
    assert len(ask(setup, params, request(), request(task=1), request(round=1))) == 3


def test_a_round_has_its_own_random_numbers_and_a_task_has_not(setup, params):
    """Round 0 adds nothing to the key, so its tokens are those of names without a round."""
    names = [(0, 3, 2, 0), (1, 0, 5, 0), (0, 3, 2, 1), (0, 3, 2, 2)]
    key = step_key(4, 9)
    expected = []
    for kind, problem, sample, round_ in names:
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, kind), problem), sample)
        expected.append(jax.random.fold_in(own, round_) if round_ else own)
    got = jax.random.key_data(row_keys(key, jnp.array(names, jnp.int32)))
    np.testing.assert_array_equal(got, [jax.random.key_data(own) for own in expected])
    assert len({tuple(row) for row in np.asarray(got).tolist()}) == len(names)
    plain, task, first, second = ask(
        setup, params, request(), request(task=1), request(round=1), request(round=2), sampling=SAMPLING
    )
    same(plain, task)
    assert (first.ids != plain.ids).any() and (second.ids != plain.ids).any() and (second.ids != first.ids).any()


@pytest.mark.parametrize("prompt_tokens", [128, 256])
def test_prefilled_prompts_stay_within_their_room(setup, params, rng, monkeypatch, prompt_tokens):
    """Many problems and few rows, in random order: prompts that no row has are let go and prefilled again."""
    lengths = (1, 40, 65, 70, 128)
    prompts = [rng.integers(0, CFG.vocab, lengths[p % 5]).tolist() for p in range(15)]
    requests = [request(prompts[p], p, g, limit=int(rng.integers(1, 9))) for p in range(15) for g in range(4)]
    requests = [requests[i] for i in rng.permutation(len(requests))]
    plain = ask(with_room(setup, 32), params, *requests)
    alive, held = [], []
    prefill = programs.prefill

    def watched(params, tokens_QT, pasts, **static):
        made = prefill(params, tokens_QT, pasts, **static)
        alive[:] = [x for x in alive if x() is not None] + [weakref.ref(cache.k_BKSH) for cache in made]
        held.append(sum(x().shape[2] for x in alive))
        return made

    monkeypatch.setattr(programs, "prefill", watched)
    engine = engine_of(with_room(setup, 2, prompt_tokens), params, 0, SAMPLING)
    for one, other in zip(sample_all(engine, requests), plain, strict=True):
        same(one, other)
    assert max(held) == prompt_tokens  # used, and never more
    assert engine.stats.prefilled > sum(len(ids) - 1 for ids in prompts)


def test_a_weight_sync_leaves_nothing_behind(setup, params):
    """Device memory after 50 steps is that after the first."""
    low = dataclasses.replace(setup, dtype=jnp.bfloat16)  # so that all weights are copied

    def held_after(steps):
        for step in steps:
            engine = engine_of(low, params, step, SAMPLING)
            sample_all(engine, [request(limit=2)])
            del engine
        return sum(x.nbytes for x in jax.live_arrays())

    gc.collect()
    gc.disable()  # what is dropped goes at once, not when somebody looks for cycles
    try:
        first = held_after(range(1))
        assert held_after(range(1, 51)) == first
    finally:
        gc.enable()


def test_log_probs_that_are_no_finite_number_are_counted(setup, params):
    """A token whose embedding is broken spoils what comes after it, and that only."""
    bad, clean = PROMPT[3], [5, 9, 2, 7]
    broken = params["embed"]["embedding"].at[bad].set(jnp.nan)
    engine = engine_of(setup, params | {"embed": {"embedding": broken}}, 0, SAMPLING)
    spoilt, good = sample_all(engine, [request(), request(clean, 1)])
    finite = np.concatenate([np.isfinite(spoilt.logp), np.isfinite(good.logp)])
    assert not np.isfinite(spoilt.logp).any() and np.isfinite(good.logp).all()
    assert engine.stats.nonfinite == (~finite).sum() == len(spoilt.ids) == 12
    sound = engine_of(setup, params, 0, SAMPLING)
    sample_all(sound, [request(), request(clean, 1)])
    assert sound.stats.nonfinite == 0


def test_each_prompt_is_prefilled_once_and_rows_are_used(setup, params):
    """Tokens, row-steps and prefilled tokens add up; a long tail does not hold the others up."""
    requests = [request([7, p, 3, 4], p, g, limit=40 if (p + g) % 4 == 0 else 4) for p in range(4) for g in range(4)]
    engine = engine_of(dataclasses.replace(setup, chunk=4), params, 0, SAMPLING)
    got = sample_all(engine, requests)
    assert engine.stats.prefilled == 4 * 3 and engine.stats.tokens == sum(len(c.ids) for c in got) == 4 * 40 + 12 * 4
    static = 4 * 4 * 40  # four batches of four, each as long as its longest row
    assert engine.stats.row_steps < 0.5 * static and engine.stats.slot_use > 0.75
    assert engine.stats.row_steps >= engine.stats.tokens
    assert not engine.prompts and not engine.waiting and not engine.busy  # nothing is kept for nobody


def test_what_cannot_fit_is_refused_by_name(setup, params):
    with pytest.raises(RequestError, match="response of problem 3: a prompt of 1024 tokens leaves no room"):
        ask(setup, params, request([1] * 1024, 3))
    with pytest.raises(RequestError, match="a prompt of 0 tokens"):
        ask(setup, params, request([]))
    (got,) = ask(setup, params, request([1] * 1020))  # what room there is
    assert len(got.ids) == 4 and not got.finished


def test_the_budget_decides_the_room(mesh):
    """By hand, in rows of a ring of 128 slots; a prompt of 50 takes 64, an eighth of all is for prompts."""
    row = 2 * CFG.layers * CFG.kv_heads * CFG.head_dim * 128 * 4 / 2**20  # megabytes

    def fit(rows):
        return room_for(CFG, mesh, SamplerMemory(rows * row), 100, 50, jnp.float32)

    assert [fit(n) for n in (1.0, 1.4)] == [Room(0, 64)] * 2  # the prompt is half a row
    assert [fit(n) for n in (1.5, 2.4)] == [Room(1, 64)] * 2 and fit(2.5) == Room(2, 64)
    assert fit(8) == Room(7, 128) and fit(10) == Room(8, 160)  # 8 - 1 rows are left, and 10 - 1.25
    assert fit(1024) == Room(1024 - 32, 4096)  # 4096 at most

    def long(megabytes):
        return room_for(CFG, mesh, SamplerMemory(megabytes), 1100, 1000, jnp.float32)

    assert long(0.9375) == Room(1, 1024) and long(0.93) == Room(0, 1024)  # 1536 + 1024 tokens of 384 bytes


def test_the_room_of_several_devices():
    """By hand: 4 devices share rows and prompts, 2 share the heads; a prefill is of one prompt for each of the 4."""
    eight = types.SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 2})
    row = CFG.layers * CFG.kv_heads * CFG.head_dim * 128 * 4 / 2**20  # megabytes of one device: half the heads

    def fit(rows):
        return room_for(CFG, eight, SamplerMemory(rows * row), 100, 50, jnp.float32)

    assert fit(8) == Room(4 * 7, 512)  # 512 / 4 tokens are one row, 7 are left
    assert fit(1.5) == Room(4, 4 * 64) and fit(1.4) == Room(0, 4 * 64)
    odd = types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 4})  # does not divide the 2 heads: each has both
    assert room_for(CFG, odd, SamplerMemory(8 * 2 * row), 100, 50, jnp.float32) == Room(7, 128)


def test_few_sizes_bound_the_programs():
    assert [prefill_size(n) for n in (0, 1, 64, 65, 96, 97, 129, 193)] == [64, 64, 64, 96, 96, 128, 192, 256]
    assert [ring_size(n) for n in (1, 128, 129, 513, 769, 1025)] == [128, 128, 256, 640, 1024, 1536]
    for size, most in ((prefill_size, 16), (ring_size, 13)):
        assert len({size(n) for n in range(1, 8193)}) <= most and all(n <= size(n) for n in range(1, 8193))
    assert row_sizes(1024, 1) == [8, 32, 128, 1024] and row_sizes(64, 2) == [16, 64] and row_sizes(16, 1) == [16]
    assert [grown_rows(n, 2, 22) for n in (1, 2, 3, 9, 16, 17, 22)] == [2, 2, 4, 16, 16, 22, 22]
    assert split_count(7, PREFILL_COUNTS) == [4, 1, 1, 1] and split_count(86, PREFILL_COUNTS) == [64, 16, 4, 1, 1]
    assert split_count(9, (1,)) == [1] * 9 and split_count(9, (4,)) == [4, 4, 4]


FIXED = SamplerMemory(rings="128x2,256x1", prefills="64,200")


def test_fixed_sizes_give_the_same_tokens_by_few_programs(setup, params, rng):
    """Requests go where prompt and limit fit; programs of two rings and two sizes of prompts, and no resizing."""
    requests = [item for item in crowd(rng) if len(item.prompt_ids) + (item.limit or 12) <= 200]
    assert {len(item.prompt_ids) > 100 for item in requests} == {True, False}
    plain = ask(setup, params, *requests)
    room = Room(3, 400, fixed_sizes(FIXED))
    counted = [programs.prefill, programs.enter, programs.decode, programs.empty_slots, programs.resize]
    for program in counted:
        program.clear_cache()
    for one, other in zip(ask(dataclasses.replace(setup, room=room), params, *requests), plain, strict=True):
        same(one, other)
    # A prompt of 200 never enters the ring of 128, and the other ring always has one that does not fit there.
    assert [program._cache_size() for program in counted] == [2, 2, 2, 2, 0]
    assert room.counts(64, 1) == (4,) and room.counts(200, 1) == (1,)
    with pytest.raises(RequestError, match=r"no ring of sampler.rings holds 150 tokens and 120 new ones"):
        ask(dataclasses.replace(setup, room=room), params, request([1] * 150, limit=120))


def test_long_requests_do_not_hold_up_short_ones(setup, params):
    """Of a pool that is full the others go on; a ring that is larger than needed is used where it is free."""
    room = Room(3, 400, fixed_sizes(FIXED))
    source = FollowUps([])
    long = [request([1, 2], 0, g, limit=180) for g in range(2)]
    short = [request([3, 4], 1, g, limit=5) for g in range(4)]
    source.asked, source.left = [*long, *short], 0
    source.ended = lambda done: source.chunks.append([name for (name, *_), _ in done])
    run_stories(source, [engine_of(dataclasses.replace(setup, room=room), params, 0, SAMPLING)])
    told = [name for chunk in source.chunks for name in chunk]
    assert [name.problem for name in told] == [1] * 4 + [0] * 2
    first = next(chunk for chunk in source.chunks if chunk)
    assert len(first) == 2  # the rows of the small ring; the large one has the first long request


def test_fixed_sizes_fit_or_are_refused(mesh):
    row = 2 * CFG.layers * CFG.kv_heads * CFG.head_dim * 128 * 4 / 2**20  # megabytes of a ring of 128 slots

    def fit(rows):
        cfg = dataclasses.replace(FIXED, kv_cache_mb=rows * row)
        return room_for(CFG, mesh, cfg, 200, 150, jnp.float32)

    assert fit(4 + 200 / 128) == Room(3, 200, fixed_sizes(FIXED)) and fit(6) == Room(3, 256, fixed_sizes(FIXED))
    assert fit(99) == Room(3, 400, fixed_sizes(FIXED))
    assert fit(5.5).rows == 0
    assert unfit(fit(8), 1, 150, 100) is None
    assert unfit(fit(8), 2, 150, 100) == "sampler.rings: 1 rows do not divide among the 2 devices that share them"
    assert unfit(fit(8), 1, 202, 10) == "sampler.prefills: none holds a prompt of 202 tokens"
    assert unfit(fit(8), 1, 150, 108) == "sampler.rings: none holds a prompt of 150 tokens and 108 new ones"
    assert fixed_sizes(SamplerMemory()) is None
    for rings, prefills in (("128x2", ""), ("", "64"), ("128", "64"), ("128x0", "64"), ("axb", "64")):
        with pytest.raises(ValueError, match=r"as in '8192x256,16384x32' and '1024,9216'"):
            fixed_sizes(SamplerMemory(rings=rings, prefills=prefills))


def test_programs_are_compiled_once_per_shape(setup, params):
    requests = [request([5, p, 2], p, g) for p in range(3) for g in range(3)]
    ask(setup, params, *requests)
    before = [f._cache_size() for f in (programs.prefill, programs.enter, programs.resize, programs.decode)]
    for step in range(1, 4):
        ask(dataclasses.replace(setup, seed=step), params, *requests[::-1], step=step)
    assert [f._cache_size() for f in (programs.prefill, programs.enter, programs.resize, programs.decode)] == before


def rows_of(setup, mesh, active):
    static = {"cfg": CFG, "dtype": jnp.float32, "mesh": mesh, "unrolled": True}
    slots = programs.empty_slots(rows=len(active), slots=128, **static)
    return slots._replace(active_R=jnp.array(active), limit_R=jnp.arange(len(active), dtype=jnp.int32))


def test_rows_that_ended_stay_ended_when_rows_are_moved(setup, mesh):
    """Rows 0 and 2 go on, row 1 has ended; the fourth new row is nobody's."""
    slots = rows_of(setup, mesh, [True, False, True])
    moved = programs.resize(slots, jnp.array([2, 1, 0, -1]), slots_to=256, mesh=mesh)
    assert moved.active_R.tolist() == [True, False, True, False] and moved.limit_R.tolist()[:3] == [2, 1, 0]
    assert moved.ring == 256


def test_rows_are_changed_where_they_lie(setup, mesh):
    """Without donation the cache of all rows is there twice while a prompt enters or a row is halted."""
    slots = rows_of(setup, mesh, [True, True])
    prompt = KVCache(*(jnp.zeros((CFG.layers, CFG.kv_heads, 64, CFG.head_dim)) for _ in range(2)))
    row_R = np.zeros(2, np.int32)
    entry = programs.Entry(np.int32(1), row_R, row_R, np.zeros((2, 4), np.int32))
    entered = programs.enter(slots, prompt, np.int32(3), np.int32(7), entry, step_key(0, 0), mesh=mesh)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(slots.cache))
    programs.halt(entered, jnp.array([True, False]), mesh=mesh)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(entered.cache))


def test_decoding_copies_neither_weights_nor_cache(mesh):
    """The compiled program: the cache is updated where it lies, and all temporaries are small beside it."""
    cfg = tiny_config("qwen3", layers=8, width=64, mlp_width=256, vocab=64)
    params = init_params(cfg, jax.random.key(0))
    layout = {"dtype": jnp.float32, "mesh": mesh, "unrolled": True}
    weights = weights_of(EngineSetup(cfg, mesh, (), 0, Room(4, 4096), jnp.float32, layout["unrolled"]), params).decoding
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


def test_each_position_of_each_name_has_a_random_number_of_its_own():
    """Among 4,096 equal logits the id is the uniform number: of 48 no two are alike, and they are as jax makes them."""
    names = jnp.array([(kind, problem, sample, 0) for kind in (0, 1) for problem in (0, 1) for sample in (0, 1, 2)])
    key_B = jnp.repeat(row_keys(step_key(3, 5), names), 4)
    position_B = jnp.tile(jnp.arange(4, dtype=jnp.int32), 12)
    ids, logp, kept = draw(jnp.zeros((48, 4096)), key_B, position_B, SamplingConfig())
    own_B = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in)(key_B, position_B))
    np.testing.assert_array_equal(ids, np.floor(np.asarray(own_B) * 4096))
    assert len(set(np.asarray(ids).tolist())) == 48
    np.testing.assert_allclose(logp, -np.log(4096), rtol=1e-6)
    assert (kept == 1).all()


def test_only_kept_tokens_are_drawn(rng):
    logits_BV = jnp.asarray(np.tile(rng.normal(size=(1, 64)), (256, 1)), jnp.float32)
    name_B4 = jnp.array([(0, p, 0, 0) for p in range(256)], jnp.int32)
    keys = row_keys(step_key(0, 0), name_B4)
    tokens, _, kept = draw(logits_BV, keys, jnp.zeros(256, jnp.int32), SamplingConfig(top_k=3))
    prob = np.sort(np.asarray(jax.nn.softmax(logits_BV[0])))
    np.testing.assert_allclose(kept, prob[-3:].sum(), rtol=1e-5)
    assert set(np.asarray(tokens)) == set(np.argsort(-np.asarray(logits_BV[0]))[:3])
