"""Sources of problems: schemas, bad rows, order, cache."""

import csv
import json

import numpy as np
import pytest

from cgrpo_jax.config.options import DataConfig, VerifierConfig
from cgrpo_jax.data import cells, rows, sources
from cgrpo_jax.data.arithmetic import problem as arithmetic_problem
from cgrpo_jax.data.cells import text_of
from cgrpo_jax.data.sources import load_problems
from cgrpo_jax.errors import DataError, PromptError
from cgrpo_jax.grading.verifier import Reading, Verifier
from cgrpo_jax.text.prompts import INSTRUCTION, SYSTEM, question_messages


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Parsable:
    """Everything but the gold "bad" can be read; counts its calls."""

    calls = 0

    def __call__(self, golds):
        self.calls += 1
        return [Reading(gold not in ("bad", "slow"), "timeout" if gold == "slow" else "ok") for gold in golds]


def load(source, parsable=None, log=print, **changes):
    cfg = DataConfig(source=str(source), **changes)
    return load_problems(cfg, 0, parsable or Parsable(), lambda problem: len(problem.question), log)


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


CHAT = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Why?\n{INSTRUCTION}"}]
SCHEMAS = [
    ({"question": "Why?", "answer": "work\n#### 1,234"}, "Why?", "1,234"),
    ({"problem": "Why?", "solution": r"so \boxed{x^2}."}, "Why?", "x^2"),
    ({"question": "Why?", "answer": 7}, "Why?", "7"),
    ({"prompt": CHAT, "reward_model": {"ground_truth": "5", "style": "rule"}}, "Why?", "5"),
    (
        {"prompt": CHAT, "reward_model": {"ground_truth": "5", "question": "Bare?"}, "target": [{"content": "x"}]},
        "Bare?",
        "5",
    ),
    ({"prompt": CHAT, "question": "Bare?", "answer": "5"}, "Bare?", "5"),
]


ASK, ANSWER = (
    ("question", "problem", "query", "prompt"),
    ("answer", "ground_truth", "final_answer", "target", "solution"),
)


def test_of_several_columns_the_more_usual_name_counts():
    """Questions and answers, and what a critic is shown as the solution; also where names are spelt otherwise."""
    for first in range(4):
        parsed = rows.parse_row({name: name for name in reversed(ASK[first:])} | {"answer": "1"}, DataConfig())
        assert parsed.problem.question == ASK[first] == parsed.question_column
    for spelt in (str, str.upper):
        for first in range(5):
            row = {spelt(name): str(ANSWER.index(name)) for name in reversed(ANSWER[first:])} | {"question": "q"}
            parsed = rows.parse_row(row, DataConfig())
            assert (parsed.problem.answer, parsed.answer_column) == (str(first), spelt(ANSWER[first]))
    worked = {"answer": r"so \boxed{1}", "target": "by a stronger model", "solution": "by hand"}
    for column in ("solution", "target", "answer"):
        problem = rows.parse_row(
            {"question": "q", "ground_truth": "1"} | worked, DataConfig(answer_column="ground_truth")
        )
        found = cells.worked_solution(problem.problem)
        assert (found.column, found.text) == (column, worked.pop(column))


def test_of_a_chat_the_last_turn_of_the_assistant_is_the_solution():
    turns = [("user", "q"), ("assistant", "draft"), ("user", "again"), ("assistant", "final"), ("user", "thanks")]
    assert cells.solution_text([{"role": role, "content": text} for role, text in turns], "target") == "final"


@pytest.mark.parametrize(("row", "question", "gold"), SCHEMAS)
def test_schemas(tmp_path, row, question, gold):
    problem = load(write_jsonl(tmp_path / "a.jsonl", [row])).get(0)
    assert (problem.question, problem.answer) == (question, gold)
    assert list(problem.messages) == (
        CHAT if "prompt" in row else [CHAT[0], {"role": "user", "content": f"Why?\n{INSTRUCTION}"}]
    )


