"""method=eval: the figures, what is stored and under which conditions it is used again, and going on after a kill."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import QUICKSTART
from safetensors.numpy import load_file, save_file

from cgrpo_jax import config
from cgrpo_jax.errors import CheckpointError, ConfigError, DataError
from cgrpo_jax.evaluating import evaluate_tasks
from cgrpo_jax.run.models import Model

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
    """results.json without what depends on the processes that sampled: wall times, and that there were several."""
    results = json.loads((workdir / "results.json").read_text())
    return {name: value for name, value in results.items() if name not in ("sampling", "notes")}


def own_model(tmp_path):
    """A copy of the embedded model that a test may spoil."""
    return pathlib.Path(shutil.copytree(QUICKSTART, tmp_path / "model"))


def change_weights(model, change):
    tensors = load_file(model / "model.safetensors")
    changed = {name: change(name, value.astype(np.float32)) for name, value in tensors.items()}
    save_file(changed, model / "model.safetensors", {"format": "pt"})


def negated(name, value):
    return -value


def overflowing(name, value):
    """Finite weights, of which the last norm's are so large that no logit is."""
    return np.full_like(value, 3e38) if name == "model.norm.weight" else value


def cut(workdir, lines):
    """The workdir as a kill leaves it after so many answers."""
    path = workdir / "eval/sums/responses.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    (workdir / "results.json").unlink()


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
    assert (done / "w/report.html").exists()
    text = (done / "w/results.md").read_text()
    assert f"| sums | 12 x 4 | {100 * of['pass@1']:.1f} [" in text
    assert all((done / f"w/{name}.png").stat().st_size > 10_000 for name in ("pass_at_1", "pass_at_k"))


def test_grading_again_samples_nothing(done, monkeypatch):
    before = figures(done / "w"), (done / "w/eval/sums/responses.jsonl").read_bytes()
    monkeypatch.setattr("cgrpo_jax.run.models.Model.weights", None)  # would be called to sample
    evaluate_tasks(settings(done), done / "w")
    assert (figures(done / "w"), (done / "w/eval/sums/responses.jsonl").read_bytes()) == before


def test_time_and_speed_are_those_of_the_whole_evaluation(done):
    """One queue serves all tasks, so no task has a speed of its own; grading again costs no sampling time."""
    results = json.loads((done / "w/results.json").read_text())
    of, stored = results["sampling"], (done / "w/eval/sums/responses.jsonl").read_text().splitlines()
    assert of["tokens"] == sum(len(json.loads(line)["ids"]) for line in stored)
    assert of["tokens_per_s"] == pytest.approx(of["tokens"] / of["seconds"]) and len(of["runs"]) == 1
    assert not any(
        key in part for part in (results["tasks"]["sums"], results["mean"]) for key in ("seconds", "tokens_per_s")
    )
    assert f"{of['tokens']} tokens, {of['tokens_per_s']:.0f} tokens/s." in (done / "w/results.md").read_text()


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
        "import pathlib, sys; sys.path.insert(0, 'tests'); from test_eval_tasks import *;"
        f"evaluate_tasks(settings(pathlib.Path({str(done)!r})), pathlib.Path({str(tmp_path / 'w')!r}))"
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
    runs = json.loads((tmp_path / "w/results.json").read_text())["sampling"]["runs"]
    assert [run["stored"] for run in runs] == [0, 3]


def test_a_model_that_was_replaced_at_its_path_is_not_given_the_old_ones_answers(tmp_path):
    model = own_model(tmp_path)
    cfg = settings(tmp_path, **{"model.path": str(model), "eval.problems": 2, "eval.samples": 1})
    evaluate_tasks(cfg, tmp_path / "w")
    stored = (tmp_path / "w/eval/settings.json").read_text()
    change_weights(model, negated)
    with pytest.raises(ConfigError, match=r"other settings: weights = [0-9a-f]{12} \(was [0-9a-f]{12}\); take another"):
        evaluate_tasks(cfg, tmp_path / "w")
    shutil.copyfile(QUICKSTART / "model.safetensors", model / "model.safetensors")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    with pytest.raises(ConfigError, match=r"other settings: files = "):
        evaluate_tasks(cfg, tmp_path / "w")
    assert (tmp_path / "w/eval/settings.json").read_text() == stored


def test_the_same_model_at_another_path_keeps_its_answers(done, tmp_path, monkeypatch):
    shutil.copytree(done / "w", tmp_path / "w")
    monkeypatch.setattr("cgrpo_jax.run.models.Model.weights", None)  # would be called to sample
    evaluate_tasks(settings(done, **{"model.path": str(own_model(tmp_path))}), tmp_path / "w")
    assert figures(tmp_path / "w")["tasks"] == figures(done / "w")["tasks"]


