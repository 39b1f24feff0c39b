"""Scores responses. A grader turns (problem, extracted answer) into a verdict: 1 where it is correct, 0, or between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from cgrpo_jax.config.options import RewardConfig
from cgrpo_jax.grading import choices, equivalence, functions, percentages, release, theoremqa
from cgrpo_jax.grading.answers import extract_answer
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.records import Attempt, Completion, Problem, Verdict

# Tasks of reasoning_gym 0.1.25 whose scorer was read: it evaluates nothing of the answer, does bounded work, and gives
# 1 or more only to a right answer. Left out: scorers that call eval or sympy's parser on the answer, that raise on odd
# input, and those a wrong answer can satisfy. The first block compares strings; the second parses numbers or grids.
REASONING_GYM_TASKS = frozenset(
    (
        "acre", "aiw", "arc_1d", "base_conversion", "basic_arithmetic", "bf", "binary_alternation",
        "caesar_cipher", "count_bits", "count_primes", "course_schedule", "gcd", "isomorphic_strings",
        "largest_island", "lcm", "leg_counting", "letter_counting", "list_functions", "mahjong_puzzle", "maze",
        "modulo_grid", "number_filtering", "number_sequence", "ransom_note", "rotate_matrix", "rotten_oranges",
        "simple_equations", "simple_geometry", "string_manipulation", "string_splitting", "string_synthesis",
        "syllogism", "word_sequence_reversal",

        "chain_sum", "products", "decimal_chain_sum", "ab", "circuit_logic", "cryptarithm", "dice",
        "family_relationships", "futoshiki", "manipulate_matrix", "mini_sudoku", "needle_haystack",
        "rectangle_count", "self_reference", "shortest_path", "sudoku", "word_ladder", "zebra_puzzles",
    )
)  # fmt: skip


def exact(pairs: Sequence[tuple[Problem, str]], verifier: Verifier) -> list[Verdict]:
    """The answer is the gold string."""
    return [Verdict.of(answer == problem.answer) for problem, answer in pairs]


def math(pairs: Sequence[tuple[Problem, str]], verifier: Verifier) -> list[Verdict]:
    """Mathematical equivalence: part by part, what is no plain number by `math-verify` in the worker processes."""
    return equivalence.compare([(_gold(problem, answer), answer) for problem, answer in pairs], verifier)


def _gold(problem: Problem, answer: str) -> str:
    """The gold, with the percent sign that it was given without where only the answer has it."""
    missing = percentages.missing_sign(problem.question, problem.answer, answer)
    return f"{problem.answer}\\%" if missing else problem.answer


def gym(pairs: Sequence[tuple[Problem, str]], verifier: Verifier) -> list[Verdict]:
    """The scorer of a reasoning_gym task from the list above, from 0 to 1.

    Much of what it gives between is for an answer that contains the right one (0.5 to 12 where 2 is right).
    """
    import reasoning_gym  # an extra, and slow to import

    verdicts = []
    for problem, answer in pairs:
        assert problem.entry is not None
        entry = copy.deepcopy(dict(problem.entry))
        scorer = reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])
        try:
            found = min(float(scorer(answer, entry)), 1.0)
            verdicts.append(Verdict(found, found == 1.0, "ok") if found >= 0 else Verdict.of(False, "error"))
        except Exception:  # of code that is not ours, on hostile text: no reward, and counted
            verdicts.append(Verdict.of(False, "error"))
    return verdicts


GRADERS: dict[str, Callable[[Sequence[tuple[Problem, str]], Verifier], list[Verdict]]] = {
    "exact": exact,
    "math": math,
    "math_verify": release.grade,
    "choice": choices.grade,
    "theoremqa": theoremqa.grade,
    "reasoning_gym": gym,
}


WHOLE = RewardConfig()


def _of_options(problem: Problem, text: str) -> str | None:
    return choices.extract_choice(text, (problem.entry or {})["options"])


EXTRACTORS: dict[str, Callable[[Problem, str], str | None]] = {  # others: extract_answer
    "choice": _of_options,
    "math_verify": lambda problem, text: release.extract(text),
}


def extracted_from(problem: Problem, text: str) -> str | None:
    """The answer in a response, as the problem's grader reads it."""
    extract = EXTRACTORS.get(problem.grader)
    return extract(problem, text) if extract else extract_answer(text)


def score(
    items: Sequence[tuple[Problem, Completion, str]],
    verifier: Verifier,
    cfg: RewardConfig = WHOLE,
    own: functions.Functions | None = None,
    step: int = 0,
) -> list[Attempt]:
    """Scores (problem, completion, its text); a response without an answer gets 0 and asks nobody.

    Args:
      own: scores the problems whose grader is `functions.GRADER`, with an answer in the text or without.
      step: of the run, which `own` is told.
    """
    extracted = [extracted_from(problem, text) for problem, _, text in items]
    verdicts = [Verdict.of(False)] * len(items)
    for name, grade in GRADERS.items():
        chosen = [i for i, item in enumerate(items) if item[0].grader == name and extracted[i] is not None]
        if not chosen:
            continue
        pairs = [(items[i][0], extracted[i] or "") for i in chosen]
        for i, verdict in zip(chosen, grade(pairs, verifier), strict=True):
            verdicts[i] = verdict
    if own is not None:
        chosen = [i for i, item in enumerate(items) if item[0].grader == functions.GRADER]
        for i, verdict in zip(chosen, own.grade([items[i] for i in chosen], step), strict=True):
            verdicts[i] = verdict
    scored = []
    for (problem, completion, text), answer, verdict in zip(items, extracted, verdicts, strict=True):
        own_verdict = problem.grader == functions.GRADER
        correct = verdict.correct if own_verdict else verdict.reward >= cfg.correct_at
        reward = verdict.reward if cfg.partial or own_verdict else float(correct)
        scored.append(Attempt(completion, text, reward, correct, answer, verdict.status, parts=verdict.parts))
    return scored