def test_short_floats_of_a_file_are_the_shortest_decimals(tmp_path):
    """As doubles they are golds that no right answer equals, 0.10000000149011612. Also within lists and records."""
    import pyarrow
    import pyarrow.parquet

    values = [0.1, 10 / 3, 0.4, 2.5, 1e-3, 16777216.0, None]
    golds = ["0.1", "3.3333333", "0.4", "2.5", "0.001", "16777216.0"]
    float32 = pyarrow.array(values, pyarrow.float32())
    nested = pyarrow.array(
        [[{"x": value}] for value in values], pyarrow.list_(pyarrow.struct([("x", pyarrow.float32())]))
    )
    table = pyarrow.table({"question": [f"{i}?" for i in range(7)], "answer": float32, "of": nested, "d": values})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    problems = load(tmp_path / "a.parquet", on_bad_row="drop")
    assert [problems.get(i).answer for i in range(6)] == golds
    assert [problems.get(i).columns["of"][0]["x"] for i in range(6)] == [float(gold) for gold in golds]
    assert problems.get(1).columns["d"] == 10 / 3
    assert text_of([np.float32(0.1)], "a") == text_of(np.float32(0.1), "a") == "0.1"
    assert text_of(np.float16(0.3), "a") == "0.3" and text_of(np.float64(10 / 3), "a") == str(10 / 3)


def test_csv_and_parquet_and_named_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["q", "a"], ['Why, "so"?', "5"]])
    names = {"question_column": "q", "answer_column": "a"}
    assert load(tmp_path / "a.csv", **names).get(0).question == 'Why, "so"?'
    pyarrow.parquet.write_table(pyarrow.table({"q": ["Why?"], "a": [5]}), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet", **names).get(0).answer == "5"


BAD = [
    {"question": "ok?", "answer": "1"},
    {"answer": "1"},
    {"question": "  ", "answer": "1"},
    {"question": "q", "answer": "bad"},
    "{not json",
    {"question": "q" * 99, "answer": "1"},
    {"question": "q", "answer": None},
    {"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"},
    {"question": "q", "answer": "#### "},
]


def test_every_bad_row_is_listed_at_once(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", BAD)
    with pytest.raises(DataError) as error:
        load(path, max_prompt_tokens=50)
    text = str(error.value)
    assert text.startswith("bad rows: 8 of 9")
    for number, column in [
        (2, "question"),
        (3, "question"),
        (4, "column 'answer': math-verify cannot read 'bad'"),
        (5, "JSON"),
        (6, "column 'question': 99 tokens"),
        (7, "answer"),
        (8, "prompt"),
        (9, "answer"),
    ]:
        assert any(f"{path}, row {number}," in line and column in line for line in text.splitlines()), number


def test_dropping_bad_rows_says_so(tmp_path):
    logged = []
    problems = load(write_jsonl(tmp_path / "a.jsonl", BAD), log=logged.append, max_prompt_tokens=50, on_bad_row="drop")
    assert problems.size == 1 and problems.get(0).question == "ok?"
    assert logged[0].startswith("bad rows left out: 8")


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no usable row"):
        load(write_jsonl(tmp_path / "a.jsonl", []))
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="hub id or a task"):
        load("")


def test_the_first_line_of_a_solution_may_be_a_heading(tmp_path):
    """#### marks the answer of GSM8K, and a heading in markdown."""
    row = {"problem": "q", "solution": "#### Step 1\nSo it is \\boxed{5}."}
    assert load(write_jsonl(tmp_path / "a.jsonl", [row])).get(0).answer == "5"


def test_cells_out_of_place_are_bad_rows(tmp_path):
    """A comma without quotes shifts the cells of a csv row; a table writes a missing number as NaN."""
    (tmp_path / "a.csv").write_text("\ufeffquestion,answer\nWhy, so?,5\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 1, column '-': more cells than the header names"):
        load(tmp_path / "a.csv")
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": float("nan")}])
    with pytest.raises(DataError, match="row 1, column 'answer': nan is no number"):
        load(path)


ROW = {"question": "Why?", "answer": "5", "level": 3, "tests": ["a", {"b": None}], "source": "a book"}


def test_problems_keep_the_other_columns(tmp_path):
    """As JSON has them, from every kind of file; they are in no prompt."""
    import datetime

    import pyarrow
    import pyarrow.parquet

    others = {"level": 3, "tests": ["a", {"b": None}], "source": "a book"}
    problem = load(write_jsonl(tmp_path / "a.jsonl", [ROW])).get(0)
    assert problem.columns == others
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["level", "answer", "source", "question"], [3, 5, "a book", "Why?"]])
    from_csv = load(tmp_path / "a.csv").get(0)
    assert from_csv.columns == {"level": "3", "source": "a book"}
    day = datetime.date(2026, 1, 2)
    table = {"question": ["Why?"], "answer": [5], "tests": [[1.5, 2.0]], "day": [day], "image": [b"\x89"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    from_parquet = load(tmp_path / "a.parquet").get(0)
    assert from_parquet.columns == {"tests": [1.5, 2.0], "day": "2026-01-02"}
    assert problem.messages == from_csv.messages == from_parquet.messages == question_messages("Why?")
    assert set(load("arithmetic").get(0).columns) == {"target"}


def test_the_answer_is_in_no_other_column(tmp_path):
    """Wherever the question and the answer of a row came from."""
    model = {"ground_truth": "5", "question": "Bare?", "style": "rule"}
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": CHAT, "reward_model": model, "ability": "math"}])
    assert load(path).get(0).columns == {"ability": "math", "reward_model": {"style": "rule"}}
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": CHAT, "question": "Bare?", "answer": "5", "level": 1}])
    assert load(path).get(0).columns == {"level": 1}
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "Why?", "a": "5", "answer": "work"}])
    assert load(path, question_column="q", answer_column="a").get(0).columns == {"answer": "work"}


