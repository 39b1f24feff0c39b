"""The embedded model and what the quickstart promises of it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import QUICKSTART

from cgrpo_jax import embedded_model

ROOT = os.path.dirname(os.path.dirname(__file__))


def run(config, workdir, *arguments):
    command = [sys.executable, "-m", "cgrpo_jax.main", f"--config={config}", f"--workdir={workdir}", *arguments]
    subprocess.run(command, check=True, cwd=ROOT)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/pass@1" in row]


def test_shipped_folder_is_small_and_made_by_its_recipe(tmp_path):
    embedded_model.write_folder(tmp_path / "made")
    for file in (tmp_path / "made").iterdir():
        assert file.read_bytes() == (QUICKSTART / file.name).read_bytes(), file.name
    assert sum(file.stat().st_size for file in QUICKSTART.iterdir()) < 10e6


def test_wilson_interval():
    """Values of the closed formula, e.g. 0 of 10 and 5 of 10 as tabulated by Newcombe (1998) and others."""
    from cgrpo_jax.evaluation.intervals import wilson

    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe's own example


@pytest.mark.slow
def test_critique_grpo_solves_what_dr_grpo_never_solves(tmp_path):
    """The same steps from the same model: the hard half rises from about 0 to at least 0.4, or stays at most 0.05."""
    ours = run("configs/quickstart.py", tmp_path / "critique")
    plain = run("configs/quickstart.py:dr_grpo", tmp_path / "dr")
    assert ours[0]["eval/pass@1/hard"] <= 0.01 and plain[0]["eval/pass@1/hard"] <= 0.01
    assert ours[-1]["step"] == plain[-1]["step"]
    assert ours[-1]["eval/pass@1"] - ours[0]["eval/pass@1"] >= 0.30
    assert ours[-1]["eval/pass@1/hard"] >= 0.40
    assert plain[-1]["eval/pass@1/hard"] <= 0.05


@pytest.mark.slow
def test_the_warm_start_recipe_gives_a_model_that_passes_the_same(tmp_path):
    """About twelve minutes: from random weights to a model on which the quickstart reaches its figures."""
    from cgrpo_jax import convert

    subprocess.run(
        [sys.executable, "-m", "cgrpo_jax.main", "--config=configs/quickstart_sft.py", f"--workdir={tmp_path}/sft"],
        check=True, cwd=ROOT,
    )  # fmt: skip
    convert.convert(f"{tmp_path}/sft", "hf", f"{tmp_path}/model")
    rows = run("configs/quickstart.py", tmp_path / "critique", f"--config.model.path={tmp_path}/model")
    assert rows[0]["eval/pass@1/hard"] <= 0.02
    assert rows[-1]["eval/pass@1/hard"] >= 0.40 and rows[-1]["eval/pass@1"] - rows[0]["eval/pass@1"] >= 0.30
