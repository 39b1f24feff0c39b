"""Graders: golds against themselves, labelled pairs, re-spellings, near misses, options, TheoremQA, hostile text."""

import json
import pathlib
import random
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

from cgrpo_jax.config.options import DataConfig, VerifierConfig
from cgrpo_jax.data.rows import choice_problem, parse_row, theoremqa_row
from cgrpo_jax.grading import choices, theoremqa
from cgrpo_jax.grading.normalise import clean, number
from cgrpo_jax.grading.verifier import Verifier

HERE = pathlib.Path(__file__).parent
PAIRS = [json.loads(line) for line in (HERE / "tricky_pairs.jsonl").read_text().splitlines()]
# Golds of the files at hand that are not equal to themselves: none.
UNREAD: dict[str, set[str]] = {}
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def verifier():
    with Verifier(VerifierConfig()) as running:
        yield running


def same(verifier, *pairs):
    return [verdict.correct for verdict in verifier.compare(pairs)]


def test_labelled_pairs(verifier):
    assert len(PAIRS) >= 200 and sum(not pair["equal"] for pair in PAIRS) >= 80 and all(pair["why"] for pair in PAIRS)
    verdicts = same(verifier, *((pair["gold"], pair["answer"]) for pair in PAIRS))
    assert not [pair for pair, got in zip(PAIRS, verdicts, strict=True) if got != pair["equal"]]


def test_the_listed_differences_from_math_verify(verifier):
    """configs/README.md lists each labelled pair on which plain math-verify says something else."""

    def plain(text):
        return parse(text if "\\boxed" in text else f"\\boxed{{{text}}}", parsing_timeout=None)

    ours = same(verifier, *((pair["gold"], pair["answer"]) for pair in PAIRS))
    theirs = [bool(verify(plain(p["gold"]), plain(p["answer"]), timeout_seconds=None)) for p in PAIRS]
    differ = [p for p, mine, other in zip(PAIRS, ours, theirs, strict=True) if mine != other]
    lines = [difference(p) for p in differ]
    text = (HERE.parent / "configs/README.md").read_text()
    section = text.partition("## Graders\n")[2].partition("\n## ")[0]
    listed = [line for line in section.splitlines() if line.startswith("| `")]
    assert listed == lines


def cell(text):
    return f"`{text}`".replace("|", "\\|").replace("\n", " ")


def difference(pair):
    theirs, ours = ("unequal", "equal") if pair["equal"] else ("equal", "unequal")
    return f"| {cell(pair['gold'])} | {cell(pair['answer'])} | {theirs} | {ours} | {pair['why']} |"


def rows(path):
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


FILES = [
    "benchmarks/critique_grpo_test.parquet",
    "benchmarks/amc23.jsonl",
    "benchmarks/aime24.jsonl",
    "gsm8k/test.jsonl",
    "gsm8k/train.jsonl",
]


@pytest.fixture(scope="module")
def golds(shared_data):
    cfg = DataConfig()
    return {name: sorted({parse_row(row, cfg).problem.answer for row in rows(shared_data / name)}) for name in FILES}


def test_every_gold_is_read_and_equals_itself(golds, verifier):
    """Written in a box with other spacing, and readable as a gold of training."""
    for name, answers in golds.items():
        assert all(reading.readable for reading in verifier.readable(answers)), name
        verdicts = same(verifier, *((gold, "\\displaystyle " + gold.replace("\\frac", "\\dfrac")) for gold in answers))
        assert {g for g, ok in zip(answers, verdicts, strict=True) if not ok} == UNREAD.get(name, set()), name


def test_nothing_wrong_by_one_is_accepted(golds, verifier):
    """Every integer and decimal gold: one more, and another last digit."""
    pairs = []
    for gold in sorted(
        {gold for answers in golds.values() for gold in answers if re.fullmatch(r"-?\d+(\.\d+)?", gold)}
    ):
        last = str((int(gold[-1]) + 1) % 10)
        pairs += [(gold, f"{float(gold) + 1:.10g}" if "." in gold else str(int(gold) + 1)), (gold, gold[:-1] + last)]
    assert len(pairs) > 1000 and not any(same(verifier, *pairs))


@FEW
@given(st.integers(-999, 999), st.integers(1, 60).map(lambda n: 2 * n))
def test_spellings_of_a_fraction(verifier, top, bottom):
    spellings = [
        f"\\frac{{{top}}}{{{bottom}}}",
        f"\\dfrac{{{top}}}{{{bottom}}}",
        f"{top}/{bottom}",
        f" \\tfrac {{{top}}}{{{bottom}}} ",
    ]
    assert all(same(verifier, *((spellings[0], other) for other in spellings)))
    assert not any(same(verifier, *((f"\\frac{{{top + 1}}}{{{bottom}}}", other) for other in spellings)))


