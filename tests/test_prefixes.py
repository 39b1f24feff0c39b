"""What prompts have in common is prefilled once, and long ones in chunks: tokens, counts and memory."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import engine_of
from test_sampler import CFG, SAMPLING, ask, params, request, same, setup, with_room  # noqa: F401

from cgrpo_jax.config.options import SamplerMemory
from cgrpo_jax.records import Kind
from cgrpo_jax.rollout.stories import sample_all
from cgrpo_jax.sampling import programs, room
from cgrpo_jax.sampling.room import Room, cut, fixed_sizes, prefix_sizes, shared_prefixes


def test_prompts_are_cut_at_few_places():
    assert prefix_sizes(64) == [] and prefix_sizes(65) == [64] and prefix_sizes(300) == [64, 96, 128, 192, 256]
    assert prefix_sizes(9216)[8:] == [1024, 1536, 2048, 4096, 6144, 8192]


def test_a_long_prompt_is_run_in_chunks():
    assert [cut(n, 0) for n in (1, 2048, 2049, 4096, 9216)] == [0, 0, 2048, 2048, 8192]
    assert [cut(n, 128) for n in (129, 2176, 2177)] == [128, 128, 2048]
    assert all(cut(n, s) in (0, *prefix_sizes(n)) for n in range(1, 9217, 7) for s in (0, *prefix_sizes(n)))


def siblings(rng, count, start, problem=0, kind=Kind.REFINEMENT):
    """Requests of one problem whose prompts begin alike and go on apart, for 20 to 60 ids."""
    tails = [rng.integers(0, CFG.vocab, int(n)).tolist() for n in rng.integers(20, 61, count)]
    return [request([*start, *tail], problem, g, kind, limit=6) for g, tail in enumerate(tails)]


def test_only_siblings_share_and_only_where_it_saves(rng):
    start = rng.integers(0, CFG.vocab, 200).tolist()
    alike, other = siblings(rng, 4, start), siblings(rng, 1, start, problem=1)
    found = shared_prefixes(alike + other)
    assert found == {tuple(r.prompt_ids): 192 for r in alike}
    assert shared_prefixes(siblings(rng, 4, start[:63])) == {}  # less than the least size is common
    assert shared_prefixes([request(start, 0, g) for g in range(4)]) == {}
    short = [request([*start[:64], g], 0, g) for g in range(2)]  # nothing is left to run behind the prefix
    assert shared_prefixes(short) == {}


def test_a_shared_beginning_is_run_once_and_changes_no_token(setup, params, rng):  # noqa: F811
    """Against the same prompts as of problems of their own, whose random numbers are named alike."""
    start = rng.integers(0, CFG.vocab, 150).tolist()
    asked = siblings(rng, 5, start) + siblings(rng, 3, start[:100], problem=1)
    wide = with_room(setup, 8)
    engine = engine_of(wide, params, 0, SAMPLING)
    together = sample_all(engine, asked)
    for one, alone in zip(together, [ask(wide, params, r)[0] for r in asked], strict=True):
        same(one, alone)
    lengths = [len(r.prompt_ids) - 1 for r in asked]
    assert engine.stats.prefilled == sum(lengths) - 4 * 128 - 2 * 96


def test_little_room_and_few_rows_change_nothing(setup, params, rng):  # noqa: F811
    """Prefixes that were let go are prefilled again; nothing of them is left at the end."""
    starts = [rng.integers(0, CFG.vocab, 130 + 10 * p).tolist() for p in range(3)]
    asked = [r for p, start in enumerate(starts) for r in siblings(rng, 4, start, problem=p)]
    asked = [asked[i] for i in rng.permutation(len(asked))]
    plenty = ask(with_room(setup, 12), params, *asked)
    for one, other in zip(ask(with_room(setup, 2, 384), params, *asked), plenty, strict=True):
        same(one, other)


def test_a_prefix_that_is_there_stays_while_another_is_made(setup, params, rng):  # noqa: F811
    """The oldest of what is held is a part's own prefix, and there is no room for the other one beside the rest."""
    a, b = (rng.integers(0, CFG.vocab, 128).tolist() for _ in range(2))
    asked = [r for p, start in enumerate((a, b)) for r in siblings(rng, 2, start, problem=p)]
    others = [request(rng.integers(0, CFG.vocab, n).tolist(), p, limit=1) for p, n in ((2, 1000), (3, 60))]
    engine = engine_of(with_room(setup, 8, 1280), params, 0, SAMPLING)
    engine.submit([*asked, *others])
    prompts = [tuple(r.prompt_ids) for r in asked]
    for ids in (engine._prefix(prompts[0]), *(tuple(r.prompt_ids) for r in others)):
        engine._prefill([ids])
    (part,) = engine._parts(prompts)
    engine._prefill(part)
    assert set(prompts) <= engine.prompts.keys()
    assert sum(prompt.k_BKSH.shape[-2] for prompt in engine.prompts.values()) <= 1280


@pytest.mark.parametrize("chunk", [64, 128])
def test_chunks_change_no_token(setup, params, rng, monkeypatch, chunk):  # noqa: F811
    prompts = [rng.integers(0, CFG.vocab, n).tolist() for n in (40, 65, 130, 250, 390)]
    asked = [request(prompt, p, limit=5) for p, prompt in enumerate(prompts)]
    plain = ask(with_room(setup, 8), params, *asked)
    monkeypatch.setattr(room, "PREFILL_CHUNK", chunk)
    widths, prefill = [], programs.prefill

    def watched(weights, tokens_QT, pasts, **static):
        widths.append(tokens_QT.shape[1])
        return prefill(weights, tokens_QT, pasts, **static)

    monkeypatch.setattr(programs, "prefill", watched)
    engine = engine_of(with_room(setup, 8), params, 0, SAMPLING)
    for one, other in zip(sample_all(engine, asked), plain, strict=True):
        same(one, other)
    assert max(widths) == chunk and engine.stats.prefilled == sum(len(prompt) - 1 for prompt in prompts)


def test_a_chunk_takes_less_memory_than_the_whole(setup, params):  # noqa: F811
    static = {"cfg": setup.model, "dtype": setup.dtype, "mesh": setup.mesh}

    def temporary(rest, before):
        past = jax.eval_shape(lambda t: programs.prefill(params, t, **static), np.zeros((1, before or 64), np.int32))
        pasts, sizes = (tuple(past), {"before": before, "whole": before + rest}) if before else ((), {})
        made = programs.prefill.lower(params, np.zeros((1, rest), np.int32), pasts, **static, **sizes).compile()
        return made.memory_analysis().temp_size_in_bytes

    assert temporary(128, 896) < 0.5 * temporary(1024, 0)


def test_fixed_sizes_share_nothing(setup, params, rng):  # noqa: F811
    """Programs are few there: a prompt is run as a whole."""
    asked = siblings(rng, 3, rng.integers(0, CFG.vocab, 150).tolist())
    small = Room(4, 1024, fixed_sizes(SamplerMemory(rings="384x4", prefills="256")))
    engine = engine_of(dataclasses.replace(setup, room=small), params, 0, SAMPLING)
    sample_all(engine, asked)
    assert engine.stats.prefilled == sum(len(r.prompt_ids) - 1 for r in asked)
