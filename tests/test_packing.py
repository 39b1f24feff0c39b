"""Segments in bins: everything is there once, in its place, and nothing else is."""

import json
import pathlib

import numpy as np
import pytest

from cgrpo_jax.learning.packing import Bins, PackingError, Terms, bin_size, ladder, pack, pack_smallest, shares_prompts
from cgrpo_jax.records import Segment

ALL = Terms(ce=True, ent=True, kl=True, sampler=True)


def segment(rng, prompt, length, silent=False, refined=False):
    draw = rng.normal(size=(4, length)) * (not silent)
    logp = rng.normal(size=length).astype(np.float32)
    return Segment(prompt, rng.integers(100, 200, length).astype(np.int32), refined, *draw, logp)


def segments(rng, problems=5, group=4, longest_prompt=9, longest=12):
    made = []
    for p in range(problems):
        prompt = [p, *rng.integers(0, 100, rng.integers(0, longest_prompt)).tolist()]
        made += [segment(rng, prompt, int(rng.integers(1, longest + 1)), refined=g == 3) for g in range(group)]
    return made


def size(share, problems=5, group=4, at_once=2, devices=1, prompt=9, ids=12):
    return bin_size(
        share=share, problems=problems, group=group, at_once=at_once, row_devices=devices, longest_prompt=prompt,
        longest_ids=ids,
    )  # fmt: skip


def unpack(bins: Bins):
    """(prompt and ids, weights...) of each segment in the bins, read without the packer's help."""
    found = []
    for a in range(int(bins.count)):
        for r, numbers in enumerate(bins.segment_ABT[a]):
            for number in range(1, numbers.max(initial=0) + 1):
                (where,) = np.nonzero(numbers == number)
                at = (a, r, where)
                scored = bins.scored_ABT[at]
                shared = []
                if bins.prompt_AQS is not None:
                    q = r // (bins.segment_ABT.shape[1] // bins.prompt_AQS.shape[1])
                    shared = bins.prompt_AQS[a, q, : bins.prompt_length_AQ[a, q]].tolist()
                fed, target = bins.token_ABT[at], bins.target_ABT[at]
                assert (fed[1:] == target[:-1]).all() and (np.diff(where) == 1).all()
                assert (bins.position_ABT[at] == len(shared) + np.arange(len(where))).all()
                text = (*shared, *fed.tolist(), int(target[-1]))
                assert scored[-scored.sum() :].all()
                at = (a, r, where[scored])
                weights = (bins.pg_ABT, bins.ce_ABT, bins.ent_ABT, bins.kl_ABT, bins.sampler_logp_ABT)
                found.append((text, bool(bins.refined_ABT[at].all()), *(x[at].tolist() for x in weights)))
    return sorted(found)


def expected(made):
    def rounded(x):
        return np.asarray(x, np.float32).tolist()

    return sorted(
        (
            (*s.prompt_ids, *s.ids.tolist()),
            s.refined,
            *map(rounded, (s.pg_T, s.ce_T, s.ent_T, s.kl_T, s.sampler_logp_T)),
        )
        for s in made
    )


@pytest.mark.parametrize("share", [True, False])
def test_every_segment_is_there_once(rng, share):
    made = segments(rng)
    bins = pack(made, size(share), ALL)
    assert unpack(bins) == expected(made)
    assert 0 < bins.count <= len(bins.token_ABT)
    assert not bins.scored_ABT[int(bins.count) :].any() and not bins.segment_ABT[int(bins.count) :].any()


@pytest.mark.parametrize("share", [True, False])
def test_segments_without_weight_are_not_packed(rng, share):
    """Nor do they take a bin; an update of nothing has none."""
    made = segments(rng, problems=4)
    silent = [s._replace(pg_T=0 * s.pg_T, ce_T=0 * s.ce_T, ent_T=0 * s.ent_T, kl_T=0 * s.kl_T) for s in made[4:]]
    bins = pack(made[:4] + silent, size(share, at_once=1), ALL)
    assert unpack(bins) == expected(made[:4]) and bins.count == 1
    nothing = pack(silent, size(share), ALL)
    assert nothing.count == 0 and not nothing.segment_ABT.any()
    for name in ("pg_T", "ce_T", "ent_T", "kl_T"):
        assert pack([silent[0]._replace(**{name: np.ones(len(silent[0].ids))})], size(share), ALL).count == 1


