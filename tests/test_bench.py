"""The benchmark's own arithmetic and its command; it measures, so nothing here is timed."""

import json
import subprocess
import sys

from cgrpo_jax.bench import measure, sums


def test_rates_are_tokens_over_seconds():
    calls = []
    result = measure(lambda round_: calls.append(round_) or 1000, repeats=3)
    assert calls == [0, 1, 2, 3]
    for name in ("min", "median", "max"):
        inverse = {"min": "max", "median": "median", "max": "min"}[name]
        assert abs(result["tokens_per_s"][name] * result["step_s"][inverse] - 1000) < 1e-3


def test_questions_differ_by_round_and_know_their_answers():
    assert sums(4, 0) != sums(4, 1) and sums(4, 1) == sums(4, 1)
    for problem in sums(4, 2):
        a, b = problem.question.removeprefix("What is ").removesuffix("?").split(" + ")
        assert problem.answer == str(int(a) + int(b))


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
