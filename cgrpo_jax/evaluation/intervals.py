"""Statistics of sampled answers, over arrays with a row per problem (numpy only).

P rows, D distinct problems, G samples of a row, K values of k, T tasks. What varies is the problem: every interval and
test is over distinct problems, never over samples or copies, which are no independent evidence of each other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

CHUNK = 1 << 22  # numbers drawn at once

Same = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]  # are the two answers of each pair equivalent?


class Paired(NamedTuple):
    """What two runs over the same problems differ by: second minus first."""

    difference: float
    low: float  # 95 % interval of the difference, bootstrap over problems
    high: float
    p: float  # two-sided


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of `count` problems (Wilson 1927).

    With several samples a problem the mean of each lies between 0 and 1, so this interval is on the safe side.
    """
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def average_copies(values_P: np.ndarray, content_P: Sequence[str]) -> np.ndarray:
    """Mean over the rows of each distinct problem, in order of first appearance: `[P, ...]` -> `[Z, ...]`.

    Args:
      content_P: digests of the problems, equal for copies.
    """
    rows: dict[str, list[int]] = {}
    for p, content in enumerate(content_P):
        rows.setdefault(content, []).append(p)
    return np.array([np.mean(values_P[copies], axis=0) for copies in rows.values()])


def _check_ks(ks: Sequence[int], samples: int) -> None:
    if wrong := [k for k in ks if not 1 <= k <= samples]:
        raise ValueError(f"pass@k with k = {wrong[0]} needs 1 <= k <= G, and there are G = {samples} samples a problem")