@FEW
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=5, unique=True), st.randoms())
def test_sets_have_no_order_and_tuples_have(verifier, numbers, rng):
    shuffled = rng.sample(numbers, len(numbers))
    listed, mixed, other = (", ".join(map(str, items)) for items in (numbers, shuffled, [*numbers[1:], 77]))
    assert same(verifier, (f"\\{{{listed}\\}}", f"\\{{{mixed}\\}}")) == [True]
    assert same(verifier, (f"({listed})", f"({mixed})")) == [shuffled == numbers]
    assert same(verifier, (f"\\{{{listed}\\}}", f"\\{{{other}\\}}")) == [False]


@FEW
@given(st.integers(1, 9_999_999))
def test_degrees_and_thousands(verifier, value):
    spellings = [f"{value}^\\circ", f"{value}^{{\\circ}}", f"{value}°", f"{value:,}", f"${value}$", f"{value}.0"]
    assert all(same(verifier, *((str(value), other) for other in spellings)))
    assert not any(same(verifier, *((str(value + 1), other) for other in spellings)))


def test_options():
    options = ["Paris", "B", "4 m", "none of these", "12"]
    for answer, letter in [
        ("A", "A"), ("(d)", "D"), ("\\text{(C)}", "C"), ("C. 4 m", "C"), ("none of these", "D"), ("Paris", "A"),
        ("12", "E"), ("F", None), ("(A) 12", None), ("A and C", None), ("Rome", None), ("", None),
    ]:  # fmt: skip
        assert choices.chosen(answer, options) == letter, answer
    for text, found in [
        ("so \\boxed{B}", "B"), ("The answer is (C).", "C"), ("Answer: D", "D"), ("I think\nB", "B"), ("no idea", None),
        ("(C) RNase only", "(C) RNase only"), ("D. Plasma membrane\n", "D. Plasma membrane"), ("no\n(A) is wrong", None),
    ]:  # fmt: skip
        assert choices.extract_choice(text) == found, text


def test_every_gold_option_and_theorem_equals_itself(shared_data):
    for number_, row in enumerate(rows(shared_data / "benchmarks/mmlu_stem.jsonl")):
        problem = choice_problem(row["question"], row["choices"], row["answer"], str(number_))
        shown = problem.entry["options"]
        assert choices.chosen(problem.answer, shown) == problem.answer
        assert choices.chosen(f"({problem.answer}) {row['choices'][row['answer']]}", shown) == problem.answer
    for row in rows(shared_data / "benchmarks/theoremqa.jsonl"):
        problem = theoremqa_row(row).problem
        gold = row["answer"]
        assert theoremqa.judge(row["answer_type"], gold, problem.answer) is True, row


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "verdict"),
    [
        ("integer", 5, "5", True), ("integer", 5, "5.0", True), ("integer", 5, "6", False), ("integer", 1000, "1001", False),
        ("float", 2.0, "2.07", True), ("float", 2.0, "2.09", False), ("float", 0.333, "\\frac{1}{3}", True),
        ("float", 1.5708, "\\frac{\\pi}{2}", True), ("float", 1200.0, "1.2 \\times 10^{3}", True),
        ("float", -1.0, "1.0", False), ("bool", True, "True", True), ("bool", True, "\\text{yes}", True),
        ("bool", False, "True", False), ("bool", True, "not true", False), ("option", "(b)", "B", True),
        ("option", "(b)", "(a)", False), ("list of integer", [1, 2], "(1, 2)", True),
        ("list of integer", [1, 2], "[2, 1]", False), ("list of integer", [1, 2], "1, 2, 3", False),
        ("list of float", [0.5, 2.0], "0.5, 2.05", True),
    ],
)  # fmt: skip
def test_theoremqa_by_type(kind, gold, answer, verdict):
    assert theoremqa.judge(kind, gold, answer) is verdict


def test_hostile_text_is_quick_and_harmless():
    rng = random.Random(0)
    pieces = ["{", "}", "\\frac", "(", ",", "9", "^", "\\text{", " ", "\0", "\ud800", "\\boxed{", "answer is ", "."]
    texts = [piece * (1_000_000 // len(piece)) for piece in pieces]
    texts.append("".join(rng.choice(pieces) for _ in range(300_000)))
    began = time.process_time()
    for text in texts:
        (
            clean(text),
            number(text),
            choices.extract_choice(text.replace("\\boxed", ""), ["a", "b"]),
            choices.chosen(text[:2000], ["a", "b"]),
        )
    assert time.process_time() - began < 60  # quadratic work would take hours
