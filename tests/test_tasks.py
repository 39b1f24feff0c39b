"""Evaluation tasks: rows of each published schema become problems; what is wrong is said before anything is sampled.

The rows of GPQA, MMLU-Pro and AIME25 are written here after their published schemas: those sets are not at hand.
"""

import json

import numpy as np
import pytest
from test_data import Parsable

from cgrpo_jax.config.options import DataConfig, VerifierConfig
from cgrpo_jax.data.rows import choice_problem, order, parse_target_row
from cgrpo_jax.data.sources import load_problems
from cgrpo_jax.data.tasks import TASKS, load_task, parse_names
from cgrpo_jax.errors import DataError
from cgrpo_jax.grading import rewards
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.records import Completion

CFG = DataConfig(max_prompt_tokens=512)


def fine(problem):
    return None


def rows_of(name, rows, tmp_path, **changes):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    limit = changes.pop("limit", 0)
    return load_task(
        name, str(tmp_path / "rows.jsonl"), limit, DataConfig(**changes), changes.get("fault", fine), print
    )


def test_names():
    assert parse_names("gsm8k, aime24=a/b.jsonl,math500@abc,mine=x.csv") == [
        ("gsm8k", ""), ("aime24", "a/b.jsonl"), ("math500", "@abc"), ("mine", "x.csv"),
    ]  # fmt: skip
    for wrong, message in (
        ("gms8k", "no task 'gms8k'"),
        ("gsm8k,gsm8k", "twice"),
        ("validation", "local file"),
        ("a=", "no file"),
    ):
        with pytest.raises(DataError, match=message):
            parse_names(wrong)


def test_gpqa(tmp_path):
    row = {
        "Question": "Which gas do plants take in?\n", "Correct Answer": "Carbon dioxide\n", "Incorrect Answer 1": "Oxygen",
        "Incorrect Answer 2": "Argon", "Incorrect Answer 3": "Neon", "Record ID": "rec1",
    }  # fmt: skip
    found = rows_of("gpqa_diamond", [row] * 6, tmp_path)
    for named in found:
        options = named.problem.entry["options"]
        assert options["ABCD".index(named.problem.answer)] == "Carbon dioxide"
        assert f"({named.problem.answer}) Carbon dioxide" in named.problem.question
        assert named.problem.messages[-1]["content"].startswith("Which gas do plants take in?\n(A) ")
    assert len({named.problem.answer for named in found}) > 1  # the order depends on the row
    assert found == rows_of("gpqa_diamond", [row] * 6, tmp_path)  # and on nothing else


def test_up_to_26_options_in_an_order_of_their_own():
    problem = choice_problem("Which?", [str(i) for i in range(26)], 25, "row")
    assert problem.entry["options"][ord(problem.answer) - ord("A")] == "25"
    with pytest.raises(ValueError, match="27 options"):
        choice_problem("Which?", ["x"] * 27, 0, "row")
    orders = {tuple(order("wxyz", f"{i}")) for i in range(200)}
    assert len(orders) == 24 and order("wxyz", "7") == order("wxyz", "7")


@pytest.mark.parametrize("last", ["All of the above", "None of the above.", "none of these options", "The others"])
def test_options_that_speak_of_places_keep_theirs(last):
    """Shuffled they would say something else, and be false."""
    orders = {tuple(order(["w", last, "y", "z"], f"{i}")) for i in range(100)}
    assert len(orders) == 6 and {one[-1] for one in orders} == {1}
    for named in ("Both A and B", "A and C", "B, C and D", "Neither (A) nor (B)", "only A", "Options A and C"):
        assert {tuple(order(["w", "x", named, "z"], f"{i}")) for i in range(9)} == {(0, 1, 2, 3)}, named
    for free in ("Vitamin A and iron", "a and b", "the above-ground part", "Group A"):
        assert len({tuple(order(["w", "x", "y", free], f"{i}")) for i in range(99)}) > 9, free


OWN_OPTIONS = [  # of "9", the last one
    {"options": ["4", "6", "7", "9"], "answer": "D"}, {"options": ["4", "6", "7", "9"], "answer": "(d)"},
    {"options": ["4", "6", "7", "9"], "answer": "9"}, {"choices": ["4", "6", "7", "9"], "answer": 3},
    {"choices": {"text": ["4", "6", "7", "9"], "label": ["1", "2", "3", "4"]}, "answerKey": "4"},
    {"choices": {"text": ["4", "6", "7", "9"], "label": ["A", "B", "C", "D"]}, "answerKey": "D"},
    {"options": {"A": "4", "B": "6", "C": "7", "D": "9"}, "answer_idx": "D", "answer": "9"},
    {"options": ["4", "6", "7", "9"], "answer_index": 3, "answer": "D"}, {"options": [4, 6, 7, 9], "answer": 9},
    {"options": ["3", "2", "1", "9"], "answer": 3},  # a number among texts is a place, as in MMLU
]  # fmt: skip