def pass_at_k(correct_PG: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """Probability that k of a problem's G samples, drawn without replacement, hold a correct one: `[X, P]`.

    1 - C(G-c, k) / C(G, k) with c correct samples (Chen et al. 2021, arXiv 2107.03374, equation 1): the unbiased
    estimate of pass@k. The quotient is the product of (G-k-j) / (G-j) over j < c, all of them in [0, 1].

    Raises:
      ValueError: a k below 1 or above G.
    """
    samples = correct_PG.shape[1]
    _check_ks(ks, samples)
    j_G = np.arange(samples)
    factor_XG = np.maximum(samples - np.array(ks)[:, None] - j_G, 0) / (samples - j_G)
    none_Xc = np.concatenate([np.ones((len(ks), 1)), np.cumprod(factor_XG, axis=1)], axis=1)  # by the number correct
    return 1.0 - none_Xc[:, np.count_nonzero(correct_PG, axis=1)]


def first_k(correct_PG: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """1.0 where one of the first k samples of a problem is correct, else 0.0: `[X, P]`.

    As the paper counts pass@k (arXiv 2506.03106, section 5): unbiased too, but with more variance than `pass_at_k`.

    Raises:
      ValueError: a k below 1 or above G.
    """
    _check_ks(ks, correct_PG.shape[1])
    any_PG = np.logical_or.accumulate(correct_PG.astype(bool), axis=1)
    return any_PG[:, np.array(ks) - 1].T.astype(float)


def majority(cluster_PG: np.ndarray, correct_PG: np.ndarray) -> np.ndarray:
    """maj@G: whether the most frequent answer of each problem is correct, `[P]` in [0, 1].

    Args:
      cluster_PG: equal numbers for equivalent answers of a problem, as of `cluster_problems`; -1: no answer, no vote.

    Of tied clusters each counts alike: the value is what a fair draw among them is expected to score. It is also the
    expectation over the members of a cluster where the grader disagrees on them. 0 where nothing was answered.
    """
    value_P = np.zeros(len(cluster_PG))
    for p, (cluster_G, correct_G) in enumerate(zip(cluster_PG, correct_PG, strict=True)):
        voted_G = cluster_G >= 0
        if voted_G.any():
            _, which, votes = np.unique(cluster_G[voted_G], return_inverse=True, return_counts=True)
            # tied clusters are of one size: the mean over their members is the mean over the clusters
            value_P[p] = correct_G[voted_G][votes[which] == votes.max()].mean()
    return value_P


def cluster_problems(answers_PG: Sequence[Sequence[str | None]], same: Same, most_calls: int = 16) -> np.ndarray:
    """Numbers equivalent answers of a problem alike, int32 `[P, G]`; -1 for None.

    Equal strings are one answer. Then, in each call of `same`, the most frequent string of every problem that has no
    number yet is compared with all others that have none: pairs are (that string, another), and what is the same joins
    it. So equivalence need not be transitive, and a batch holds the pairs of all problems.

    Args:
      most_calls: bound on the calls of `same`. Strings that are left over (the rarest) are clusters of their own.

    Raises:
      ValueError: `same` answered another number of pairs, or problems differ in their number of answers.
    """
    rest_P = [[text for text, _ in Counter(a for a in row if a is not None).most_common()] for row in answers_PG]
    number_P: list[dict[str | None, int]] = [{None: -1} for _ in answers_PG]
    for call in range(most_calls):
        pairs = [(rest[0], other) for rest in rest_P for other in rest[1:]]
        if not pairs:
            break
        verdicts = list(same(pairs))
        if len(verdicts) != len(pairs):
            raise ValueError(f"{len(pairs)} pairs of answers were compared, but {len(verdicts)} verdicts came back")
        verdict = iter(verdicts)
        for p, rest in enumerate(rest_P):
            alike = [other for other in rest[1:] if next(verdict)]
            number_P[p] |= dict.fromkeys(rest[:1] + alike, call)
            rest_P[p] = [text for text in rest if text not in number_P[p]]
    for number, rest in zip(number_P, rest_P, strict=True):
        number |= {text: most_calls + i for i, text in enumerate(rest)}
    rows = [[number[a] for a in row] for number, row in zip(number_P, answers_PG, strict=True)]
    if len({len(row) for row in rows}) > 1:
        raise ValueError("the problems differ in their number of answers")
    return np.array(rows, np.int32)


def _checked(values_P: np.ndarray) -> np.ndarray:
    values_P = np.asarray(values_P, float)
    if values_P.ndim != 1 or not values_P.size or not np.isfinite(values_P).all():
        raise ValueError(f"one finite value a problem is needed, at least one problem; got shape {values_P.shape}")
    return values_P


def _chunks(draws: int, width: int) -> Iterator[int]:
    size = max(1, CHUNK // width)
    for start in range(0, draws, size):
        yield min(size, draws - start)


def _resampled_means(values_P: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Means of `draws` resamples of P problems with replacement.

    Problems of one value are counted together: how often each value is drawn is multinomial. Exact, and cheap where
    values are few, as with G samples a problem.
    """
    value_U, count_U = np.unique(values_P, return_counts=True)
    total = len(values_P)
    drawn = [rng.multinomial(total, count_U / total, size=size) @ value_U for size in _chunks(draws, len(value_U))]
    return np.concatenate(drawn) / total


def bootstrap(values_P: np.ndarray, seed: int, draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean over problems (Efron 1979). The order of the problems does not matter.

    Values that are all alike, one problem's above all, have no resample that differs: see `of_alike`.

    Raises:
      ValueError: no problem, or a value that is not finite.
    """
    return bootstrap_tasks([values_P], seed, draws)


def of_alike(value: float, count: int, least: float = 0.0, most: float = 1.0) -> tuple[float, float]:
    """95 % interval of a mean where `count` problems have all the same value, in [least, most].

    That none of `count` problems differs still allows a share of all problems to differ: the upper end of Wilson's
    interval for 0 of `count`. Each of that share is taken to lie as far off as the range permits.
    """
    share = wilson(0.0, count)[1]
    return value - share * (value - least), value + share * (most - value)


def bootstrap_tasks(
    values_OP: Sequence[np.ndarray], seed: int, draws: int = 10_000, least: float = 0.0, most: float = 1.0
) -> tuple[float, float]:
    """As `bootstrap`, of the plain mean over tasks: problems are resampled within their task.

    Args:
      least, most: what a value can be, for tasks in which all are alike.
    """
    tasks = [_checked(values_P) for values_P in values_OP]
    alike = [bool(np.ptp(values_P) == 0) for values_P in tasks]
    if any(alike):
        each = [
            of_alike(float(values_P[0]), len(values_P), least, most) if same else bootstrap(values_P, seed, draws)
            for values_P, same in zip(tasks, alike, strict=True)
        ]
        low_O, high_O = zip(*each, strict=True)
        return of_mean([float(values_P.mean()) for values_P in tasks], low_O, high_O)
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(values_P, rng, draws) for values_P in tasks], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _sign_flip_p(term_P: np.ndarray, rng: np.random.Generator, draws: int) -> float:
    """Share of sign assignments with |sum| at least that of the terms as they are: all of them, where 2^P <= draws,
    else of `draws` random ones, among which the observed one is counted (so it is never 0)."""
    term_P = term_P[term_P != 0]
    limit = abs(term_P.sum()) - 1e-9 * np.abs(term_P).sum()  # sums that are equal but for rounding
    if 2 ** len(term_P) <= draws:
        sign = 1 - 2 * (np.arange(2 ** len(term_P))[:, None] >> np.arange(len(term_P)) & 1)
        return float(np.mean(np.abs(sign @ term_P) >= limit))
    size_U, count_U = np.unique(np.abs(term_P), return_counts=True)
    hits = 0
    for chunk in _chunks(draws, len(size_U)):
        positive = rng.binomial(count_U, 0.5, size=(chunk, len(size_U)))
        hits += int(np.count_nonzero(np.abs((2 * positive - count_U) @ size_U) >= limit))
    return (1 + hits) / (1 + draws)


def paired(a_P: np.ndarray, b_P: np.ndarray, seed: int, draws: int = 10_000) -> Paired:
    """Mean of b - a over the same problems, its 95 % bootstrap interval and a sign-flip permutation test.

    The test's hypothesis: on each problem the two runs could as well be swapped. Two-sided, not corrected for the
    number of comparisons a reader makes.

    Raises:
      ValueError: other shapes, no problem, or a value that is not finite.
    """
    return paired_tasks([a_P], [b_P], seed, draws)


def paired_tasks(a_OP: Sequence[np.ndarray], b_OP: Sequence[np.ndarray], seed: int, draws: int = 10_000) -> Paired:
    """As `paired`, of the plain mean over tasks of their mean differences."""
    for a_P, b_P in zip(a_OP, b_OP, strict=True):
        if np.shape(a_P) != np.shape(b_P):
            raise ValueError(f"paired values of {np.shape(a_P)} and {np.shape(b_P)} problems")
    d_OP = [_checked(b_P) - _checked(a_P) for a_P, b_P in zip(a_OP, b_OP, strict=True)]
    low, high = bootstrap_tasks(d_OP, seed, draws, least=-1.0)
    terms = np.concatenate([d_P / (len(d_P) * len(d_OP)) for d_P in d_OP])
    # the interval and the test draw from streams of their own
    return Paired(float(terms.sum()), low, high, _sign_flip_p(terms, np.random.default_rng([seed, 1]), draws))


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, ... up to G, and G itself."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def summarise(
    ids: Sequence[str],
    content_P: Sequence[str],
    correct_PG: np.ndarray,
    cluster_PG: np.ndarray,
    length_PG: np.ndarray,
    finished_PG: np.ndarray,
    answered_PG: np.ndarray,
    judged_PG: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """A task's entry of `results.json`: plain numbers, lists and strings.

    Accuracies are means over distinct problems, after the mean over the copies of each; length, truncated, no_answer
    and no_verdict are means over all answers.

    Args:
      ids: names of the rows, no two alike.
      content_P: digests of the problems, equal for copies; runs are compared by them.
      cluster_PG: of `cluster_problems`.
      length_PG: sampled tokens.
      finished_PG, answered_PG: ended by themselves; an answer was found in the text.
      judged_PG: a grader came to a verdict; where it did not (a time limit, say) the answer counts as wrong.

    Raises:
      ValueError: see `_check_one_each`.
    """
    rows, samples = correct_PG.shape
    _check_one_each(ids, content_P, (correct_PG, cluster_PG, length_PG, finished_PG, answered_PG, judged_PG))
    correct_PG = correct_PG.astype(bool)
    ks = powers_of_two(samples)
    correct_ZG = average_copies(correct_PG.astype(float), content_P)
    pass_X = average_copies(pass_at_k(correct_PG, ks).T, content_P).mean(axis=0)
    first_X = average_copies(first_k(correct_PG, ks).T, content_P).mean(axis=0)
    interval_X = [wilson(mean, len(correct_ZG)) for mean in pass_X.tolist()]
    names = [str(k) for k in ks]
    return {
        "problems": len(correct_ZG),
        "rows": rows,
        "samples": samples,
        "pass@1": float(correct_ZG.mean()),
        "pass@1/low": interval_X[0][0],
        "pass@1/high": interval_X[0][1],
        "pass@1/bootstrap": list(bootstrap(correct_ZG.mean(axis=1), seed)),
        "runs": correct_ZG.mean(axis=0).tolist(),
        "maj@G": float(average_copies(majority(cluster_PG, correct_PG), content_P).mean()),
        "pass@k": dict(zip(names, pass_X.tolist(), strict=True)),
        "pass@k/low": dict(zip(names, [low for low, _ in interval_X], strict=True)),
        "pass@k/high": dict(zip(names, [high for _, high in interval_X], strict=True)),
        "first@k": dict(zip(names, first_X.tolist(), strict=True)),
        "length": float(length_PG.mean()),
        "truncated": float(1 - finished_PG.astype(bool).mean()),
        "no_answer": float(1 - answered_PG.astype(bool).mean()),
        "no_verdict": float(1 - judged_PG.astype(bool).mean()),
        "ids": list(ids),
        "content": list(content_P),
        "correct": correct_PG.astype(int).tolist(),
    }


def _check_one_each(ids: Sequence[str], content_P: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
    """Raises ValueError for arrays that are not all of one shape [P, G], and for two rows with one id."""
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1 or len(arrays[0]) != len(ids) or len(content_P) != len(ids) or not arrays[0].size:
        raise ValueError(f"{len(ids)} problems with arrays of shapes {sorted(shapes)}: all must be [P, G]")
    if repeated := [name for name, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"{len(repeated)} problem ids are used more than once, the first is {repeated[0]!r}")


def scores_by_content(entry: Mapping[str, Any]) -> dict[str, float]:
    """pass@1 of each distinct problem of a task's entry, by the digest of its content."""
    values_P = np.mean(entry["correct"], axis=1)
    values_Z = average_copies(values_P, entry["content"])
    return dict(zip(dict.fromkeys(entry["content"]), values_Z.tolist(), strict=True))


def mean_of_tasks(tasks: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Entry `mean` of `results.json`: the plain mean over tasks, whatever their number of problems.

    A k above a task's G is left out; `pass@1/bootstrap` is stratified by task. Its interval beside that is `of_mean`.
    """
    entries = list(tasks.values())
    names = ("pass@1", "maj@G", "length", "truncated", "no_answer", "no_verdict")
    mean: dict[str, Any] = {name: sum(entry[name] for entry in entries) / len(entries) for name in names}
    shared = [k for k in entries[0]["pass@k"] if all(k in entry["pass@k"] for entry in entries)]
    for name in ("pass@k", "first@k"):
        mean[name] = {k: sum(entry[name][k] for entry in entries) / len(entries) for k in shared}
    if len({entry["samples"] for entry in entries}) == 1:
        mean["runs"] = np.mean([entry["runs"] for entry in entries], axis=0).tolist()
    values_OZ = [np.array(list(scores_by_content(entry).values())) for entry in entries]
    mean["pass@1/bootstrap"] = list(bootstrap_tasks(values_OZ, seed))
    mean["pass@1/low"], mean["pass@1/high"] = of_mean(
        *([entry[key] for entry in entries] for key in ("pass@1", "pass@1/low", "pass@1/high"))
    )
    return mean


def of_mean(values_O: Sequence[float], low_O: Sequence[float], high_O: Sequence[float]) -> tuple[float, float]:
    """Interval of the mean of independent accuracies from their own intervals (MOVER, Zou and Donner 2008).

    That of one task is its own.
    """
    below, above = np.subtract(values_O, low_O), np.subtract(high_O, values_O)
    mean, tasks = float(np.mean(values_O)), len(values_O)
    return mean - float(np.linalg.norm(below)) / tasks, mean + float(np.linalg.norm(above)) / tasks
