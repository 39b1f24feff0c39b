"""The calls of the package: what they return, what they refuse, what they load."""

import base64
import json
import os
import pathlib
import pkgutil
import subprocess
import sys
import types

import jax
import pytest

import cgrpo_jax
from cgrpo_jax.api import Graded
from cgrpo_jax.config import files as config_files
from cgrpo_jax.config import from_config_dict
from cgrpo_jax.errors import CheckpointError, ConfigError, DataError, HubError, RunError
from cgrpo_jax.workdir.reading import ROLLOUT_COLUMNS

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = ("jax", "flax", "transformers", "pandas", "datasets", "torch")


def small(name="quickstart", **changes):
    """Two problems, three responses, two steps, evaluated at the end."""
    config = cgrpo_jax.get_config(name)
    config.sampler.kv_cache_mb = 8.0
    config.train.steps, config.train.prompts, config.train.samples, config.train.micro_batch = 2, 2, 3, 1
    config.checkpoint.every, config.verifier.workers = 1, 1
    config.eval.every, config.eval.problems, config.eval.samples = 2, 8, 2
    config.update_from_flattened_dict(changes)
    return config


def small_sft():
    return small("quickstart_sft", **{"eval.every": 0, "train.samples": 1, "model.random_init": False})


def small_rows():
    return small("quickstart:raft", **{"train.steps": 1})


