"""The whole loop on the embedded model: what it writes, resume, export, refusals."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import QUICKSTART

from cgrpo_jax import config, convert
from cgrpo_jax.train import TrainingError, train


def small(**changes):
    """Two problems, three responses, two steps of the quickstart."""
    raw = config.default_config("critique_grpo")
    raw.model.path = "package://quickstart"
    raw.data.source = "arithmetic"
    raw.data.max_prompt_tokens, raw.refine.max_prompt_tokens = 64, 256
    raw.sampling.max_new_tokens, raw.sampler_rows = 64, 8
    raw.train.steps, raw.train.prompts, raw.train.samples, raw.train.micro_batch = 2, 2, 3, 1
    raw.optimizer.learning_rate = 1e-3
    raw.checkpoint.every = 1
    raw.verifier.workers = 1
    raw.update_from_flattened_dict(changes)
    return config.from_config_dict(raw)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k and "_per_s" not in k} for row in rows]


def weights(workdir, tmp_path, name):
    convert.convert(str(workdir), "hf", str(tmp_path / name))
    from safetensors.numpy import load_file

    return load_file(tmp_path / name / "model.safetensors")


METRICS = [
    "reward/responses",
    "reward/refinements",
    "refine/rate",
    "refine/success",
    "problems/solve_all",
    "problems/solve_none",
    "policy/entropy",
    "length/responses",
    "truncated/responses",
    "loss/responses",
    "loss/refinements",
    "policy/refined_prob",
    "policy/grad_norm",
    "sampler/logp_diff_mean",
    "sampler/logp_diff_max",
    "seconds/sample",
    "seconds/refine",
    "seconds/update",
    "tokens_per_s/sample",
    "tokens_per_s/update",
    "verifier/timeouts",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps with evaluation."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    with jax.numpy_rank_promotion("allow"):  # Orbax and optax are not ours to judge
        train(small(**{"eval.every": 1, "eval.problems": 8, "eval.samples": 2}), workdir)
    return workdir


def test_what_a_run_writes(finished):
    rows = lines(finished / "metrics.jsonl")
    trained = [row for row in rows if "reward/responses" in row]
    assert [row["step"] for row in trained] == [1, 2]
    assert all(name in row for row in trained for name in METRICS)
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert max(row["sampler/logp_diff_max"] for row in trained) < 1e-3
    evaluated = [row for row in rows if "eval/pass@1" in row]
    assert [row["step"] for row in evaluated] == [0, 1, 2]
    for row in evaluated:
        np.testing.assert_allclose(row["eval/pass@1"], (row["eval/pass@1/easy"] + row["eval/pass@1/hard"]) / 2)
        assert row["eval/pass@1/low"] <= row["eval/pass@1"] <= row["eval/pass@1/high"]
    assert list((finished / "tensorboard").iterdir())
    groups = lines(finished / "rollouts/000001.jsonl")
    assert len(groups) == 2
    for group in groups:
        assert len(group["responses"]) == 3 and group["question"] and group["answer"]
        solved = any(r["reward"] == 1 for r in group["responses"])
        assert len(group["refinements"]) == (0 if solved else 3)
        assert all(("critique" in r) != solved for r in group["responses"])
    assert json.loads((finished / "config.json").read_text())["train"]["steps"] == 2


def test_a_stopped_run_resumes_to_the_same_end(finished, tmp_path):
    """One step, then the same command for two: as if never stopped. A second call finds nothing to do."""
    changes = {"eval.every": 1, "eval.problems": 8, "eval.samples": 2}
    with jax.numpy_rank_promotion("allow"):
        train(small(**changes, **{"train.steps": 1}), tmp_path / "w")
        train(small(**changes), tmp_path / "w")
        before = (tmp_path / "w/metrics.jsonl").read_text()
        train(small(**changes), tmp_path / "w")
    assert (tmp_path / "w/metrics.jsonl").read_text() == before
    assert without_times(lines(tmp_path / "w/metrics.jsonl")) == without_times(lines(finished / "metrics.jsonl"))
    for step in ("000001", "000002"):
        assert (tmp_path / f"w/rollouts/{step}.jsonl").read_bytes() == (
            finished / f"rollouts/{step}.jsonl"
        ).read_bytes()
    one, other = weights(tmp_path / "w", tmp_path, "a"), weights(finished, tmp_path, "b")
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    start = weights(QUICKSTART, tmp_path, "c")
    assert any(one[name].tobytes() != start[name].tobytes() for name in one)


def test_the_trained_model_answers_in_transformers(finished, tmp_path):
    """The export generates, greedily, what our sampler generates."""
    pytest.importorskip("torch", reason="torch is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert.convert(str(finished), "hf", str(tmp_path / "model"))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    from cgrpo_jax.arithmetic import problem

    question = problem(0, "test", 0)
    prompt = tokenizer.apply_chat_template(
        list(question.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert f"\\boxed{{{question.answer}}}" in text


VARIANTS = {
    "dr_grpo": {"refine.trigger": "never", "train.samples": 4},
    "release": {
        "train.samples": 4, "refine.trigger": "always", "refine.group": "replace", "refine.select": "correct_first",
        "objective.clip_responses": False, "objective.clip_refinements": False, "objective.weights": "uniform",
        "objective.divide_by_std": True, "objective.entropy_coef": 0.001, "train.updates_per_rollout": 2,
        "refine.critique": "indicative",
    },
    "grpo": {
        "refine.trigger": "never", "train.samples": 4, "objective.aggregation": "sequence_mean", "objective.kl_coef": 0.04,
        "objective.divide_by_std": True,
    },
    "ablation": {
        "refine.trigger": "any_wrong", "refine.k": 1, "refine.select": "random", "objective.refined_shape": "ratio",
        "refine.critique": "worked", "objective.aggregation": "token_mean", "train.remat": "full", "sampling.top_p": 0.9,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_every_switch_of_the_tables_trains(tmp_path, name):
    with jax.numpy_rank_promotion("allow"):
        train(small(**VARIANTS[name], **{"train.steps": 1}), tmp_path / "w")
    (row,) = lines(tmp_path / "w/metrics.jsonl")
    assert np.isfinite(list(row.values())).all()
    assert (row["refine/rate"] == 0) == (VARIANTS[name]["refine.trigger"] == "never")


def test_non_finite_gradients_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("cgrpo_jax.batch.group_advantages", lambda reward_PG, mask_PG, **_: reward_PG * np.nan)
    with jax.numpy_rank_promotion("allow"), pytest.raises(TrainingError, match="3 non-finite gradients in a row"):
        train(small(**{"train.steps": 9}), tmp_path / "w")
    rows = lines(tmp_path / "w/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["policy/nonfinite_total"] == 2


def run_main(*arguments):
    command = [sys.executable, "-m", "cgrpo_jax.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(__file__)))


def test_errors_are_one_line_and_cost_nothing(tmp_path):
    for argument, words in [
        ("--config.train.stepz=3", "steps"),
        ("--config.data.source=nowhere.jsonl", "eval.source"),
        ("--config.data.source=reasoning_gym:countdown", "not on the list"),
        ("--config.refine.k=0", "refine.k must be at least 1"),
        ("--config.model.path=/no/such/folder", "/no/such/folder"),
    ]:
        done = run_main("--config=configs/quickstart.py", f"--workdir={tmp_path}/w", argument)
        assert done.returncode != 0 and words in done.stderr, (argument, done.stderr)
        assert "Traceback" not in done.stderr
