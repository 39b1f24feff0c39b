"""Statistics of graded answers, over arrays with a row per problem and a column per sampled answer.

The unit that is resampled is the distinct problem: several samples of a problem, or several rows with the same problem,
are not independent evidence, so their mean counts once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Same = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]  # whether the two answers of each pair are equivalent


class Paired(NamedTuple):
    """The difference in accuracy of two runs on the same problems, the second less the first."""

    difference: float
    low: float  # 95 % bootstrap interval of the difference, over problems
    high: float
    p: float  # two-sided


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of an accuracy over `count` problems (Wilson 1927).

    It is meant for problems that are right or wrong. Where each problem's value is the mean of several samples their
    variance is smaller, and the interval is wider than it need be.
    """
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def average_copies(values_P: np.ndarray, content_P: Sequence[str]) -> np.ndarray:
    """Mean over the copies of each problem (equal digests), in order of appearance: `[P, ...]` -> `[Z, ...]`."""
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
    estimate of pass@k. The quotient is the product of (G-k-j) / (G-j) over j < c, all in [0, 1].

    Raises:
      ValueError: a k below 1 or above G.
    """
    samples = correct_PG.shape[1]
    _check_ks(ks, samples)
    j_G = np.arange(samples)
    factor_XG = np.maximum(samples - np.array(ks)[:, None] - j_G, 0) / (samples - j_G)
    none_Xc = np.concatenate([np.ones((len(ks), 1)), np.cumprod(factor_XG, axis=1)], axis=1)  # by c
    return 1.0 - none_Xc[:, np.count_nonzero(correct_PG, axis=1)]


def first_k(correct_PG: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """1.0 where one of the first k samples of a problem is correct, else 0.0: `[X, P]`.

    The paper counts pass@k so (arXiv 2506.03106, section 5). It is unbiased too, but varies more than `pass_at_k`.

    Raises:
      ValueError: a k below 1 or above G.
    """
    _check_ks(ks, correct_PG.shape[1])
    any_PG = np.logical_or.accumulate(correct_PG.astype(bool), axis=1)
    return any_PG[:, np.array(ks) - 1].T.astype(float)


def majority(cluster_PG: np.ndarray, correct_PG: np.ndarray) -> np.ndarray:
    """maj@G, the accuracy of the most frequent answer of each problem: `[P]` in [0, 1].

    Where several clusters of answers are the most frequent, the value is the expectation of a fair draw among them; so
    it is where the grader disagrees on the members of one cluster. 0 where no sample has an answer.

    Args:
      cluster_PG: of `cluster_problems`; a sample without an answer (-1) has no vote.
    """
    value_P = np.zeros(len(cluster_PG))
    for p, (cluster_G, correct_G) in enumerate(zip(cluster_PG, correct_PG, strict=True)):
        voted_G = cluster_G >= 0
        if voted_G.any():
            _, which, votes = np.unique(cluster_G[voted_G], return_inverse=True, return_counts=True)
            # tied clusters are of one size, so the mean over their members is the mean over the clusters
            value_P[p] = correct_G[voted_G][votes[which] == votes.max()].mean()
    return value_P


def cluster_problems(answers_PG: Sequence[Sequence[str | None]], same: Same, most_calls: int = 16) -> np.ndarray:
    """The cluster of each answer, int32 `[P, G]`: equivalent answers of a problem have one number; None has -1.

    Equal strings are one answer. In each call of `same`, which holds the pairs of all problems, the most frequent
    string of a problem that is in no cluster yet is compared with each other such string of that problem; those that
    are equivalent to it form its cluster. So equivalence need not be transitive.

    Args:
      most_calls: of `same`. Strings that are left over then (the rarest) are clusters of their own.

    Raises:
      ValueError: `same` answers another number of pairs, or problems differ in their number of answers.
    """
    if len({len(row) for row in answers_PG}) > 1:
        raise ValueError("the problems differ in their number of answers")
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
    return np.array([[number[a] for a in row] for number, row in zip(number_P, answers_PG, strict=True)], np.int32)


def of_alike(value: float, count: int, least: float = 0.0) -> tuple[float, float]:
    """95 % interval of a mean where `count` problems all have the same value, which lies in [least, 1].

    Among other problems some may still differ. Their share is at most the upper end of Wilson's interval for 0 of
    `count`, and each of them is taken to lie as far off as the range permits.
    """
    share = wilson(0.0, count)[1]
    return value - share * (value - least), value + share * (1.0 - value)


def _resampled_means(values_P: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Means of `draws` resamples of P problems with replacement.

    How often each distinct value is drawn is multinomial. That is exact, and cheap where values are few, as they are
    with G samples a problem.
    """
    value_U, count_U = np.unique(values_P, return_counts=True)
    return rng.multinomial(len(values_P), count_U / len(values_P), size=draws) @ value_U / len(values_P)