@pytest.mark.parametrize("row", OWN_OPTIONS)
def test_options_in_a_column_of_their_own_are_asked_with_the_question(tmp_path, row):
    """They were lost, and the letter was a gold of mathematics. Also in a supervised row."""
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"question": "Which is a square?"} | row))
    problem = load_problems(DataConfig(source=str(path)), 0, Parsable(), lambda problem: 1, print).get(0)
    assert (problem.answer, problem.grader) == ("D", "choice") and problem.entry["options"][3] == "9"
    assert problem.question.startswith("Which is a square?\n(A) ") and "(D) 9" in problem.messages[-1]["content"]
    assert rows_of("mine", [{"question": "Which is a square?"} | row], tmp_path)[0].problem == problem
    supervised = parse_target_row({"question": "Which?", "target": "D.", **row}, DataConfig()).problem
    assert "(D) 9" in supervised.messages[-1]["content"] and supervised.answer == "D."


@pytest.mark.parametrize("answer", ["E", "12", 7, "A and B", ""])
def test_an_answer_that_names_no_option_is_a_bad_row(tmp_path, answer):
    with pytest.raises(DataError, match=r"column 'answer': (.* names none of the 4 options in 'options'|empty)"):
        rows_of("mine", [{"question": "q", "options": ["4", "6", "8", "9"], "answer": answer}], tmp_path)
    (named,) = rows_of("mine", [{"question": "q", "options": [], "answer": "5"}], tmp_path)
    assert named.problem.grader == "math"


def test_mmlu_pro(tmp_path):
    options = [f"option {i}" for i in range(10)]
    row = {
        "question_id": 70,
        "question": "Which?",
        "options": options,
        "answer": "I",
        "answer_index": 8,
        "category": "math",
    }
    (named,) = rows_of("mmlu_pro", [row], tmp_path)
    assert named.problem.entry["options"] == options and named.problem.answer == "I"  # its authors do not shuffle
    assert named.problem.grader == "choice" and "(J) option" in named.problem.question
    with pytest.raises(DataError, match=r"row 1, column 'answer_index': 12 is no index of the 10 options"):
        rows_of("mmlu_pro", [row | {"answer_index": 12}], tmp_path)
    for wrong in ("['a', 'b']", {"text": "a", "label": "b"}, ["a"], ["x"] * 27):
        with pytest.raises(DataError, match=r"column 'options': .* is no list of 2 to 26 options"):
            rows_of("mmlu_pro", [row | {"options": wrong, "answer_index": 0}], tmp_path)
    with pytest.raises(DataError, match=r"column 'options': text or a number is needed, not NoneType"):
        rows_of("mmlu_pro", [row | {"options": ["a", None], "answer_index": 0}], tmp_path)
    with pytest.raises(DataError, match=r"column 'question': empty"):
        rows_of("mmlu_pro", [row | {"question": " "}], tmp_path)


def test_aime25_and_any_file(tmp_path):
    (named,) = rows_of("aime25", [{"problem": "Find n.", "answer": "070", "id": "0"}], tmp_path)
    assert named == ("1", named.problem) and named.problem.answer == "070" and named.problem.grader == "math"
    (named,) = rows_of("mine", [{"question": "2+3?", "answer": 5}], tmp_path)
    assert named.problem.answer == "5"


def test_olympiadbench_lists_its_answers(tmp_path):
    (named,) = rows_of("olympiadbench", [{"question": "Find x.", "final_answer": ["2", "-1"]}], tmp_path)
    assert named.problem.answer == "2, -1"


def test_theoremqa_asks_true_or_false(tmp_path):
    rows = [
        {"Question": "Is 2 prime?", "Answer": "True", "Answer_type": "bool", "Picture": None},
        {"question": "How many?", "answer": 3, "answer_type": "integer", "picture": None},
    ]
    boolean, integer = (named.problem for named in rows_of("theoremqa", rows, tmp_path))
    assert "\\boxed{True} or \\boxed{False}" in boolean.question and "boxed{True}" not in integer.question
    assert boolean.entry == {"answer_type": "bool", "answer": True} and boolean.grader == "theoremqa"
    assert integer.entry == {"answer_type": "integer", "answer": 3}


def test_theoremqa_is_graded_as_the_paper_does_where_that_is_asked_for(tmp_path):
    """`data.grader` says so for every task of mathematics: no 4 %; True and lists are text that math-verify reads."""
    rows = [
        {"question": f"q{i}", "answer": answer, "answer_type": kind}
        for i, (answer, kind) in enumerate([(0.25, "float"), (True, "bool"), ([1, 2, 3], "list of integer")])
    ]
    asked = [["0.25", "0.26", "\\frac14"], ["True", "False"], ["[1, 2, 3]", "[1, 2, 4]"]]
    found = {}
    with Verifier(VerifierConfig()) as verifier:
        for grader in ("auto", "math_verify"):
            problems = [named.problem for named in rows_of("theoremqa", rows, tmp_path, grader=grader)]
            pairs = [(p, f"\\boxed{{{text}}}") for p, texts in zip(problems, asked, strict=True) for text in texts]
            empty = Completion(*[np.zeros(0)] * 3, True)
            scored = rewards.score([(p, empty, text) for p, text in pairs], verifier)
            found[grader] = [attempt.reward for attempt in scored]
    assert found == {"auto": [1, 1, 1, 1, 0, 1, 0], "math_verify": [1, 0, 1, 1, 0, 1, 0]}


