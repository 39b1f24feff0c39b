"""Kinds of answers that users of other graders and trainers reported, in both directions, and the paper's own reward."""

import collections
import json
import pathlib
import random
import time

import numpy as np
import pytest

from cgrpo_jax.config.options import DataConfig, VerifierConfig
from cgrpo_jax.data.rows import parse_row, theoremqa_row
from cgrpo_jax.grading import answers, choices, equivalence, release, rewards
from cgrpo_jax.grading.verifier import Reading, Verifier
from cgrpo_jax.records import Completion, Problem

ROWS = [json.loads(line) for line in (pathlib.Path(__file__).parent / "reported_kinds.jsonl").read_text().splitlines()]
EMPTY = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32), True)
KINDS = list(dict.fromkeys(row["kind"] for row in ROWS))


@pytest.fixture(scope="module")
def verifier():
    with Verifier(VerifierConfig()) as running:
        yield running


def problem(gold, question="How many?", grader="math", options=None):
    messages = ({"role": "user", "content": question},)
    return Problem(question, gold, messages, grader, entry={"options": options} if options else None)


def scored(verifier, *items):
    return [attempt.correct for attempt in rewards.score([(p, EMPTY, text) for p, text in items], verifier)]


def verdicts(rows, verifier):
    pairs = [row for row in rows if "answer" in row]
    texts = [row for row in rows if "text" in row]
    found = verifier.compare([(row["gold"], row["answer"]) for row in pairs])
    asked = []
    for row in texts:
        options = row.get("options")
        asked.append((problem(row["gold"], grader="choice" if options else "math", options=options), row["text"]))
    return [*zip(pairs, (v.correct for v in found), strict=True), *zip(texts, scored(verifier, *asked), strict=True)]


def test_each_kind_has_pairs_of_both_sorts():
    counts = collections.Counter((row["kind"], row["equal"]) for row in ROWS)
    assert len(KINDS) == 26 and min(counts[kind, equal] for kind in KINDS for equal in (True, False)) >= 10


@pytest.mark.parametrize("kind", KINDS)
def test_reported_kind(kind, verifier):
    rows = [row for row in ROWS if row["kind"] == kind]
    wrong = [row for row, correct in verdicts(rows, verifier) if correct != row["equal"]]
    assert not wrong


def test_where_no_option_is_named_none_is_read():
    """Several are none, too."""
    for row in (row for row in ROWS if row["kind"] == "letters"):
        answer = choices.extract_choice(row["text"], row["options"])
        named = choices.chosen(answer, row["options"]) if answer else None
        assert named == ("B" if row["equal"] else None), row["text"]


def test_words_of_despair_are_no_golds(verifier):
    golds = ["proof", "\\text{not found}", "See solution", "no solution", "42"]
    assert verifier.readable(golds) == [Reading(yes, "ok") for yes in (False, False, False, True, True)]


ASKED = [
    "What percentage of the cars is red?", "By what percent does it grow?", "Give the share as a percentage.",
    "What is the new win percentage?", "What is the probability, expressed as a percent, of two heads?",
    "Find the percent increase.", "How many more birds, in percent, did she see?", "What % of 8 is 4?",
    "What is the growth to the nearest tenth of a percent?", "If x percent of 60 is 15, what is x?",
    "Sides grow by $n \\%$. Determine the value of $n$.", "What's the percent likelihood of rain?",
]  # fmt: skip
SPOKEN_OF = [
    "Find n if 25 percent of n is 12.", "How many, after twenty percent left?", "What is 30% of 160?",
    "What is the price after a 20 percent discount?", "What is thirty-five percent of 200?", "p% of n is 12 and p = 25. Find n.",
    "How many must they win so that their percentage of wins is 64%?", "How many?", "Find the number of which 10\\% is 4.",
]  # fmt: skip


def test_a_percent_sign_may_be_missing_only_where_the_answer_is_a_percentage(verifier):
    """And a hundredth never stands for it. Below 1 a gold may be a share, so it is what it says."""
    cases = [(q, "48", a, a != "0.48\\%") for q in ASKED for a in ("48", "48\\%", "48 percent", "0.48\\%")]
    cases += [(q, "48", a, False) for q in ASKED + SPOKEN_OF for a in ("0.48", "\\frac{12}{25}", "49\\%")]
    cases += [(q, "48", "4800\\%", q in SPOKEN_OF) for q in ASKED + SPOKEN_OF]
    cases += [(q, "48", a, a == "48") for q in SPOKEN_OF for a in ("48", "48\\%", "48 per cent")]
    cases += [
        (ASKED[0], gold, answer, equal)
        for gold, answer, equal in [
            ("62.5", "62.5\\%", True), ("62.5", "0.625", False), ("-20", "-20%", True), ("33\\frac13", "33 \\frac{1}{3}\\%", True),
            ("1", "1\\%", True), ("1", "100\\%", False), ("0.28", "0.28\\%", False), ("0.28", "28\\%", True),
            ("50", "0.5 = 50\\%", True), ("10", "10 percentage points", True), ("50\\%", "50", True), ("50\\%", "0.5", True),
        ]
    ]  # fmt: skip
    found = scored(verifier, *((problem(gold, q), f"\\boxed{{{answer}}}") for q, gold, answer, _ in cases))
    assert not [case for case, correct in zip(cases, found, strict=True) if correct != case[3]]


