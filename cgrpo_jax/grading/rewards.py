"""Scores responses: the graders run in worker processes, and the reward options say what their verdicts are worth."""

from __future__ import annotations

from collections.abc import Sequence

from cgrpo_jax.config.options import RewardConfig
from cgrpo_jax.grading import functions
from cgrpo_jax.grading.grader import Job
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.records import Attempt, Completion, Problem

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

WHOLE = RewardConfig()


def score(
    items: Sequence[tuple[Problem, Completion, str]],
    verifier: Verifier,
    cfg: RewardConfig = WHOLE,
    own: functions.Functions | None = None,
    step: int = 0,
) -> list[Attempt]:
    """Scores each (problem, completion, its text); a response without an answer gets 0.

    Args:
      own: scores the problems whose grader is `functions.GRADER`, with an answer in the text or without.
      step: of the run, which `own` is told.

    Raises: VerifierError where the worker processes cannot run.
    """
    jobs = [Job(one.grader, one.answer, text, question=one.question, entry=one.entry) for one, _, text in items]
    graded = verifier.grade(jobs)
    verdicts = [verdict for _, verdict in graded]
    if own is not None:
        chosen = [i for i, item in enumerate(items) if item[0].grader == functions.GRADER]
        for i, verdict in zip(chosen, own.grade([items[i] for i in chosen], step), strict=True):
            verdicts[i] = verdict
    scored = []
    for (problem, completion, text), (answer, _), verdict in zip(items, graded, verdicts, strict=True):
        own_verdict = problem.grader == functions.GRADER
        correct = verdict.correct if own_verdict else verdict.reward >= cfg.correct_at
        reward = verdict.reward if cfg.partial or own_verdict else float(correct)
        scored.append(Attempt(completion, text, reward, correct, answer, verdict.status, parts=verdict.parts))
    return scored


def votes(answers: Sequence[tuple[Problem, str | None]], verifier: Verifier) -> list[str | None]:
    """What each answer counts for in a majority vote: itself, or the letter of the option that it names; None: none."""
    found = [answer for _, answer in answers]
    chosen = [i for i, (problem, answer) in enumerate(answers) if problem.grader == "choice" and answer is not None]
    jobs = [Job("option", "", found[i], entry=answers[i][0].entry) for i in chosen]
    letters = verifier.grade(jobs) if jobs else []
    for i, letter in zip(chosen, letters, strict=True):
        found[i] = letter.extracted
    return found
