"""The benchmark's own arithmetic and its command; it measures, so nothing here is timed."""

import json
import subprocess
import sys

import pytest

from cgrpo_jax.bench import Round, measure, recorded, sums
from cgrpo_jax.errors import ConfigError


def test_rates_are_tokens_over_seconds():
    calls = []
    result = measure(lambda round_: calls.append(round_) or Round(1000, 4000, 7), repeats=3)
    assert calls == [0, 1, 2, 3]
    assert result["slot_use"] == 0.25 and result["prefilled_tokens"] == 7
    for name in ("min", "median", "max"):
        inverse = {"min": "max", "median": "median", "max": "min"}[name]
        assert abs(result["tokens_per_s"][name] * result["step_s"][inverse] - 1000) < 1e-3


def test_without_a_warm_up_every_round_counts():
    result = measure(lambda round_: Round(1000), repeats=2, warm_up=False)
    assert result["tokens_per_s"]["min"] > 0 and "slot_use" not in result
    calls = []
    measure(lambda round_: calls.append(round_) or Round(1), repeats=2, warm_up=False)
    assert calls == [0, 1]


def test_questions_differ_by_round_and_know_their_answers():
    assert sums(4, 0) != sums(4, 1) and sums(4, 1) == sums(4, 1)
    for problem in sums(4, 2):
        a, b = problem.question.removeprefix("What is ").removesuffix("?").split(" + ")
        assert problem.answer == str(int(a) + int(b))


@pytest.mark.thorough
def test_command(tmp_path):
    """Each mode on the embedded model; `sample` makes exactly rows x new_tokens tokens."""
    for mode in ("sample", "update", "step"):
        command = [
            sys.executable, "-m", "cgrpo_jax.bench", f"--mode={mode}", "--model=package://quickstart", "--prompts=2",
            "--samples=2", "--new_tokens=8", "--micro_batch=2", "--repeats=1", f"--json={tmp_path}/{mode}.json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result = json.loads((tmp_path / f"{mode}.json").read_text())
        assert json.loads(done.stdout) == result
        assert result["peak_memory_gib"] > 0 and result["compile_s"] >= 0 and result["step_s"]["median"] > 0
        if mode != "step":
            assert "round 1" in done.stderr and "32 tokens" in done.stderr


@pytest.mark.parametrize("record", ["[]", "{}", "no JSON", '{"prompt_tokens": [1], "response_tokens": []}'])
def test_a_record_of_lengths_that_is_none(tmp_path, record):
    (tmp_path / "lengths.json").write_text(record)
    with pytest.raises(ConfigError, match=r"lengths\.json: no record of lengths"):
        recorded(tmp_path / "lengths.json", 1, 10)


@pytest.mark.thorough
def test_recorded_lengths(tmp_path):
    """`refill` makes exactly the recorded tokens in fewer row-steps than `static`, which is as long as its longest."""
    lengths = {"prompt_tokens": [5, 9, 7], "response_tokens": [[30, 2, 3, 4], [1, 2, 3, 4], [5, 6, 20, 8]]}
    (tmp_path / "lengths.json").write_text(json.dumps(lengths))
    found = {}
    for mode in ("refill", "static"):
        command = [
            sys.executable, "-m", "cgrpo_jax.bench", f"--mode={mode}", "--model=package://quickstart", "--prompts=2",
            "--rows=4", "--repeats=1", f"--lengths={tmp_path}/lengths.json", f"--json={tmp_path}/{mode}.json",
        ]  # fmt: skip
        subprocess.run(command, capture_output=True, text=True, check=True)
        found[mode] = json.loads((tmp_path / f"{mode}.json").read_text())
    assert found["static"]["row_steps"] == 4 * 30 + 4 * 4 and found["refill"]["row_steps"] < 4 * 30 + 8
    for result in found.values():
        assert result["slot_use"] * result["row_steps"] == 30 + 9 + 10 and result["prefilled_tokens"] == 4 + 8
