"""Statistics against enumeration, published values and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgrpo_jax.evaluation import intervals

correct_arrays = st.integers(1, 7).flatmap(
    lambda G: st.lists(st.lists(st.booleans(), min_size=G, max_size=G), min_size=1, max_size=4).map(np.array)
)
FEW = settings(max_examples=60, deadline=None)


def test_wilson_interval():
    """The examples of Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3: 81/263, 15/148, 0/20, 1/29;
    and 0 and 5 of 10 as widely tabulated."""
    for successes, count, expected in [
        (81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718)),
        (0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)),
    ]:  # fmt: skip
        assert intervals.wilson(successes / count, count) == pytest.approx(expected, abs=1e-4)


def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_correct_sample():
    for samples in range(1, 8):
        ks = list(range(1, samples + 1))
        correct_PG = np.array([[j < c for j in range(samples)] for c in range(samples + 1)])
        expected = [
            [np.mean([any(s) for s in itertools.combinations(row, k)]) for row in correct_PG.tolist()] for k in ks
        ]
        np.testing.assert_allclose(intervals.pass_at_k(correct_PG, ks), expected, atol=1e-15)


def test_pass_at_k_of_many_samples_equals_integer_arithmetic():
    """C(1000, 500) has 300 digits: a quotient of floats would overflow or lose everything."""
    samples, ks, cs = 1000, [1, 7, 500, 999, 1000], [0, 1, 3, 250, 999, 1000]
    correct_PG = np.array([[j < c for j in range(samples)] for c in cs])
    expected = [
        [1 - math.comb(samples - c, k) / math.comb(samples, k) if k <= samples - c else 1.0 for c in cs] for k in ks
    ]
    np.testing.assert_allclose(intervals.pass_at_k(correct_PG, ks), expected, rtol=1e-11)


@FEW
@given(correct_arrays)
def test_pass_at_k_never_falls_with_k_and_its_ends_are_mean_and_any(correct_PG):
    passed_KP = intervals.pass_at_k(correct_PG, range(1, correct_PG.shape[1] + 1))
    assert (np.diff(passed_KP, axis=0) >= 0).all() and passed_KP.min() >= 0 and passed_KP.max() <= 1
    np.testing.assert_allclose(passed_KP[0], correct_PG.mean(axis=1), atol=1e-15)
    np.testing.assert_array_equal(passed_KP[-1], correct_PG.any(axis=1))


@FEW
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 9))
def test_equal_samples_pass_alike_for_every_k(solved_P, samples):
    correct_PG = np.repeat(np.array(solved_P)[:, None], samples, axis=1)
    for measure in (intervals.pass_at_k, intervals.first_k):
        np.testing.assert_array_equal(measure(correct_PG, [1, samples]), [solved_P, solved_P])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_first_k_averaged_over_all_orders_is_pass_at_k(row):
    ks = list(range(1, len(row) + 1))
    orders_PG = np.array(list(itertools.permutations(row)))
    averaged = intervals.first_k(orders_PG, ks).mean(axis=1)
    np.testing.assert_allclose(averaged, intervals.pass_at_k(np.array([row]), ks)[:, 0], atol=1e-12)


def test_first_k_looks_at_the_first_k_only():
    correct_PG = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(
        intervals.first_k(correct_PG, [1, 2, 3, 4]), [[0, 1, 0], [0, 1, 0], [1, 1, 0], [1, 1, 0]]
    )


@pytest.mark.parametrize("k", [0, 5, -1])
@pytest.mark.parametrize("measure", [intervals.pass_at_k, intervals.first_k])
def test_a_k_without_samples_is_an_error_that_names_both(measure, k):
    with pytest.raises(ValueError, match=rf"k = {k} .*G = 4 samples"):
        measure(np.ones((2, 4), bool), [1, k])


def test_majority_takes_the_most_frequent_answer_and_the_mean_of_ties():
    cluster_PG = np.array([[0, 0, 1, 2], [5, 1, 1, 5], [0, 1, 2, -1], [-1, -1, -1, 3], [-1, -1, -1, -1], [0, 0, 0, 1]])
    correct_PG = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(intervals.majority(cluster_PG, correct_PG), [1, 0.5, 1 / 3, 1, 0, 0])


def test_majority_of_a_tie_is_the_expectation_of_a_fair_draw(rng):
    """Against counting by hand, where one of four answers is the right one."""
    cluster_PG = rng.integers(-1, 4, (200, 7))
    for cluster_G, value in zip(cluster_PG.tolist(), intervals.majority(cluster_PG, cluster_PG == 2), strict=True):
        votes = {c: cluster_G.count(c) for c in cluster_G if c >= 0}
        tied = [c for c, count in votes.items() if count == max(votes.values())]
        assert value == pytest.approx(np.mean([c == 2 for c in tied]) if tied else 0.0)


class Same:
    """Numbers that are equal as floats; counts calls and pairs."""

    def __init__(self):
        self.calls, self.pairs = 0, 0

    def __call__(self, pairs):
        self.calls, self.pairs = self.calls + 1, self.pairs + len(pairs)
        assert all(a != b for a, b in pairs)
        return [float(a) == float(b) for a, b in pairs]


def test_cluster_groups_equivalent_answers_in_few_calls():
    same = Same()
    got = intervals.cluster_problems([["1", "2", "1.0", None, "3", "1", "2.00", "1"]], same)[0]
    assert (got >= 0).tolist() == [True, True, True, False, True, True, True, True] and got[3] == -1
    assert got[0] == got[2] == got[5] == got[7] and got[1] == got[6] and len({*got.tolist()} - {-1}) == 3
    assert same.calls == 2 and same.pairs == 4 + 2
    same = Same()
    assert len(set(intervals.cluster_problems([["7"] * 50 + [None] * 3], same)[0].tolist())) == 2 and same.calls == 0


@FEW
@given(
    st.lists(
        st.lists(st.sampled_from(["1", "1.0", "1.00", "2", "2.0", "3", None]), min_size=6, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_clusters_of_many_problems_are_the_classes_of_each(answers_PG):
    same = Same()
    cluster_PG = intervals.cluster_problems(answers_PG, same)
    assert cluster_PG.shape == (len(answers_PG), 6) and same.calls <= 3
    for answers, cluster_G in zip(answers_PG, cluster_PG, strict=True):
        for (a, i), (b, j) in itertools.product(zip(answers, cluster_G, strict=True), repeat=2):
            assert (i == j) == ((a and float(a)) == (b and float(b)))
        np.testing.assert_array_equal((cluster_G < 0), [a is None for a in answers])


def test_calls_of_cluster_are_bounded_and_the_frequent_answer_comes_first():
    same = Same()
    answers = [str(i) for i in range(40)] + ["50", "50.0", "50"]
    got = intervals.cluster_problems([answers], same, most_calls=1)[0].tolist()
    assert same.calls == 1 and len(set(got)) == 41 and got[-1] == got[-2] == got[-3]


def test_cluster_refuses_a_wrong_number_of_verdicts_and_ragged_rows():
    with pytest.raises(ValueError, match="2 pairs of answers were compared, but 1 verdicts"):
        intervals.cluster_problems([["1", "2", "3"]], lambda pairs: [True])
    with pytest.raises(ValueError, match="differ in their number of answers"):
        intervals.cluster_problems([["1"], ["1", "2"]], Same())


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says(rng):
    """400 data sets of 60 problems with 4 samples each: 95 % within four standard deviations of the binomial count."""
    hits = 0
    for trial in range(400):
        skill_P = rng.beta(2, 3, size=60)  # mean 0.4
        low, high = intervals.bootstrap([rng.binomial(4, skill_P) / 4], trial, draws=500)
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / 400 <= 0.985


def test_bootstrap_is_the_plain_resampling_of_problems(rng):
    """Against resampling by index, of few and of all-different values."""
    for values_P in (rng.integers(0, 5, 80) / 4, rng.normal(size=80)):
        plain = values_P[rng.integers(0, 80, (40_000, 80))].mean(axis=1)
        got = intervals.bootstrap([values_P], seed=1, draws=40_000)
        np.testing.assert_allclose(got, np.quantile(plain, [0.025, 0.975]), atol=0.04 * plain.std() * 2)


def test_bootstrap_is_reproducible_and_blind_to_the_order_of_problems(rng):
    values_P = rng.random(31)
    first = intervals.bootstrap([values_P], 5)
    assert first == intervals.bootstrap([values_P[::-1]], 5) != intervals.bootstrap([values_P], 6)
    assert all(type(bound) is float for bound in first)
    assert intervals.bootstrap([np.ones(9)], 0) == pytest.approx(intervals.wilson(1.0, 9))


@pytest.mark.parametrize("count", [1, 2, 50])
def test_no_interval_is_without_width(count):
    """Of one problem, and of problems that are all alike: a bootstrap has the same mean in each resample."""
    for value in (0.0, 1 / 3, 1.0):
        low, high = intervals.bootstrap([np.full(count, value)], 0)
        assert 0 <= low <= value <= high <= 1 and high - low == pytest.approx(intervals.wilson(0.0, count)[1])
    a_P, b_P = np.full(count, 2 / 3), np.full(count, 1 / 3)
    for first, second, difference in ((a_P, b_P, -1 / 3), (a_P, a_P, 0.0), (b_P, a_P, 1 / 3)):
        found = intervals.paired(first, second, 0)
        assert found.difference == pytest.approx(difference) and -1 <= found.low < difference < found.high <= 1
        assert found.high - found.low == pytest.approx(2 * intervals.wilson(0.0, count)[1])


def test_bootstrap_of_tasks_resamples_within_each_task(rng):
    """However different the tasks are; one whose problems are all alike has the width of its own interval."""
    spread_P, other_P = rng.random(40), 0.5 * rng.random(40)
    (low, high), (other_low, other_high) = intervals.bootstrap([spread_P], 0), intervals.bootstrap([other_P], 0)
    both_low, both_high = intervals.bootstrap([spread_P, other_P], 0)
    assert both_high - both_low == pytest.approx(math.hypot(high - low, other_high - other_low) / 2, rel=0.06)
    half = intervals.bootstrap([spread_P, np.zeros(7)], 0)
    of_zeros = intervals.of_alike(0.0, 7)
    assert half == pytest.approx(intervals.of_mean([spread_P.mean(), 0.0], [low, of_zeros[0]], [high, of_zeros[1]]))


def test_interval_of_a_mean_of_tasks(rng):
    """One task keeps its own; of two, by hand; near the middle that of a bootstrap, and at the ends not without width."""
    assert intervals.of_mean([0.5], [0.3], [0.6]) == pytest.approx((0.3, 0.6))
    assert intervals.of_mean([0.5, 0.2], [0.2, 0.16], [0.58, 0.8]) == pytest.approx(
        (0.35 - math.hypot(0.3, 0.04) / 2, 0.35 + math.hypot(0.08, 0.6) / 2)
    )
    values_OP = [rng.random(300) < share for share in (0.4, 0.6, 0.5)]
    of_OX = [(values_P.mean(), *intervals.wilson(values_P.mean(), 300)) for values_P in values_OP]
    boot = intervals.bootstrap([values_P.astype(float) for values_P in values_OP], 0)
    assert intervals.of_mean(*zip(*of_OX, strict=True)) == pytest.approx(boot, abs=4e-3)
    low, high = intervals.of_mean([0.0, 0.0], *zip(*[intervals.wilson(0.0, 20)] * 2, strict=True))
    assert low == pytest.approx(0.0, abs=1e-9) and high == pytest.approx(intervals.wilson(0.0, 20)[1] / math.sqrt(2))


def test_paired_test_equals_the_enumeration_of_all_sign_flips():
    a_P = np.array([0.25, 0.5, 0.0, 1.0, 0.75, 0.25, 0.5, 0.0])
    b_P = np.array([0.75, 0.5, 0.5, 1.0, 0.50, 0.75, 1.0, 0.25])
    d = (b_P - a_P).tolist()
    as_extreme = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True))) >= abs(sum(d)) - 1e-12
        for signs in itertools.product([1, -1], repeat=8)
    ]
    got = intervals.paired(a_P, b_P, 0)
    assert got.p == pytest.approx(np.mean(as_extreme), abs=1e-12) and got.difference == pytest.approx(0.25)
    sampled = intervals.paired(a_P, b_P, 0, draws=60)  # 2^6 > 60: random sign flips
    many = intervals._sign_flip_p(np.tile(b_P - a_P, 3), np.random.default_rng(0), 20_000)
    assert 0.01 < sampled.p < 0.35 and 0 < many < got.p
    assert got.low < 0.25 < got.high


def test_random_sign_flips_agree_with_the_exact_share():
    """12 differences: 4096 sign assignments, exact at 10 000 draws; and as random draws of twenty times fewer."""
    d_P = np.array([1, 1, 1, -1, 2, 2, -2, 1, 1, -1, 1, 3]) / 4
    exact = intervals._sign_flip_p(d_P, np.random.default_rng(0), 4096)
    random = intervals._sign_flip_p(d_P, np.random.default_rng(0), 4095)
    sums = [abs(np.dot(signs, d_P)) >= abs(d_P.sum()) - 1e-12 for signs in itertools.product([1, -1], repeat=12)]
    assert exact == np.mean(sums)
    assert random == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4095)) and random != exact


def test_a_share_of_random_sign_flips_is_never_zero():
    """Forty differences of one sign: of 99 random assignments none is as extreme, and the observed one is counted."""
    assert intervals.paired(np.zeros(40), np.ones(40), 0, draws=99).p == 1 / 100


def test_paired_test_rejects_about_five_in_a_hundred_where_nothing_differs(rng):
    p = [
        intervals.paired(*(rng.binomial(4, rng.beta(2, 3, 40)[None].repeat(2, 0)) / 4), trial, draws=400).p
        for trial in range(300)
    ]
    assert 0.015 <= np.mean(np.array(p) <= 0.05) <= 0.095


def test_runs_that_agree_do_not_differ_and_a_swap_changes_the_sign(rng):
    a_P, b_P = rng.random(20), rng.random(20) + 0.2
    same = intervals.paired(a_P, a_P, 0)
    assert (same.difference, same.p) == (0.0, 1.0) and -same.low == same.high == intervals.wilson(0.0, 20)[1]
    there, back = intervals.paired(a_P, b_P, 0), intervals.paired(b_P, a_P, 0)
    assert there.difference == pytest.approx(-back.difference) and there.difference > 0 and there.p == back.p
    assert there.low == pytest.approx(-back.high, abs=0.02)


def test_values_that_cannot_be_averaged_are_refused():
    for bad in (np.array([]), np.array([1.0, np.nan]), np.ones((2, 2))):
        with pytest.raises(ValueError, match="one finite value a problem"):
            intervals.bootstrap([bad], 0)
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\) problems"):
        intervals.paired(np.ones(3), np.ones(4), 0)


def entry(**changes):
    values = {
        "ids": ["a", "b", "c"],
        "content_P": ["A", "B", "C"],
        "correct_PG": np.array([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool),
        "cluster_PG": np.array([[0, 1, 0, 2, 0], [0, 1, 1, -1, 2], [0, 0, 0, 0, 0]]),
        "length_PG": np.arange(15).reshape(3, 5),
        "finished_PG": np.array([[1, 1, 1, 1, 1], [1, 0, 0, 1, 1], [1, 1, 1, 1, 1]], bool),
        "answered_PG": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]], bool),
        "judged_PG": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool),
        "seed": 0,
    }  # fmt: skip
    return intervals.summarise(**values | changes)


def test_entry_of_a_task():
    got = entry()
    assert (got["problems"], got["rows"], got["samples"], got["ids"]) == (3, 3, 5, ["a", "b", "c"])
    assert list(got["pass@k"]) == list(got["first@k"]) == list(got["pass@k/low"]) == ["1", "2", "4", "5"]
    assert got["pass@1"] == pytest.approx(8 / 15) == got["pass@k"]["1"] and got["first@k"]["1"] == pytest.approx(2 / 3)
    assert got["pass@k"]["2"] == pytest.approx((0.9 + 0 + 1) / 3)  # 1 - C(2,2)/C(5,2) = 0.9
    assert got["pass@k"]["5"] == got["first@k"]["5"] == pytest.approx(2 / 3)
    assert (got["pass@1/low"], got["pass@1/high"]) == pytest.approx(intervals.wilson(8 / 15, 3))
    assert (got["pass@k/low"]["5"], got["pass@k/high"]["5"]) == pytest.approx(intervals.wilson(2 / 3, 3))
    assert got["pass@1/bootstrap"] == list(intervals.bootstrap([np.array([0.6, 0, 1])], 0))
    assert got["runs"] == pytest.approx([2 / 3, 1 / 3, 2 / 3, 1 / 3, 2 / 3]) and got["maj@G"] == pytest.approx(2 / 3)
    assert (
        got["length"] == 7 and got["truncated"] == pytest.approx(2 / 15) and got["no_answer"] == pytest.approx(1 / 15)
    )
    assert got["no_verdict"] == pytest.approx(3 / 15)  # time-outs, which stood in no figure
    assert got["content"] == ["A", "B", "C"] and got["correct"][0] == [1, 0, 1, 0, 1]


def test_copies_of_problems_are_averaged_before_anything_else():
    """The third row copies the first: two problems, of which the first passes 4 of 5 samples on average."""
    got, mean_D = entry(content_P=["A", "B", "A"]), np.array([0.8, 0])
    assert (got["problems"], got["rows"], len(got["correct"])) == (2, 3, 3)
    assert got["pass@1"] == pytest.approx(0.4) and got["maj@G"] == pytest.approx(0.5)
    assert got["pass@k"]["2"] == pytest.approx((0.9 + 1) / 2 / 2) and got["first@k"]["2"] == pytest.approx(0.5)
    assert got["runs"] == pytest.approx([0.5, 0.25, 0.5, 0.25, 0.5])
    assert (got["pass@1/low"], got["pass@1/high"]) == pytest.approx(intervals.wilson(0.4, 2))
    assert got["pass@1/bootstrap"] == pytest.approx(list(intervals.bootstrap([mean_D], 0)))
    assert intervals.mean_of_tasks({"T": got}, 0)["pass@1/bootstrap"] == pytest.approx(got["pass@1/bootstrap"])
    assert intervals.scores_by_content(got) == pytest.approx({"A": 0.8, "B": 0.0})


@FEW
@given(correct_arrays, st.integers(1, 5))
def test_whole_copies_of_a_set_change_no_figure_and_no_interval(correct_PG, copies):
    def of(times):
        rows = np.tile(correct_PG, (times, 1))
        P = len(rows)
        same = dict.fromkeys(("cluster_PG", "length_PG", "finished_PG", "answered_PG", "judged_PG"), rows)
        content_P = [str(p % len(correct_PG)) for p in range(P)]
        return entry(ids=[str(p) for p in range(P)], content_P=content_P, correct_PG=rows, **same)

    once, often = of(1), of(copies)
    for key in ("pass@1", "pass@1/low", "pass@1/high", "pass@1/bootstrap", "pass@k", "pass@k/low", "maj@G", "runs"):
        assert often[key] == pytest.approx(once[key]), key


def test_an_entry_survives_json():
    import json

    assert json.loads(json.dumps(entry(), allow_nan=False)) == entry()


def test_an_entry_of_clashing_arrays_is_refused():
    with pytest.raises(ValueError, match=r"3 problems with arrays of shapes .*\(3, 4\)"):
        entry(length_PG=np.ones((3, 4)))
    with pytest.raises(ValueError, match="2 problems with arrays"):
        entry(ids=["a", "b"])
    with pytest.raises(ValueError, match="3 problems with arrays"):
        entry(content_P=["A", "B"])
    with pytest.raises(ValueError, match="used more than once, the first is 'a'"):
        entry(ids=["a", "b", "a"])


def test_mean_over_tasks_is_plain_and_of_what_all_tasks_have():
    small = entry(**{name: np.ones((1, 2), bool) for name in ("correct_PG", "finished_PG", "answered_PG", "judged_PG")}, ids=["x"], content_P=["X"], cluster_PG=np.zeros((1, 2), int), length_PG=np.full((1, 2), 9))  # fmt: skip
    got = intervals.mean_of_tasks({"A": entry(), "B": small}, 0)
    assert got["pass@1"] == pytest.approx((8 / 15 + 1) / 2) and got["maj@G"] == pytest.approx(5 / 6)
    assert got["length"] == 8 and list(got["pass@k"]) == ["1", "2"] and "runs" not in got
    assert got["pass@1/bootstrap"][0] < got["pass@1"] < got["pass@1/bootstrap"][1]
    assert intervals.mean_of_tasks({"A": entry(), "B": entry()}, 0)["runs"] == pytest.approx(entry()["runs"])


def test_an_entry_has_the_accuracy_of_each_source_and_its_time_outs():
    from cgrpo_jax.data.tasks import NamedProblem
    from cgrpo_jax.evaluation.exam import accuracies, task_entry
    from cgrpo_jax.evaluation.tables import table
    from cgrpo_jax.records import Attempt, Completion, Problem

    ended = Completion(np.zeros(3, np.int32), np.zeros(3, np.float32), np.ones(3, np.float32), True)
    asked = [("aime", True, "ok"), ("aime", False, "timeout"), ("amc", False, "ok"), ("amc", False, "died")]
    task = [NamedProblem(str(i), Problem(f"{i}?", "1", (), tag=source)) for i, (source, _, _) in enumerate(asked)]
    attempts = [[Attempt(ended, "1", float(right), right, "1", status)] for _, right, status in asked]
    got = task_entry(task, attempts, None, 0)
    in_training = accuracies([named.problem for named in task], attempts, "eval")
    assert in_training["eval/no_verdict"] == 0.5 and in_training["eval/pass@1/aime"] == 0.5
    assert "eval/no_verdict" not in accuracies([task[0].problem], attempts[:1], "eval")
    assert got["no_verdict"] == 0.5 and {name: of["pass@1"] for name, of in got["sources"].items()} == {
        "aime": 0.5,
        "amc": 0.0,
    }
    sampling = {"seconds": 1.0, "tokens": 12, "tokens_per_s": None}
    results = {"tasks": {"validation": got}, "mean": intervals.mean_of_tasks({"validation": got}, 0), "notes": []}
    results["settings"] = {"temperature": 0.0, "top_p": 1.0}
    rows = {row[0]: row for row in table(results | {"sampling": sampling}).rows}
    assert list(rows) == ["validation", "validation: aime", "validation: amc"] and rows["validation"][-1] == "50.0"
    assert rows["validation: aime"][1:3] == [
        "2",
        f"50.0 [{100 * intervals.wilson(0.5, 2)[0]:.1f}, {100 * intervals.wilson(0.5, 2)[1]:.1f}]",
    ]