def test_golds_are_checked_once_per_content(tmp_path):
    path, parsable = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "1"}]), Parsable()
    load(path, parsable)
    load(path, parsable)
    assert parsable.calls == 1
    write_jsonl(path, [{"question": "q", "answer": "bad"}])
    with pytest.raises(DataError, match="cannot read"):
        load(path, parsable)
    with pytest.raises(DataError, match="cannot read"):  # the bad verdict is remembered too
        load(path, parsable)
    assert parsable.calls == 2


def test_golds_are_checked_anew_where_anything_that_reads_them_changed(tmp_path, monkeypatch):
    """Another column of the same file, another reader; and the same golds elsewhere need no second check."""
    path, parsable = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "1", "other": "bad"}]), Parsable()
    load(path, parsable)
    load(write_jsonl(tmp_path / "b.jsonl", [{"problem": "another", "target": 1}]), parsable)
    assert parsable.calls == 1
    with pytest.raises(DataError, match="cannot read 'bad'"):
        load(path, parsable, answer_column="other")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    load(path, parsable)
    assert parsable.calls == 3
    (tmp_path / "equivalence.py").write_text("# rewritten")
    monkeypatch.setattr("cgrpo_jax.grading.__file__", str(tmp_path / "__init__.py"))
    load(path, parsable)
    assert parsable.calls == 4


def test_a_file_that_is_replaced_as_soon_as_it_is_read(tmp_path, monkeypatch):
    """The verdict on its old golds is not kept for the new ones."""
    path, open_rows = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "1"}]), sources.open_rows

    def replacing(cfg, log):
        rows = open_rows(cfg, log)
        write_jsonl(path, [{"question": "q", "answer": "bad"}])
        return rows

    monkeypatch.setattr(sources, "open_rows", replacing)
    assert load(path).get(0).answer == "1"
    with pytest.raises(DataError, match="cannot read 'bad'"):
        load(path)


def test_a_gold_that_times_out_is_bad_today_only(tmp_path):
    path, parsable = write_jsonl(tmp_path / "a.jsonl", [{"problem": "q", "solution": "slow"}]), Parsable()
    for calls in (1, 2):  # asked again: a busy machine is no property of the file
        with pytest.raises(DataError, match=r"column 'solution': math-verify gives up \(timeout\)"):
            load(path, parsable)
        assert parsable.calls == calls


