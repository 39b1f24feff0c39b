"""Sources of problems: schemas, bad rows, order, cache."""

import csv
import json

import pytest

from cgrpo_jax.data.arithmetic import problem as arithmetic_problem
from cgrpo_jax.data.sources import DataError, load_problems
from cgrpo_jax.grading.verifier import Verdict, Verifier
from cgrpo_jax.options import DataConfig, VerifierConfig
from cgrpo_jax.text.prompts import INSTRUCTION, SYSTEM
from cgrpo_jax.text.tokenizer import PromptError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Parsable:
    """Everything but the gold "bad" can be read; counts its calls."""

    calls = 0

    def __call__(self, golds):
        self.calls += 1
        return [Verdict(gold not in ("bad", "slow"), "timeout" if gold == "slow" else "ok") for gold in golds]


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


@pytest.mark.parametrize(("row", "question", "gold"), SCHEMAS)
def test_schemas(tmp_path, row, question, gold):
    problem = load(write_jsonl(tmp_path / "a.jsonl", [row])).get(0)
    assert (problem.question, problem.answer) == (question, gold)
    assert list(problem.messages) == (
        CHAT if "prompt" in row else [CHAT[0], {"role": "user", "content": f"Why?\n{INSTRUCTION}"}]
    )


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
    assert text.startswith("8 bad rows of 9")
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
    said = []
    problems = load(write_jsonl(tmp_path / "a.jsonl", BAD), log=said.append, max_prompt_tokens=50, on_bad_row="drop")
    assert problems.size == 1 and problems.get(0).question == "ok?"
    assert said[0].startswith("dropped 8 bad rows")


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no usable row"):
        load(write_jsonl(tmp_path / "a.jsonl", []))
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="hub id or a task"):
        load("")


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


def test_generated_problems_that_are_too_long():
    """Refused before anything starts, or replaced, always by the same ones."""
    whole = load("arithmetic")
    long = [i for i in range(128) if len(whole.get(i).question) > 14]
    with pytest.raises(
        DataError, match=f"{len(long)} of the first 128 problems of arithmetic are bad, problem {long[0]}"
    ):
        load("arithmetic", max_prompt_tokens=14)
    said = []
    short = load("arithmetic", max_prompt_tokens=14, on_bad_row="drop", log=said.append)
    kept = [i for i in range(128) if i not in long]
    assert all(short.get(i) == whole.get(i) for i in kept) and f"{len(long)} of the first" in said[0]
    easy = [i for i in long if i % 2 == 0]  # products never fit
    assert easy and all(len(short.get(i).question) <= 14 and short.get(i) == short.get(i) for i in easy)
    with pytest.raises(DataError, match="so are the 63 tried"):
        short.get(1)
    with pytest.raises(DataError, match="has the splits train, test"):
        load("arithmetic", split="validation")


def test_order_is_seeded_complete_and_seekable(tmp_path):
    problems = load(write_jsonl(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(10)]))
    ask = lambda seed, first, count: [p.question for p in problems.batch(seed, first, count)]
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
    import numpy as np

    from cgrpo_jax.grading.rewards import REASONING_GYM_TASKS, score
    from cgrpo_jax.records import Completion

    completion = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), np.ones(1, np.float32), True)
    assert load("reasoning_gym:chain_sum").get(0) != load("reasoning_gym:chain_sum", split="test").get(0)
    for task in ("chain_sum", "gcd", "caesar_cipher", "count_bits"):
        problem = load(f"reasoning_gym:{task}").get(3)
        texts = [f"\\boxed{{{problem.answer}}}", "\\boxed{nonsense}", "no answer"]
        attempts = score([(problem, completion, text) for text in texts], verifier=None)
        assert [attempt.reward for attempt in attempts] == [1.0, 0.0, 0.0], task
    assert "countdown" not in REASONING_GYM_TASKS and "n_queens" not in REASONING_GYM_TASKS


def test_a_scorer_that_fails_gives_no_reward_and_is_counted(monkeypatch):
    """And those after it are scored as ever."""
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="reasoning_gym is not installed")
    import numpy as np

    from cgrpo_jax.grading.rewards import score
    from cgrpo_jax.records import Completion

    problem = load("reasoning_gym:chain_sum").get(3)
    own = reasoning_gym.get_score_answer_fn("chain_sum")

    def fragile(answer, entry):
        if answer == "1/0":
            raise ZeroDivisionError
        return own(answer, entry)

    monkeypatch.setattr(reasoning_gym, "get_score_answer_fn", lambda name: fragile)
    completion = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), np.ones(1, np.float32), True)
    texts = ["\\boxed{1/0}", f"\\boxed{{{problem.answer}}}"]
    attempts = score([(problem, completion, text) for text in texts], verifier=None)
    assert [(attempt.reward, attempt.status) for attempt in attempts] == [(0.0, "error"), (1.0, "ok")]


def test_gsm8k_whole(shared_data):
    """Every gold answer of the test file is readable by math-verify."""
    with Verifier(VerifierConfig()) as verifier:
        problems = load(shared_data / "gsm8k/test.jsonl", verifier.parsable, max_prompt_tokens=10_000)
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
