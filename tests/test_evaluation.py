"""The parts of an evaluation: identity of problems and models, the store's clock, metrics of an evaluation in training."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data.rows import choice_problem
from cgrpo_jax.data.tasks import load_task
from cgrpo_jax.errors import DataError
from cgrpo_jax.evaluation import store
from cgrpo_jax.evaluation.exam import accuracies
from cgrpo_jax.evaluation.intervals import wilson
from cgrpo_jax.evaluation.store import contents, files_digest, nonfinite_tokens, problem_digest
from cgrpo_jax.records import Attempt, Completion, Problem
from cgrpo_jax.text.prompts import question_messages


def problem(question, answer="1", tag=""):
    return Problem(question, answer, question_messages(question), tag=tag)


def attempt(correct, logp=(-0.5, -0.1)):
    logp = np.array(logp, np.float32)
    completion = Completion(np.arange(len(logp), dtype=np.int32), logp, logp, True)
    return Attempt(completion, "", float(correct), bool(correct), "1" if correct else "2", "ok")


def test_a_problem_is_its_question_its_gold_and_its_options():
    first = problem_digest(problem("What is 1?"))
    assert first == problem_digest(problem(" What is 1?\n", tag="hard"))
    assert len({first, problem_digest(problem("What is 2?")), problem_digest(problem("What is 1?", "2"))}) == 3


def test_a_choice_is_the_same_problem_in_whatever_order_its_options_are_shown():
    """The order depends on the row; another right option, other options and another question are other problems."""
    colours = ["red", "blue", "green"]
    same = [choice_problem("Which?", colours, 1, str(row)) for row in range(12)]
    others = [
        choice_problem("Which?", colours, 2, "0"), choice_problem("Which?", ["red", "blue", "grey"], 1),
        choice_problem("Why?", colours, 1, "0"),
    ]  # fmt: skip
    assert len({one.question for one in same}) > 1
    assert len({problem_digest(one) for one in same}) == 1
    assert len({problem_digest(one) for one in [same[0], *others]}) == 4


def test_the_authors_file_holds_1560_distinct_problems(shared_data):
    """2,019 rows: AIME's 30 problems stand there eight times, AMC's 83 four times, all others once."""
    path = shared_data / "benchmarks/critique_grpo_test.parquet"
    task = load_task("validation", str(path), 0, DataConfig(), lambda problem: None, print)
    rows = Counter(problem_digest(named.problem) for named in task)
    assert Counter(rows.values()) == {1: 1447, 4: 83, 8: 30} and rows.total() == 2019


def test_weights_are_all_safetensors_and_their_index(tmp_path):
    changes = [
        ("a.safetensors", b"1"),
        ("b.safetensors", b"1"),
        ("b.safetensors", b"2"),
        ("model.safetensors.index.json", b"{}"),
    ]
    seen = {contents(tmp_path, ())["weights"]}
    for name, content in changes:
        (tmp_path / name).write_bytes(content)
        seen.add(contents(tmp_path, ())["weights"])
    assert len(seen) == 5
    before = contents(tmp_path, ())["weights"]
    (tmp_path / "config.json").write_text("{}")
    assert contents(tmp_path, ())["weights"] == before
    both = files_digest(tmp_path, ["config.json", "a.safetensors", "missing"])
    assert both == files_digest(tmp_path, ["a.safetensors", "config.json"]) != files_digest(tmp_path, ["config.json"])


def test_wall_times_of_processes_add_up(tmp_path, monkeypatch):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(store.time, "perf_counter", lambda: float(next(clock)))
    first = store.Answers(tmp_path, [])
    first.begin(0, 6)
    first._count_tokens(100)
    first._count_tokens(60)
    killed = store.Answers(tmp_path, [])
    killed.begin(2, 6)  # ends before its first answer
    last = store.Answers(tmp_path, [])
    last.begin(2, 6)
    last._count_tokens(20)
    got = store.Answers(tmp_path, []).summary()
    assert (got["seconds"], got["tokens"], got["tokens_per_s"]) == (20 + 10, 180, 6)
    assert last.resumed("bfloat16").startswith("Resumed after 2 of 6 answers. The last bits of bfloat16 logits")
    assert first.resumed("float32") is None
    (tmp_path / "runs.json").write_text("[{")
    with pytest.raises(DataError, match=r"runs.json: not valid JSON .*; remove it"):
        store.Answers(tmp_path, [])


def test_accuracy_in_training_is_over_distinct_problems():
    """The first of two problems stands in eight rows: its copies are no further evidence."""
    problems = [problem("A", tag="hard")] * 8 + [problem("B")]
    got = accuracies(problems, [[attempt(1), attempt(0)]] * 8 + [[attempt(0), attempt(0)]], "eval")
    assert got["eval/pass@1"] == pytest.approx(0.25)
    assert (got["eval/pass@1/low"], got["eval/pass@1/high"]) == pytest.approx(wilson(0.25, 2))
    assert (got["eval/pass@1/hard/low"], got["eval/pass@1/hard/high"]) == pytest.approx(wilson(0.5, 1))
    assert "eval/nonfinite" not in got


def test_tokens_of_no_finite_log_probability_are_counted():
    broken = [attempt(0, (np.nan, -1.0, np.inf)), attempt(0, (-np.inf,)), attempt(1)]
    assert nonfinite_tokens([one.completion for one in broken]) == 3
    assert nonfinite_tokens([broken[2].completion._replace(logp=np.zeros(0, np.float32))]) == 0
    got = accuracies([problem("A")], [broken], "eval/gsm8k")
    assert got["eval/gsm8k/nonfinite"] == 3 and json.dumps(got)