def test_long_rows_hold_several_segments(rng):
    """First fit, longest first: eight of at most 40 tokens need fewer rows of 160 than eight."""
    made = [segment(rng, [1, 2, 3], n) for n in (40, 40, 33, 30, 20, 9, 5, 1)]
    long = size(True, problems=1, group=8, at_once=1, ids=160)
    assert long.rows == 4 and long.tokens == 160
    bins = pack(made, long, ALL)
    assert unpack(bins) == expected(made) and bins.count == 1
    used = [row for row in bins.segment_ABT[0] if row.any()]
    assert len(used) == 2 and used[0].max() >= 4


def test_a_problem_that_needs_more_rows_stands_behind_its_prompt_twice(rng):
    made = [segment(rng, [7, 8, 9], 150) for _ in range(8)]
    bins = pack(made, size(True, problems=1, group=8, at_once=1, ids=160), ALL)
    assert bins.count == 2 and unpack(bins) == expected(made)
    assert (bins.prompt_AQS[0] == bins.prompt_AQS[1]).all()


def test_the_capacity_holds_the_worst_case(rng):
    """Every segment as long as can be, for shared and own prompts, on 1, 3 and 8 devices."""
    for share in (True, False):
        for devices in (1, 3, 8):
            for at_once in (0, 2, 5):
                made = [segment(rng, [p] * 9, 12) for p in range(5) for _ in range(4)]
                of = size(share, at_once=at_once, devices=devices)
                assert of.rows % devices == 0 and of.prompts % devices == 0
                assert unpack(pack(made, of, ALL)) == expected(made)


def test_recorded_lengths_fill_nine_tenths_of_the_bins(rng):
    """64 problems x 8 answers of a real model (mean 138, 13 % at 512): rows that hold their own prompts."""
    lengths = json.loads((pathlib.Path(__file__).parent / "lengths.json").read_text())
    made = [
        segment(rng, list(range(prompt)), length)
        for prompt, own in zip(lengths["prompt_tokens"], lengths["response_tokens"], strict=True)
        for length in own
    ]
    longest = max(lengths["prompt_tokens"])
    for devices in (1, 16):
        of = size(False, 64, 8, at_once=0, devices=devices, prompt=longest, ids=512)
        bins = pack(made, of, Terms())
        places = int(bins.count) * of.rows * of.tokens
        assert of.rows == devices and 0.9 < (bins.segment_ABT > 0).sum() / places <= 1


def test_what_does_not_fit_is_refused(rng):
    with pytest.raises(PackingError, match="a segment of 200 tokens does not fit rows of 128"):
        pack([segment(rng, [1], 200)], size(False), ALL)
    with pytest.raises(PackingError, match="a segment of 200 tokens does not fit rows of 64"):
        pack([segment(rng, [1], 200)], size(True), ALL)
    with pytest.raises(PackingError, match="a prompt of 90 tokens does not fit 64 slots"):
        pack([segment(rng, [1] * 90, 3)], size(True), ALL)
    with pytest.raises(PackingError, match="do not fit 3 bins"):
        pack([segment(rng, [p], 3) for p in range(9)], size(True), ALL)


def test_terms_that_a_run_lacks_are_no_arrays(rng):
    bins = pack(segments(rng), size(True), Terms())
    assert bins.ce_ABT is None and bins.ent_ABT is None and bins.kl_ABT is None and bins.sampler_logp_ABT is not None


def test_who_shares():
    assert shares_prompts("cpu") and not shares_prompts("tpu")


def test_ladder_bounds_the_shapes():
    assert [ladder(n) for n in (1, 64, 65, 97, 128, 129)] == [64, 64, 80, 112, 128, 160]
    sizes = {ladder(n) for n in range(1, 8193)}
    assert len(sizes) < 32 and all(n <= ladder(n) < max(65, 1.25 * n + 8) for n in range(1, 8193))


def test_the_smallest_size_that_holds_all_is_taken(rng):
    small, large = size(True), size(True, prompt=200)
    assert pack_smallest([segment(rng, [1] * 9, 3)], (small, large), ALL).prompt_AQS.shape == (3, 2, 64)
    long = [segment(rng, [1] * 9, 3), segment(rng, [1] * 90, 3)]
    bins = pack_smallest(long, (small, large), ALL)
    assert bins.prompt_AQS.shape == (3, 2, large.prompt_slots) and unpack(bins) == expected(long)
    with pytest.raises(PackingError, match="a prompt of 300 tokens"):
        pack_smallest([segment(rng, [1] * 300, 3)], (small, large), ALL)