@pytest.mark.parametrize(
    ("kind", "answer", "words"),
    [
        ("integer", "three", "column 'answer': 'three' is no integer"),
        ("integer", "[1, 2]", r"column 'answer': '\[1, 2\]' is no integer"), ("integer", 2.5, "2.5 is no integer"),
        ("bool", "yes", "'yes' is no bool"), ("list of float", "1.5", "'1.5' is no list of float"),
        ("list of integer", "[1, true]", r"'\[1, true\]' is no list of integer"), ("option", 3, "3 is no option"),
        ("float", "NaN", "'NaN' is no float"), ("proof", "so", "column 'answer_type': 'proof' is none of"),
    ],
)  # fmt: skip
def test_theoremqa_answers_that_are_not_of_their_type(tmp_path, kind, answer, words):
    """They would stop the grader hours later, or never be matched."""
    with pytest.raises(DataError, match=words):
        rows_of("theoremqa", [{"question": "q", "answer": answer, "answer_type": kind}], tmp_path)


def test_problems_keep_the_other_columns(tmp_path):
    rows = {
        "mmlu_stem": {"question": "Which?", "choices": ["a", "b"], "answer": 1, "type": "college_biology"},
        "gpqa_diamond": {
            "Question": "Which?", "Correct Answer": "a", "Incorrect Answer 1": "b", "Incorrect Answer 2": "c",
            "Incorrect Answer 3": "d", "type": "college_biology",
        },
        "theoremqa": {"Question": "Which?", "Answer": "2", "Answer_type": "integer", "Type": "college_biology"},
        "math500": {"problem": "Which?", "answer": "2", "type": "college_biology"},
    }  # fmt: skip
    for name, row in rows.items():
        (named,) = rows_of(name, [row], tmp_path)
        assert named.problem.columns == {"type": "college_biology"}, name
        assert "college_biology" not in str(named.problem.messages)


def test_bad_rows_are_listed_or_left_out(tmp_path, capsys):
    rows = [{"question": "q", "answer": "1"}, {"question": "", "answer": "1"}, {"answer": "1"}]
    with pytest.raises(DataError, match=r"bad rows: 2 of 3(.|\n)*row 2, column 'question': empty(.|\n)*row 3"):
        rows_of("gsm8k", rows, tmp_path)
    kept = rows_of("gsm8k", rows, tmp_path, on_bad_row="drop")
    assert [named.id for named in kept] == ["1"] and "bad rows left out: 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("validation", "benchmarks/critique_grpo_test.parquet", 2019),
        ("validation500", "benchmarks/critique_grpo_test.parquet", 500),
        ("math500", "benchmarks/critique_grpo_test.parquet", 500),
        ("minerva_math", "benchmarks/critique_grpo_test.parquet", 272),
        ("olympiadbench", "benchmarks/critique_grpo_test.parquet", 675),
        ("amc23", "benchmarks/critique_grpo_test.parquet", 332),
        ("aime24", "benchmarks/critique_grpo_test.parquet", 240),
        ("amc23", "benchmarks/amc23.jsonl", 40),
        ("aime24", "benchmarks/aime24.jsonl", 30),
        ("theoremqa", "benchmarks/theoremqa.jsonl", 800),
        ("mmlu_stem", "benchmarks/mmlu_stem.jsonl", 3018),
        ("gsm8k", "gsm8k/test.jsonl", 1319),
    ],
)
def test_sizes_of_the_files_at_hand(shared_data, name, file, count):
    """The published sizes; no row is bad."""
    found = load_task(name, str(shared_data / file), 0, CFG, fine, print)
    assert len(found) == count and len({named.id for named in found}) == count
    assert [n.id for n in load_task(name, str(shared_data / file), 20, CFG, fine, print)] == [n.id for n in found[:20]]


def test_a_file_of_several_sets_has_the_accuracy_of_each(tmp_path):
    """A named set is evaluated on its own rows or refused; anything else on all of them, source by source."""
    rows = [
        {"question": f"{i}?", "answer": "1", "data_source": source} for i, source in enumerate(["aime", "amc", "amc"])
    ]
    assert [len(rows_of(name, rows, tmp_path)) for name in ("aime24", "amc23", "validation", "mine")] == [1, 2, 3, 3]
    for name in ("aime25", "gsm8k", "math500"):
        with pytest.raises(DataError, match=f"{name}=.*: its rows are of aime, amc .column data_source., and none of"):
            rows_of(name, rows, tmp_path)
    assert [named.problem.tag for named in rows_of("validation", rows, tmp_path)] == ["aime", "amc", "amc"]
    assert (
        len(rows_of("aime25", [row | {"data_source": "aime_2025"} for row in rows], tmp_path)) == 3
    )  # a file of one set


def test_every_task_says_where_its_rows_are():
    assert set(TASKS) >= {
        "math500", "minerva_math", "olympiadbench", "amc23", "aime24", "aime25", "theoremqa", "gpqa_diamond",
        "mmlu_pro", "gsm8k", "validation", "validation500",
    }  # fmt: skip