def bootstrap(
    values_OP: Sequence[np.ndarray], seed: int, draws: int = 10_000, least: float = 0.0
) -> tuple[float, float]:
    """95 % percentile interval (Efron 1979) of the plain mean over tasks of the mean over the problems of each.

    Problems are resampled within their task; their order does not matter. Where all values of a task are alike (those
    of a single problem, above all) every resample has the same mean, so its interval is that of `of_alike`, and the
    intervals of the tasks are combined by `of_mean`.

    Args:
      least: the smallest possible value; the largest is 1.

    Raises:
      ValueError: a task without a problem, or with a value that is not finite.
    """
    for values_P in values_OP:
        if np.ndim(values_P) != 1 or not np.size(values_P) or not np.isfinite(values_P).all():
            raise ValueError(f"one finite value a problem is needed, at least one problem; got {np.shape(values_P)}")
    alike = [bool(np.ptp(values_P) == 0) for values_P in values_OP]
    if any(alike):
        each = [
            of_alike(float(values_P[0]), len(values_P), least) if same else bootstrap([values_P], seed, draws)
            for values_P, same in zip(values_OP, alike, strict=True)
        ]
        return of_mean([float(values_P.mean()) for values_P in values_OP], *zip(*each, strict=True))
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(values_P, rng, draws) for values_P in values_OP], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _sign_flip_p(term_P: np.ndarray, rng: np.random.Generator, draws: int) -> float:
    """Share of sign assignments with |sum| at least that of the terms as they are.

    Of all 2^P assignments, where these are at most `draws`; else of `draws` random ones and the observed one, so that
    it is never 0.
    """
    term_P = term_P[term_P != 0]
    limit = abs(term_P.sum()) - 1e-9 * np.abs(term_P).sum()  # sums may differ by rounding
    if 2 ** len(term_P) <= draws:
        sign = 1 - 2 * (np.arange(2 ** len(term_P))[:, None] >> np.arange(len(term_P)) & 1)
        return float(np.mean(np.abs(sign @ term_P) >= limit))
    size_U, count_U = np.unique(np.abs(term_P), return_counts=True)
    positive = rng.binomial(count_U, 0.5, size=(draws, len(size_U)))
    return (1 + int(np.count_nonzero(np.abs((2 * positive - count_U) @ size_U) >= limit))) / (1 + draws)


def paired(a_P: np.ndarray, b_P: np.ndarray, seed: int, draws: int = 10_000) -> Paired:
    """Mean of b - a over the same problems, its 95 % bootstrap interval and a sign-flip permutation test.

    The null hypothesis of the test is that on each problem the values of the two runs could be swapped. The p-value is
    two-sided, and not corrected for the number of comparisons that a reader makes.

    Raises:
      ValueError: the runs have another number of problems, or as `bootstrap`.
    """
    if np.shape(a_P) != np.shape(b_P):
        raise ValueError(f"paired values of {np.shape(a_P)} and {np.shape(b_P)} problems")
    d_P = b_P - a_P
    low, high = bootstrap([d_P], seed, draws, least=-1.0)
    terms = d_P / len(d_P)
    # the interval and the test draw from streams of their own
    return Paired(float(terms.sum()), low, high, _sign_flip_p(terms, np.random.default_rng([seed, 1]), draws))


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
    """A task's entry of `results.json`, as JSON has it.

    Accuracies are means over distinct problems, after the mean over the copies of each; length, truncated, no_answer
    and no_verdict are means over all answers.

    Args:
      ids: names of the rows, no two alike.
      content_P: digests of the problems, equal for copies; two runs are compared on the problems with equal digests.
      cluster_PG: of `cluster_problems`.
      length_PG: sampled tokens.
      finished_PG: whether the model ended the answer itself; else the length limit did.
      answered_PG: whether an answer was found in the text.
      judged_PG: whether the grader came to a verdict; where it did not (a time limit, say) the answer counts as wrong.

    Raises:
      ValueError: arrays that are not all [P, G], or two rows with one name.
    """
    _check_one_each(ids, content_P, (correct_PG, cluster_PG, length_PG, finished_PG, answered_PG, judged_PG))
    rows, samples = correct_PG.shape
    correct_PG = correct_PG.astype(bool)
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples})  # 1, 2, 4, ... and G
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
        "pass@1/bootstrap": list(bootstrap([correct_ZG.mean(axis=1)], seed)),
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
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1 or len(arrays[0]) != len(ids) or len(content_P) != len(ids) or not arrays[0].size:
        raise ValueError(f"{len(ids)} problems with arrays of shapes {sorted(shapes)}: all must be [P, G]")
    if repeated := [name for name, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"{len(repeated)} problem ids are used more than once, the first is {repeated[0]!r}")


def scores_by_content(entry: Mapping[str, Any]) -> dict[str, float]:
    """pass@1 of each distinct problem of a task's entry: digest of the problem -> share of correct samples."""
    values_P = np.mean(entry["correct"], axis=1)
    values_Z = average_copies(values_P, entry["content"])
    return dict(zip(dict.fromkeys(entry["content"]), values_Z.tolist(), strict=True))


def mean_of_tasks(tasks: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Entry `mean` of `results.json`: the plain mean over tasks, whatever their number of problems.

    pass@k is left out for a k that some task has not (one above its G). pass@1 has two intervals: a bootstrap that is
    stratified by task, and that of `of_mean`.
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
    mean["pass@1/bootstrap"] = list(bootstrap(values_OZ, seed))
    mean["pass@1/low"], mean["pass@1/high"] = of_mean(
        *([entry[key] for entry in entries] for key in ("pass@1", "pass@1/low", "pass@1/high"))
    )
    return mean


def of_mean(values_O: Sequence[float], low_O: Sequence[float], high_O: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of independent accuracies, from the interval of each (MOVER, Zou and Donner 2008)."""
    below, above = np.subtract(values_O, low_O), np.subtract(high_O, values_O)
    mean, tasks = float(np.mean(values_O)), len(values_O)
    return mean - float(np.linalg.norm(below)) / tasks, mean + float(np.linalg.norm(above)) / tasks
