"""method=eval: the figures, what is stored, and going on after a kill."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import QUICKSTART

from cgrpo_jax import config, eval_report
from cgrpo_jax.config import ConfigError
from cgrpo_jax.data.sources import DataError
from cgrpo_jax.evaluating import evaluate_tasks

ROOT = pathlib.Path(__file__).parent.parent


def settings(tmp_path, **changes):
    rows = [{"question": f"What is {a}+{b}?", "answer": a + b} for a in (23, 46, 118) for b in (7, 16, 246, 31)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = config.default_config("dr_grpo")
    raw.update_from_flattened_dict(
        {
            "method": "eval", "model.path": str(QUICKSTART), "eval.tasks": f"sums={tmp_path}/sums.jsonl", "eval.samples": 4,
            "eval.problems": 0, "data.max_prompt_tokens": 64, "sampling.max_new_tokens": 48,
        }
        | changes
    )  # fmt: skip
    return config.from_config_dict(raw)


def figures(workdir):
    """results.json without wall times."""
    results = json.loads((workdir / "results.json").read_text())
    for of in [*results["tasks"].values(), results["mean"]]:
        of.pop("seconds", None), of.pop("tokens_per_s", None)
    return results


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    evaluate_tasks(settings(folder), folder / "w")
    return folder


def test_figures_follow_from_the_graded_answers(done):
    rows = [json.loads(line) for line in (done / "w/eval/sums/graded.jsonl").read_text().splitlines()]
    assert len(rows) == 12 * 4
    of = figures(done / "w")["tasks"]["sums"]
    assert of["pass@1"] == pytest.approx(sum(row["correct"] for row in rows) / 48)
    by_id = {name: [row["correct"] for row in rows if row["id"] == name] for name in of["ids"]}
    assert of["pass@k"]["4"] == pytest.approx(sum(map(any, by_id.values())) / 12)
    assert 0 < of["pass@1"] < 1  # easy sums and ones with carries
    assert all(row["correct"] == (row["answer"] == row["gold"]) for row in rows)
    text = (done / "w/results.md").read_text()
    assert f"| sums | 12 x 4 | {100 * of['pass@1']:.1f} [" in text
    assert all((done / f"w/{name}.png").stat().st_size > 10_000 for name in ("pass_at_1", "pass_at_k"))


def test_grading_again_samples_nothing(done, monkeypatch):
    before = figures(done / "w"), (done / "w/eval/sums/responses.jsonl").read_bytes()
    monkeypatch.setattr("cgrpo_jax.build.initial_params", None)  # would be called to sample
    evaluate_tasks(settings(done), done / "w")
    assert (figures(done / "w"), (done / "w/eval/sums/responses.jsonl").read_bytes()) == before


def test_stored_answers_of_other_settings_are_refused(done):
    with pytest.raises(ConfigError, match=r"temperature = 0.5 \(was 1.0\)"):
        evaluate_tasks(settings(done, **{"eval.temperature": 0.5}), done / "w")


def test_stored_answers_to_other_questions_are_refused(done, tmp_path):
    shutil.copytree(done / "w", tmp_path / "w")
    cfg = settings(tmp_path)
    rows = (tmp_path / "sums.jsonl").read_text().replace("118+16", "118+17")
    (tmp_path / "sums.jsonl").write_text(rows)
    with pytest.raises(DataError, match=r"sums/responses.jsonl: its answers to problem 9 are to another prompt"):
        evaluate_tasks(cfg, tmp_path / "w")


def test_killed_it_goes_on_to_the_same_figures(done, tmp_path):
    """SIGKILL as soon as some answers are stored, and a line cut in two as a kill may leave it."""
    code = (
        "import pathlib, sys; sys.path.insert(0, 'tests'); from test_eval_tasks import *; import cgrpo_jax.sampling.queue as g; "
        f"g.CHUNK = 4; evaluate_tasks(settings(pathlib.Path({str(done)!r})), pathlib.Path({str(tmp_path / 'w')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    path = tmp_path / "w/eval/sums/responses.jsonl"
    while process.poll() is None and (not path.exists() or path.read_text().count("\n") < 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    evaluate_tasks(settings(done), tmp_path / "w")
    assert figures(tmp_path / "w") == figures(done / "w")
    assert path.read_text().startswith("".join(lines[:3]))


def test_runs_side_by_side(done, tmp_path):
    """A run against itself: no difference; a better one: its margin; runs that share nothing are refused."""
    results = json.loads((done / "w/results.json").read_text())
    better = json.loads(json.dumps(results))
    of = better["tasks"]["sums"]
    of["correct"] = [[1] * 4 for _ in of["correct"]]
    for name, value in (("same", results), ("better", better)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(value))
    text = eval_report.compare([done / "w", tmp_path / "same", tmp_path / "better"], tmp_path / "out")
    rows = [line for line in text.splitlines() if line.startswith("| sums")]
    assert "| same | 12 | +0.0 [+0.0, +0.0] | 1 |" in rows[0]
    margin = float(rows[1].split("| better | 12 | +")[1].split(" ")[0])
    assert margin == pytest.approx(100 * (1 - results["tasks"]["sums"]["pass@1"]), abs=0.06)
    assert (tmp_path / "out/pass_at_k.png").exists()
    better["tasks"] = {"other": of}
    (tmp_path / "better/results.json").write_text(json.dumps(better))
    with pytest.raises(eval_report.ReportError, match="no task in common"):
        eval_report.compare([done / "w", tmp_path / "better"], tmp_path / "out")
    with pytest.raises(eval_report.ReportError, match="no such file"):
        eval_report.read(tmp_path)