def small_eval(folder):
    """Four sums for the embedded model."""
    rows = [{"question": f"What is {a}+{b}?", "answer": a + b} for a in (23, 46) for b in (16, 246)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = cgrpo_jax.get_config("eval")
    config.model.path, config.eval.tasks = "package://quickstart", f"sums={folder}/sums.jsonl"
    config.data.max_prompt_tokens, config.sampling.max_new_tokens, config.refine.max_prompt_tokens = 64, 48, 128
    return config


def python(code, cwd):
    """Runs code in another process; what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, and what `train` returned of it."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    with jax.numpy_rank_promotion("allow"):  # Orbax, optax: not ours to judge
        metrics = cgrpo_jax.train(small(), str(workdir))
    return workdir, metrics


LOADS_LITTLE = [
    "import cgrpo_jax; assert 'train' in dir(cgrpo_jax)",
    "import cgrpo_jax; cgrpo_jax.get_config('quickstart:dr_grpo')",
    "import cgrpo_jax; cgrpo_jax.grade(['1/2'], ['so it is $\\\\frac{1}{2}$'])",
    f"import cgrpo_jax; cgrpo_jax.get_config({str(ROOT / 'configs/eval.py')!r})",
]


@pytest.mark.parametrize("code", LOADS_LITTLE)
def test_what_computes_nothing_loads_nothing_heavy(tmp_path, code):
    said = python(f"{code}; import sys; print([name for name in {HEAVY} if name in sys.modules])", tmp_path)
    assert said == "[]\n"


def test_no_module_has_the_name_of_a_call():
    """`import cgrpo_jax.NAME` would put the module in the place of the function."""
    modules = {module.name for module in pkgutil.iter_modules(cgrpo_jax.__path__)} | {"configs"}
    assert not modules & set(cgrpo_jax.__all__)
    assert set(cgrpo_jax.__all__) <= set(dir(cgrpo_jax))
    with pytest.raises(AttributeError, match="module 'cgrpo_jax' has no attribute 'trian'"):
        cgrpo_jax.trian  # noqa: B018


@pytest.mark.thorough
@pytest.mark.parametrize("first", ["import cgrpo_jax", "import cgrpo_jax.main, cgrpo_jax.api, cgrpo_jax.bench"])
def test_every_call_twice(trained, tmp_path, first):
    """In a process of its own; the runs are finished ones, so that little is computed."""
    small_eval(tmp_path)
    calls = {
        "get_config": "cgrpo_jax.get_config('quickstart').train.steps",
        "grade": "cgrpo_jax.grade(['2'], ['2'])",
        "load_run": f"len(cgrpo_jax.load_run({str(trained[0])!r}).metrics)",
        "train": f"cgrpo_jax.train(small(), {str(trained[0])!r})['step']",
        "evaluate": f"cgrpo_jax.evaluate(small_eval(here), {str(trained[0].parent / 'eval')!r})['version']",
        "Curves": "cgrpo_jax.Curves().figure()",
        "make_plan": "type(cgrpo_jax.make_plan)",
        "export": "type(cgrpo_jax.export)",
        "push": "type(cgrpo_jax.push)",
        "write_report": f"cgrpo_jax.write_report([{str(trained[0])!r}], here / 'report.html').stat().st_size > 1e5",
        "generate": f"cgrpo_jax.generate(small_rows(), {str(trained[0].parent / 'rows')!r}).name",
    }
    assert sorted(calls) == sorted(cgrpo_jax.__all__)
    code = f"import sys, pathlib; sys.path.insert(0, {str(ROOT / 'tests')!r}); here = pathlib.Path('.').resolve()\n"
    code += f"{first}\nfrom test_api import small, small_eval, small_rows\n"
    code += "".join(f"print({call})\n" * 2 for call in calls.values())
    said = python(code, tmp_path).splitlines()
    graded = "[Graded(correct=True, answer='2', status='ok')]"
    function = "<class 'function'>"  # run by a test of their own
    assert said == [
        value
        for value in ("50", graded, "3", "2", "4", "None", function, function, function, "True", "rows.jsonl")
        for _ in range(2)
    ]


def test_configurations_by_name_and_by_path(monkeypatch, tmp_path):
    by_path = cgrpo_jax.get_config(ROOT / "configs/quickstart.py")
    monkeypatch.chdir(tmp_path)
    assert cgrpo_jax.get_config("quickstart") == by_path
    assert cgrpo_jax.get_config(f"{ROOT}/configs/quickstart.py:dr_grpo") == cgrpo_jax.get_config("quickstart:dr_grpo")
    assert cgrpo_jax.get_config("quickstart:dr_grpo").refine.trigger == "never" != by_path.refine.trigger
    (tmp_path / "own.py").write_text((ROOT / "configs/quickstart.py").read_text().replace("steps = 50", "steps = 7"))
    assert cgrpo_jax.get_config("own.py").train.steps == 7
    assert config_files.names() == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    for name in config_files.names():
        from_config_dict(cgrpo_jax.get_config(name))


REFUSED = [
    (
        "quickstrat",
        r"no configuration 'quickstrat'; known: eval, paper, quickstart, .*; or give the path of a .py file",
    ),
    ("quickstart:drgrpo", "quickstart:drgrpo: unknown method 'drgrpo'; did you mean 'dr_grpo'"),
    ("eval:best", "eval:best: decoding 'best': greedy or pass_at_k"),
    ("quickstart_sft:long", "quickstart_sft:long: get_config of .*quickstart_sft.py: too many"),
    ("nowhere/quickstart.py", "nowhere/quickstart.py: no such configuration file"),
    ("empty.py", "empty.py: defines no function get_config"),
    ("odd.py", "odd.py: get_config returned dict"),
]


@pytest.mark.parametrize(("name", "words"), REFUSED)
def test_configurations_that_are_not_there(monkeypatch, tmp_path, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "odd.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match=words) as error:
        cgrpo_jax.get_config(name)
    assert "\n" not in str(error.value)


MAIN = [
    (("--config=quickstrat",), "error: no configuration 'quickstrat'; known: eval, paper, quickstart, quickstart_sft"),
    (("--config=quickstart:dr_grpo", "--config.mesh.data=3"), "error: mesh.data = 3"),
    (("--config", "quickstart", "--config.mesh.data=3"), "error: mesh.data = 3"),
    ((f"--config={ROOT}/configs/quickstart.py:dr_grpo", "--config.mesh.data=3"), "error: mesh.data = 3"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("arguments", "words"), MAIN)
def test_the_command_takes_names_from_any_folder(tmp_path, arguments, words):
    """One line of error each; the last ones have read the configuration and the embedded model."""
    command = [sys.executable, "-m", "cgrpo_jax.main", "--workdir=w", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(words), done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


def test_training_returns_the_last_metrics(trained):
    workdir, metrics = trained
    rows = lines(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert metrics == rows[3] | rows[2]
    assert metrics["step"] == 2 and 0 <= metrics["eval/pass@1"] <= 1 and metrics["policy/grad_norm"] > 0
    with jax.numpy_rank_promotion("allow"):  # a finished run, and a `Config` instead of a `ConfigDict`
        assert cgrpo_jax.train(from_config_dict(small()), workdir) == metrics


@pytest.mark.thorough
def test_supervised_training_returns_the_last_metrics(tmp_path):
    with jax.numpy_rank_promotion("allow"):
        metrics = cgrpo_jax.train(small_sft(), tmp_path / "w")
    assert metrics == lines(tmp_path / "w/metrics.jsonl")[-1] and metrics["step"] == 2
    tables = cgrpo_jax.load_run(tmp_path / "w")
    assert list(tables.metrics["step"]) == [1, 2]
    assert len(tables.rollouts) == 0 and tuple(tables.rollouts.columns) == ROLLOUT_COLUMNS


def test_each_row_of_metrics_is_told_when_it_is_there(tmp_path):
    told = []

    def listen(row):
        told.append(row)
        assert lines(tmp_path / "w/metrics.jsonl")[-1] == row

    with jax.numpy_rank_promotion("allow"):
        cgrpo_jax.train(small(**{"train.steps": 1, "eval.every": 1}), tmp_path / "w", on_step=listen)
    assert [row["step"] for row in told] == [0, 1, 1] and told == lines(tmp_path / "w/metrics.jsonl")


def test_curves_of_what_was_measured():
    curves = cgrpo_jax.Curves(("reward/responses", "eval/pass@1", "refine/success"))
    assert curves.figure() is None
    for row in ({"step": 0, "eval/pass@1": 0.25}, {"step": 1, "reward/responses": 0.5, "eval/pass@1": None}):
        curves(row)  # no notebook: nothing is shown
    curves({"step": 2, "reward/responses": 0.75})
    axes = curves.figure().axes
    assert [one.get_title() for one in axes] == ["reward/responses", "eval/pass@1"]
    assert axes[0].lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.75]]


def test_a_notebook_is_shown_a_png_in_one_place(monkeypatch):
    """Not a Figure, which is text where %matplotlib was never said; each row is drawn over the last."""
    IPython = pytest.importorskip("IPython", reason="IPython is not installed")
    shown, updated = [], []
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    place = types.SimpleNamespace(update=updated.append)
    monkeypatch.setattr(IPython.display, "display", lambda picture, display_id: (shown.append(picture), place)[1])
    curves = cgrpo_jax.Curves()
    for step in (1, 2):
        curves({"step": step, "reward/responses": 0.5})
    assert [len(shown), len(updated)] == [1, 1]
    for picture in shown + updated:
        data, _ = IPython.core.formatters.DisplayFormatter().format(picture)
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")


def test_a_plan_and_an_export(trained, tmp_path):
    plan = cgrpo_jax.make_plan(small(), "local", only=["update", "decode"])
    assert plan["fits"] and plan["programs"].keys() == {"update", "decode"} and "fits: " in plan["text"]
    folder = cgrpo_jax.export(trained[0], tmp_path / "hf")
    assert (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
    with pytest.raises(CheckpointError, match="exists"):
        cgrpo_jax.export(trained[0], tmp_path / "hf")


def test_what_would_be_pushed(trained, tmp_path, capsys):
    folder = cgrpo_jax.push(trained[0], tmp_path / "shared", "me/mine", license="mit", dry_run=True)
    assert "nothing was sent" in capsys.readouterr().out and (folder / "model.safetensors").is_file()
    assert "license: mit" in (folder / "README.md").read_text()
    with pytest.raises(HubError, match="OWNER/REPO"):
        cgrpo_jax.push(trained[0], tmp_path / "other", "mine", dry_run=True)
    assert not (tmp_path / "other").exists()


def test_evaluation_returns_the_results(tmp_path):
    results = cgrpo_jax.evaluate(small_eval(tmp_path), tmp_path / "w")
    assert results == json.loads((tmp_path / "w/results.json").read_text())
    assert results["tasks"]["sums"]["problems"] == 4 and 0 <= results["tasks"]["sums"]["pass@1"] <= 1


def test_the_projects_own_errors_come_out(tmp_path):
    for call, config, error, words in (
        (cgrpo_jax.train, small_eval(tmp_path), ConfigError, "method = 'eval'; here: rl, sft; cgrpo_jax.evaluate runs"),
        (cgrpo_jax.evaluate, small(), ConfigError, "method = 'rl'; here: eval; cgrpo_jax.train runs it"),
        (cgrpo_jax.train, small(method="lr"), ConfigError, "method = 'lr'; here: rl, sft$"),
        (cgrpo_jax.train, "quickstart", ConfigError, "config is of type str; get_config"),
        (cgrpo_jax.train, small().to_dict() | {"sead": 1}, ConfigError, r"config\.sead; did you mean config\.seed\?"),
        (cgrpo_jax.train, small(**{"data.source": "reasoning_gym:none", "eval.every": 0}), DataError, "not on the"),
    ):
        with pytest.raises(error, match=words):
            call(config, tmp_path / "w")
    assert not (tmp_path / "w/metrics.jsonl").exists()
    with pytest.raises(RunError, match=r"w/metrics.jsonl: no such file; give the workdir of a run"):
        cgrpo_jax.load_run(tmp_path / "w")


def test_grading():
    golds = ["1/2", "7", "12", "3"]
    texts = ["so it is \\boxed{\\frac{1}{2}}.", "The answer is 8.", "I do not know", "first 4, then 3"]
    assert cgrpo_jax.grade(golds, texts) == [
        Graded(True, "\\frac{1}{2}", "ok"), Graded(False, "8", "ok"), Graded(False, None, "ok"), Graded(True, "3", "ok"),
    ]  # fmt: skip
    assert cgrpo_jax.grade([], []) == []


@pytest.mark.parametrize(
    ("golds", "texts", "words"),
    [
        (["1", "2"], ["1"], "2 golds for 1 texts"),
        ("12", ["1", "2"], "golds: a list of strings"),
        (["1"], [1], "texts: a list of strings"),
    ],
)
def test_grading_refuses_what_does_not_pair(golds, texts, words):
    with pytest.raises(ValueError, match=words):
        cgrpo_jax.grade(golds, texts)


def test_a_run_as_tables(trained):
    """Every number and every attempt of the files, each once."""
    workdir, final = trained
    metrics, rollouts = cgrpo_jax.load_run(str(workdir))
    assert list(metrics["step"]) == [0, 1, 2]
    last = metrics.iloc[-1].dropna().to_dict()
    assert last == {name: value for name, value in final.items() if value is not None}
    assert metrics["eval/pass@1"].isna().tolist() == [False, True, False]
    assert tuple(rollouts.columns) == ROLLOUT_COLUMNS
    attempts = 0
    for step in (1, 2):
        for problem, group in enumerate(lines(workdir / f"rollouts/{step:06d}.jsonl")):
            own = rollouts[(rollouts["step"] == step) & (rollouts["problem"] == problem)]
            assert set(own["question"]) == {group["question"]} and set(own["gold"]) == {group["answer"]}
            responses, refinements = (own[own["kind"] == kind] for kind in ("response", "refinement"))
            for table, records, trained_on in (
                (responses, group["responses"], group["kept"]),
                (refinements, group["refinements"], group["selected"]),
            ):
                assert table["attempt"].tolist() == list(range(len(records)))
                assert table["text"].tolist() == [record["text"] for record in records]
                assert table["reward"].tolist() == [record["reward"] for record in records]
                assert table["attempt"][table["trained"]].tolist() == sorted(trained_on)
            assert refinements["source"].tolist() == [record["source"] for record in group["refinements"]]
            assert responses["source"].isna().all()
            assert responses["critique"].dropna().tolist() == [
                record["critique"] for record in group["responses"] if "critique" in record
            ]
            attempts += len(own)
    assert attempts == len(rollouts) >= 12 and (rollouts["kind"] == "refinement").any()


def test_tables_of_a_killed_run(trained, tmp_path):
    """A last line that was cut short is no row."""
    (tmp_path / "metrics.jsonl").write_text((trained[0] / "metrics.jsonl").read_text() + '{"step": 3, "loss/tot')
    assert list(cgrpo_jax.load_run(tmp_path).metrics["step"]) == [0, 1, 2]
