"""Runs side by side: problems are paired by their content, and what was sampled otherwise is said."""

import json
import sys

import numpy as np
import pytest
from test_eval_tasks import settings

from cgrpo_jax import eval_report
from cgrpo_jax.config.options import drawn
from cgrpo_jax.evaluating import evaluate_tasks
from cgrpo_jax.evaluation import tables


def compare(monkeypatch, *folders):
    """The command over these workdirs; returns the rows of its table by run, and its whole text."""
    out = folders[0].parent / "compared"
    monkeypatch.setattr(sys, "argv", ["eval_report", *map(str, folders), f"--out={out}"])
    eval_report.main()
    text = (out / "compared.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| sums")]
    return {row[1]: row for row in rows}, text


def refused(monkeypatch, *folders):
    with pytest.raises(SystemExit) as stop:
        compare(monkeypatch, *folders)
    return str(stop.value)


def written(folder, results, **changes):
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Greedy answers to twelve sums."""
    folder = tmp_path_factory.mktemp("report")
    evaluate_tasks(settings(folder, **{"eval.samples": 1, "eval.temperature": 0.0}), folder / "w")
    return folder / "w"


@pytest.fixture
def results(done):
    return json.loads((done / "results.json").read_text())


def test_a_run_against_itself_and_against_a_better_one(done, results, tmp_path, monkeypatch):
    better = json.loads(json.dumps(results))
    better["tasks"]["sums"]["correct"] = [[1]] * 12
    folders = [written(tmp_path / "same", results), written(tmp_path / "better", better)]
    rows, _ = compare(monkeypatch, done, *folders)
    assert rows["same"][2:] == ["12", "+0.0 [-24.3, +24.3]", "1", ""]
    margin = float(rows["better"][3].split(" ")[0])
    assert margin == pytest.approx(100 * (1 - results["tasks"]["sums"]["pass@1"]), abs=0.06)
    assert (done.parent / "compared/pass_at_1.png").exists()


def test_the_same_problems_in_other_rows_are_paired_by_content(done, results, tmp_path, monkeypatch):
    """Greedy answers depend on the question alone, so on shared problems nothing differs, wherever they stand."""
    cfg = settings(tmp_path, **{"eval.samples": 1, "eval.temperature": 0.0})
    rows = (tmp_path / "sums.jsonl").read_text().splitlines()
    other = json.dumps({"question": "What is 900+99?", "answer": 999})
    (tmp_path / "sums.jsonl").write_text("\n".join([other, *rows[:1:-1]]))
    evaluate_tasks(cfg, tmp_path / "moved")
    assert 0 < results["tasks"]["sums"]["pass@1"] < 1
    found, text = compare(monkeypatch, done, tmp_path / "moved")
    assert found["moved"][2:5] == ["10", "+0.0 [-27.8, +27.8]", "1"]
    assert "sums: 10 are among both the 12 problems of w and the 11 of moved; the others are left out." in text


def test_other_sampling_settings_are_in_the_table(done, results, tmp_path, monkeypatch):
    hot = results["settings"] | {"temperature": 0.7, "max_new_tokens": 96, "weights": "0" * 64, "seed": 5}
    rows, _ = compare(monkeypatch, done, written(tmp_path / "hot", results, settings=hot))
    assert rows["hot"][5] == "max_new_tokens 48 / 96, temperature 0.0 / 0.7"
    prompted = results["settings"] | {"prompt": "f" * 64}
    rows, _ = compare(monkeypatch, done, written(tmp_path / "prompted", results, settings=prompted))
    assert rows["prompted"][5] == f"prompt {results['settings']['prompt'][:12]} / {'f' * 12}"


def test_how_answers_were_drawn_stands_beside_every_accuracy(done, results, tmp_path, monkeypatch):
    """In the table of a run, its figures and a comparison."""
    assert [drawn(*pair) for pair in ((0, 1), (1, 1), (0.6, 0.95))] == [
        "greedy",
        "sampled, T=1",
        "sampled, T=0.6, top-p 0.95",
    ]
    assert "| pass@1 [95 %], greedy |" in (done / "results.md").read_text()
    hot = results | {"settings": results["settings"] | {"temperature": 0.6, "top_p": 0.95}}
    said = []
    monkeypatch.setattr(tables, "_finish", lambda figure, axes, runs, path: said.append((axes, path.name)))
    _, text = compare(monkeypatch, done, written(tmp_path / "hot", hot))
    assert text.count("pass@1: w greedy, hot sampled, T=0.6, top-p 0.95. Against w.") == 1
    names = {label for axes, _ in said for axis in axes for label in axis.get_legend_handles_labels()[1]}
    assert names == {"w (greedy)", "hot (sampled, T=0.6, top-p 0.95)"}
    tables.plot_pass_at_1({"w": results}, tmp_path / "one.png")
    assert said[-1][0][0].get_ylabel() == "pass@1 (%)\ngreedy"


def test_copies_are_averaged_before_they_are_paired(done, results, tmp_path, monkeypatch):
    """One problem in eight rows, won in all of them, weighs as much as one that is lost."""
    base, other = (json.loads(json.dumps(results)) for _ in range(2))
    for run, won in ((base, 0), (other, 1)):
        run["tasks"]["sums"] |= {
            "content": ["a"] * 8 + ["b"],
            "correct": [[won]] * 8 + [[1 - won]],
            "ids": [*"012345678"],
        }
    folders = [written(tmp_path / name, run) for name, run in (("base", base), ("other", other))]
    rows, _ = compare(monkeypatch, *folders)
    assert rows["other"][2:5] == ["2", "+0.0 [-100.0, +100.0]", "1"]


def test_runs_that_share_nothing_or_cannot_be_read_are_refused(done, results, tmp_path, monkeypatch):
    alone = written(tmp_path / "alone", results, tasks={"others": results["tasks"]["sums"]})
    assert "no task in common" in refused(monkeypatch, done, alone)
    of = results["tasks"]["sums"] | {"content": [f"other {i}" for i in range(12)]}
    strange = written(tmp_path / "strange", results, tasks={"sums": of})
    assert "no problem of sums in common" in refused(monkeypatch, done, strange)
    assert "no such file" in refused(monkeypatch, done, tmp_path)
    old = refused(monkeypatch, done, written(tmp_path / "old", results, version=1))
    assert "old/results.json: version 1, this reads version 4; grade again: the same eval command" in old
    assert "version None" in refused(monkeypatch, done, written(tmp_path / "list", {}))
    without = {name: value for name, value in results["settings"].items() if name != "temperature"}
    half = refused(monkeypatch, done, written(tmp_path / "half", results, settings=without))
    assert "half/results.json: damaged (KeyError: 'temperature'); the same eval command grades again" in half


def test_tasks_that_only_one_run_has_are_named(done, results, tmp_path, monkeypatch):
    tasks = results["tasks"] | {"more": results["tasks"]["sums"]}
    _, text = compare(monkeypatch, done, written(tmp_path / "longer", results, tasks=tasks))
    assert "Not compared, as only one of w and longer has it: more." in text


def test_figures_of_runs_with_other_tasks_and_other_samples(done, results, tmp_path, monkeypatch):
    """Every run is in the legend, whether or not it is in the first panel; ticks are those of all runs."""
    four = json.loads(json.dumps(results))
    of = four["tasks"]["sums"]
    of |= {"samples": 4, "correct": [[1, 0, 1, 0]] * 12}
    for key in ("pass@k", "pass@k/low", "pass@k/high", "first@k"):
        of[key] = dict(zip("124", np.linspace(0.3, 0.6, 3).tolist(), strict=True))
    compare(monkeypatch, done, written(tmp_path / "four", four, tasks={"first": of, "sums": of}))
    assert (done.parent / "compared/pass_at_k.png").stat().st_size > 10_000