def test_weights_that_are_replaced_while_they_are_read_are_refused(tmp_path, monkeypatch):
    model, load = own_model(tmp_path), Model.weights

    def replace_and_load(run):
        change_weights(model, negated)
        return load(run)

    monkeypatch.setattr("cgrpo_jax.run.models.Model.weights", replace_and_load)
    with pytest.raises(ConfigError, match="the weights were replaced while they were read"):
        evaluate_tasks(settings(tmp_path, **{"model.path": str(model)}), tmp_path / "w")
    assert not (tmp_path / "w/eval/sums/responses.jsonl").exists()


def test_stored_answers_of_a_model_that_nobody_named_are_refused(done, tmp_path):
    shutil.copytree(done / "w", tmp_path / "w")
    path = tmp_path / "w/eval/settings.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in old.items() if name not in ("weights", "files")}))
    with pytest.raises(ConfigError, match=r"settings.json: no weights, files in it \(an older version wrote it\)"):
        evaluate_tasks(settings(done), tmp_path / "w")
    path.write_text('{"weights"')
    with pytest.raises(ConfigError, match=r"settings.json: not valid JSON"):
        evaluate_tasks(settings(done), tmp_path / "w")


def test_stored_answers_that_ended_elsewhere_are_refused(done, tmp_path, monkeypatch):
    """The set of ids that end a response is found by this project, so the files alone do not decide it."""
    shutil.copytree(done / "w", tmp_path / "w")
    monkeypatch.setattr("cgrpo_jax.text.tokenizer.Tokenizer._turn_ends", lambda self: {"<|endoftext|>"})
    with pytest.raises(ConfigError, match=r"of other settings: eos_ids = \[0, 2\] \(was \[2\]\)"):
        evaluate_tasks(settings(done), tmp_path / "w")


def test_a_model_that_computes_nan_is_an_error_and_not_a_score(tmp_path):
    model = own_model(tmp_path)
    change_weights(model, overflowing)
    cfg = settings(tmp_path, **{"model.path": str(model), "eval.problems": 2})
    for _ in range(2):  # the second time from what is stored
        with pytest.raises(CheckpointError, match=r"responses.jsonl: \d+ of \d+ sampled tokens have .* not finite"):
            evaluate_tasks(cfg, tmp_path / "w")
    first = json.loads((tmp_path / "w/eval/sums/responses.jsonl").read_text().splitlines()[0])
    assert first["nonfinite"] == len(first["ids"]) > 0
    assert not (tmp_path / "w/results.json").exists()


def test_an_evaluation_that_was_resumed_says_so(done, tmp_path, capsys):
    shutil.copytree(done / "w", tmp_path / "w")
    cut(tmp_path / "w", 5)
    evaluate_tasks(settings(done), tmp_path / "w")
    results = json.loads((tmp_path / "w/results.json").read_text())
    (note,) = results["notes"]
    assert note.startswith("Resumed after 5 of 48 answers. The last bits of float32 logits depend on")
    assert note in (tmp_path / "w/results.md").read_text() and note in capsys.readouterr().err
    first, second = results["sampling"]["runs"]
    assert (first["stored"], second["stored"], second["of"]) == (0, 5, 48)
    assert results["sampling"]["seconds"] == pytest.approx(first["seconds"] + second["seconds"])
    assert "Resumed" not in (done / "w/results.md").read_text()


@pytest.mark.parametrize("damage", ["{no json", '{"problem": 1}', "[]", "\x00"])
def test_a_damaged_line_is_named(done, tmp_path, damage):
    shutil.copytree(done / "w", tmp_path / "w")
    path = tmp_path / "w/eval/sums/responses.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], damage, *lines[7:]]) + "\n")
    with pytest.raises(DataError, match=r"responses.jsonl, line 7: no stored answer") as error:
        evaluate_tasks(settings(done), tmp_path / "w")
    assert len(str(error.value).splitlines()) == 1


def test_copies_of_a_problem_are_one_problem(tmp_path):
    """Three problems, each in two rows far apart: intervals of three, and both counts in the table."""
    cfg = settings(tmp_path, **{"eval.samples": 2})
    rows = (tmp_path / "sums.jsonl").read_text().splitlines()[:3]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows * 2))
    evaluate_tasks(cfg, tmp_path / "w")
    of = figures(tmp_path / "w")["tasks"]["sums"]
    assert (of["problems"], of["rows"], len(of["correct"])) == (3, 6, 6) and of["content"][:3] == of["content"][3:]
    assert "| sums | 3 x 2 copies x 2 |" in (tmp_path / "w/results.md").read_text()