def test_no_hundredth_of_a_gold_of_gsm8k_is_right(verifier, shared_data):
    """Of any question that speaks of percentages; the gold itself is."""
    rows = [json.loads(line) for line in (shared_data / "gsm8k/train.jsonl").read_text().splitlines()]
    asked = [parse_row(row, DataConfig()).problem for row in rows if "percent" in row["question"]]
    hundredths = [f"{float(one.answer.replace(',', '')) / 100:g}" for one in asked]
    assert len(asked) > 150 and not any(
        scored(verifier, *zip(asked, (f"\\boxed{{{h}}}" for h in hundredths), strict=True))
    )
    assert all(scored(verifier, *((one, f"\\boxed{{{one.answer}}}") for one in asked)))


def test_theoremqa_reads_a_percentage_that_is_asked_for(verifier):
    row = {"question": "What percentage of the light comes out?", "answer": "54.8", "answer_type": "float"}
    asked = theoremqa_row(row).problem
    told = theoremqa_row(row | {"question": "How many are 20 percent?"}).problem
    items = [(one, f"\\boxed{{{a}}}") for one in (asked, told) for a in ("54.8\\%", "54.8", "0.548", "5480\\%")]
    assert scored(verifier, *items) == [True, True, False, False, False, True, False, True]


def test_the_reward_of_the_release_differs(verifier):
    """`data.grader` decides; plain math-verify accepts a chain and a dropped letter, and refuses an inequality."""
    row = {"question": "x?", "answer": "6"}
    graders = [parse_row(row, DataConfig(grader=grader)).problem.grader for grader in ("auto", "math_verify")]
    assert graders == ["math", "math_verify"]
    cases = [
        ("6", "\\boxed{3=6}"),
        ("3", "\\boxed{3h}"),
        ("(2,\\infty)", "\\boxed{x>2}"),
        ("6", "\\boxed{7}"),
        ("6", "so 6"),
    ]
    found = {
        grader: scored(verifier, *((problem(gold, grader=grader), text) for gold, text in cases)) for grader in graders
    }
    assert found == {"math": [False, False, True, False, True], "math_verify": [True, True, False, False, True]}


def test_a_model_cannot_choose_how_it_is_compared(verifier):
    for text in ("rounded 3", "\\approx 3", "plain 3h", '3", "how": "plain'):
        assert scored(verifier, (problem("3.2"), f"\\boxed{{{text}}}"), (problem("\\pi"), f"\\boxed{{{text}}}")) == [
            False,
            False,
        ]


@pytest.mark.thorough
def test_odd_text_is_quick_and_raises_nothing():
    """Pieces of answers in any order, as long as an answer may be: no exception, no hang, whoever asks whom."""
    rng = random.Random(0)
    texts = [text for row in ROWS for text in (row["gold"], row.get("answer", row.get("text")))]
    pieces = [
        *"{}()[],^_=|<>;:.*&'",
        *[
            "\\in",
            "\\cup",
            "\\cap",
            "\\pm",
            "\\approx",
            "\\frac",
            "\\text{",
            "\\{",
            "\\}",
            "\\boxed{",
            "√",
            "½",
            "**",
            "°C",
            "and",
            "or",
        ],
        *texts,
    ]
    slowest = 0.0
    for _ in range(1_500):
        made = [
            "".join(rng.choices(pieces, k=rng.choice((1, 2, 3, 40)))) * rng.choice((1, 1, 1, 100)) for _ in range(2)
        ]
        answer = rng.random() < 0.5
        began = time.process_time()
        equivalence.same(*(equivalence._top(text[:2_000]) for text in made), lambda gold, other, how="equal": answer)  # noqa: B023
        (
            answers.extract_answer(made[1]),
            choices.extract_choice(made[1].replace("\\boxed", ""), ["a", "b"]),
            release.extract(made[1]),
        )
        choices.chosen(made[1][:2_000], ["a", "b"])
        slowest = max(slowest, time.process_time() - began)
    assert slowest < 2