def test_unreadable_files_are_one_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "a.csv").write_bytes(b'q,a\n"\x00' + b"x" * 200_000)
    for name in ("a.parquet", "a.jsonl", "a.csv"):
        with pytest.raises(DataError, match="cannot be read"):
            load(tmp_path / name)


def test_text_that_cannot_be_encoded_is_a_bad_row(tmp_path):
    def refuse(problem):
        raise PromptError("it rewrites")

    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "1"}])
    with pytest.raises(DataError, match="row 1, column 'question': it rewrites"):
        load_problems(DataConfig(source=str(path)), 0, Parsable(), refuse)


def test_a_prompt_of_exactly_the_limit_is_no_bad_row(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q" * 9, "answer": "1"}])
    assert load(path, max_prompt_tokens=9).size == 1
    with pytest.raises(DataError, match="9 tokens with its template"):
        load(path, max_prompt_tokens=8)


def test_generated_problems_that_are_too_long():
    """Refused before anything starts, or replaced, always by the same ones."""
    whole = load("arithmetic")
    long = [i for i in range(128) if len(whole.get(i).question) > 14]
    with pytest.raises(
        DataError, match=f"{len(long)} of the first 128 problems of arithmetic are bad, problem {long[0]}"
    ):
        load("arithmetic", max_prompt_tokens=14)
    logged = []
    short = load("arithmetic", max_prompt_tokens=14, on_bad_row="drop", log=logged.append)
    kept = [i for i in range(128) if i not in long]
    assert all(short.get(i) == whole.get(i) for i in kept) and f"{len(long)} of the first" in logged[0]
    easy = [i for i in long if i % 2 == 0]  # products never fit
    assert easy and all(len(short.get(i).question) <= 14 and short.get(i) == short.get(i) for i in easy)
    with pytest.raises(DataError, match="so are the 63 tried"):
        short.get(1)
    with pytest.raises(DataError, match="has the splits train, test"):
        load("arithmetic", split="validation")


def test_a_file_without_a_split_is_split_by_its_questions(tmp_path):
    """A tenth, seeded, whatever the order of the rows; no question is on both sides, however often it stands there."""
    rows = [{"question": f"q{number % 50}", "answer": str(number % 50)} for number in range(60)]
    found = []
    for given, seed in ((rows, 0), (rows[::-1], 0), (rows, 1)):
        whole, said = load(write_jsonl(tmp_path / "a.jsonl", given)), []
        training, test = sources.hold_out(whole, whole, "a.jsonl", seed, said.append)
        trained = [training.get(index).question for index in range(training.size)]
        held = [test.get(index).question for index in range(test.size)]
        assert len(held) == len(set(held)) == 5 and not set(trained) & set(held)
        assert sorted(trained) == sorted(row["question"] for row in rows if row["question"] not in held)
        assert said == [
            "a.jsonl has no split: 5 of its 50 questions are held out for evaluation (a tenth, 256 at most, by "
            f"seed={seed}) and never trained on; --config.eval.source=FILE evaluates others"
        ]
        found.append(set(held))
    assert found[0] == found[1] != found[2]
    many = load(write_jsonl(tmp_path / "b.jsonl", [{"question": f"q{n}", "answer": "1"} for n in range(3000)]))
    assert sources.hold_out(many, many, "b.jsonl", 0, print)[1].size == 256
    one = load(write_jsonl(tmp_path / "c.jsonl", [rows[0], rows[0]]))
    with pytest.raises(DataError, match=r"c\.jsonl: one question is too few to hold one out; --config\.eval\.every=0"):
        sources.hold_out(one, one, "c.jsonl", 0, print)


def test_order_is_seeded_complete_and_seekable(tmp_path):
    problems = load(write_jsonl(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(10)]))

    def ask(seed, first, count):
        return [problem.question for problem in problems.batch(seed, first, count)]

    epochs = [ask(0, 10 * epoch, 10) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and ask(1, 0, 10) != epochs[0]
    assert ask(0, 7, 6) == (epochs[0] + epochs[1])[7:13]  # a batch may cross an epoch; seeking needs no replay


def test_generated_tasks():
    problems = load("arithmetic")
    assert problems.size is None and problems.get(10**9).tag == "easy"
    train = {arithmetic_problem(0, "train", i).question for i in range(300)}
    test = {arithmetic_problem(0, "test", i).question for i in range(300)}
    assert not train & test
    with pytest.raises(DataError, match="not on the list"):
        load("reasoning_gym:countdown")


def test_reasoning_gym_scores_its_own_answers():
    pytest.importorskip("reasoning_gym", reason="reasoning_gym is not installed")
    from cgrpo_jax.grading.rewards import REASONING_GYM_TASKS, score

    assert load("reasoning_gym:chain_sum").get(0) != load("reasoning_gym:chain_sum", split="test").get(0)
    problems = [load(f"reasoning_gym:{task}").get(3) for task in ("chain_sum", "gcd", "caesar_cipher", "count_bits")]
    texts = [[f"\\boxed{{{one.answer}}}", "\\boxed{nonsense}", "no answer"] for one in problems]
    with Verifier(VerifierConfig()) as verifier:
        attempts = score([(p, None, text) for p, of in zip(problems, texts, strict=True) for text in of], verifier)
    assert [attempt.reward for attempt in attempts] == [1.0, 0.0, 0.0] * len(problems)
    assert "countdown" not in REASONING_GYM_TASKS and "n_queens" not in REASONING_GYM_TASKS


SCORES = """
import sys, reasoning_gym
from cgrpo_jax.grading import worker
given = {"a": 0.6, "b": 1, "c": 7.0, "d": float("nan"), "e": -1}
reasoning_gym.get_score_answer_fn = lambda name: lambda answer, entry: given[answer]
worker.main(int(sys.argv[1]), float(sys.argv[2]))
"""


def test_what_a_fraction_is_worth(tmp_path, monkeypatch):
    """0.6, answers that no reward may follow from, and one that raises; `reward.correct_at` and `.partial` by hand."""
    pytest.importorskip("reasoning_gym", reason="reasoning_gym is not installed")
    from cgrpo_jax.config.options import RewardConfig
    from cgrpo_jax.grading.rewards import score

    problem = load("reasoning_gym:chain_sum").get(3)
    (tmp_path / "scores.py").write_text(SCORES)
    monkeypatch.setattr("cgrpo_jax.grading.verifier.WORKER", (str(tmp_path / "scores.py"),))
    items = [(problem, None, f"\\boxed{{{answer}}}") for answer in "abcdef"]
    rights = [(1.0, True, "ok"), (1.0, True, "ok"), *[(0.0, False, "error")] * 3]
    with Verifier(VerifierConfig(workers=1)) as verifier:
        for cfg, found in (
            (RewardConfig(), (0.0, False)), (RewardConfig(correct_at=0.5), (1.0, True)), (RewardConfig(correct_at=0.6), (1.0, True)),
            (RewardConfig(partial=True), (0.6, False)), (RewardConfig(correct_at=0.5, partial=True), (0.6, True)),
        ):  # fmt: skip
            attempts = score(items, verifier, cfg)
            assert [(a.reward, a.correct, a.status) for a in attempts] == [(*found, "ok"), *rights]


def test_gsm8k_whole(shared_data):
    """Every gold answer of the test file is readable by math-verify."""
    with Verifier(VerifierConfig()) as verifier:
        problems = load(shared_data / "gsm8k/test.jsonl", verifier.readable, max_prompt_tokens=10_000)
    assert problems.size == 1319
    assert problems.get(0).answer == "18"


def test_authors_validation_file(shared_data):
    cfg = {"max_prompt_tokens": 10_000}
    problems = load(shared_data / "benchmarks/critique_grpo_test.parquet", **cfg)
    assert problems.size == 2019
    first = problems.get(0)
    assert (
        first.answer == "204" and first.question.startswith("Every morning Aya") and INSTRUCTION not in first.question
    )
    assert first.messages[1]["content"] == f"{first.question}\n{INSTRUCTION}"  # the prompt is the paper's own
