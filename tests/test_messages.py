"""Places and messages: `~`, empty and unwritable folders, and one line for what a user got wrong."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

import cgrpo_jax
from cgrpo_jax import config
from cgrpo_jax.config import files as config_files
from cgrpo_jax.config import flags as command_line
from cgrpo_jax.config import names as option_names
from cgrpo_jax.errors import CheckpointError, ConfigError, RunError
from cgrpo_jax.run.checks import check
from cgrpo_jax.run.folders import model_folder, shape_folder
from cgrpo_jax.workdir import checkpoints, compilation, places

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_python(code, *arguments, cwd=None, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, capture_output=True, text=True, env=given, cwd=cwd, timeout=300)


def run_main(*arguments, cwd=None, **environment):
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-m", "cgrpo_jax.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=given, cwd=cwd, timeout=300)


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/4"])
def test_a_workdir_is_no_model_and_it_is_said_what_makes_one_of_it(tmp_path, place):
    run = tmp_path / "run"
    (run / "checkpoints/4").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    for look in (model_folder, shape_folder):
        with pytest.raises(CheckpointError) as error:
            look(str(run / place))
        assert f"cgrpo_jax.convert --from={run} --to=hf --out={run}_model writes one" in str(error.value)
    (run / "model.safetensors").touch()  # a folder of a model may hold any others
    assert model_folder(str(run)) == run


def test_home_in_every_path(tmp_path, monkeypatch):
    """data.source and eval.tasks: tests/test_files.py."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert model_folder("~/model") == tmp_path / "model"
    assert places.local_folder("~/runs/a", "--workdir") == tmp_path / "runs/a"
    assert places.local_folder("a", "--workdir") == pathlib.Path.cwd() / "a"  # wherever a function of the user goes
    (tmp_path / "own.py").write_text("from cgrpo_jax.config import default_config\nget_config = default_config\n")
    assert config_files.get_config("~/own.py").train.steps == 400
    monkeypatch.setenv("XDG_CACHE_HOME", "~/store")
    assert places.cache_root() == tmp_path / "store/cgrpo_jax"
    with pytest.raises(RunError, match=f"{tmp_path}/none/metrics.jsonl"):
        cgrpo_jax.load_run("~/none")


@pytest.mark.thorough
def test_home_in_the_flags_of_the_other_commands(tmp_path):
    """Each says which place it did not find."""
    (tmp_path / "a").mkdir()
    for command, words in (
        ("cgrpo_jax.convert --from=~/a --to=hf --out=~/b", f"{tmp_path}/a/config.json"),
        ("cgrpo_jax.eval_report ~/a", f"{tmp_path}/a"),
    ):
        given = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-m", *command.split()], capture_output=True, text=True, env=given, cwd=tmp_path
        )
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    ("workdir", "words"),
    [
        ("", "empty"), (" ", "empty"), ("~nobody_of_that_name/run", "no such home folder"), ("gs://bucket/run", "only a local folder"), ("s3://bucket/run", "only a local folder"),
        (pathlib.Path("gs://bucket/run"), "only a local folder"), ("hdfs://host/run", "only a local folder"),
    ],
)  # fmt: skip
def test_a_workdir_that_is_none_is_refused(workdir, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"workdir.*{words}"):
        cgrpo_jax.train(cgrpo_jax.get_config("quickstart"), workdir)
    with pytest.raises(ConfigError, match=f"workdir.*{words}"):
        cgrpo_jax.evaluate(cgrpo_jax.get_config("eval"), workdir)
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"--workdir = '.*/run' is a file; name a folder"):
        places.local_folder(tmp_path / "run", "--workdir")


def test_a_home_that_nobody_knows_is_no_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody_of_that_name/cache")
    assert places.cache_folder("programs") is None and "no such home folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_empty_cache_home_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", " "):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert places.cache_root() == tmp_path / ".cache/cgrpo_jax"


CACHELESS = """
import sys, warnings
import jax, jax.numpy as jnp
from cgrpo_jax.data.sources import load_problems
from cgrpo_jax.grading.verifier import Reading
from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.workdir import compilation
print(compilation.keep_on_disk(), compilation.keep_on_disk())
print(int(jax.jit(lambda x: x + 1)(jnp.int32(1))))
for _ in range(2):
    readable = lambda golds: [Reading(True, "ok")] * len(golds)
    print(load_problems(DataConfig(source=sys.argv[1]), 0, readable, lambda problem: 1).size)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("named", ["JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"])
def test_a_cache_that_cannot_be_written_costs_the_cache(tmp_path, named):
    """A file stands where the folder should be (root may write into any folder). It is said once."""
    (tmp_path / "file").write_text("")
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "1"}\n')
    folders = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "fine"), named: str(tmp_path / "file")}
    done = run_python(CACHELESS, tmp_path / "a.jsonl", **folders)
    assert done.returncode == 0 and done.stdout.split() == ["None", "None", "2", "1", "1"], done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and "cannot be written to" in done.stderr, done.stderr


FULL = """
import shutil, jax, jax.numpy as jnp
from cgrpo_jax.workdir import compilation
folder = compilation.keep_on_disk()
jax.jit(lambda x: x + 1)(jnp.int32(1))
shutil.rmtree(folder)
folder.write_text("")
for n in range(2, 5):
    jax.jit(lambda x: x * n)(jnp.int32(1))
print("done")
"""


def test_a_cache_that_is_lost_in_the_run_is_said_once(tmp_path):
    done = run_python(FULL, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
    assert done.stdout == "done\n" and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("compilation cache: Error writing persistent compilation cache entry")


def test_a_cache_that_is_not_wanted_is_not_looked_at(tmp_path):
    (tmp_path / "file").write_text("")
    folders = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file")}
    done = run_python("from cgrpo_jax.workdir import compilation; print(compilation.keep_on_disk())", **folders)
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_a_seed_has_32_bits():
    from conftest import tiny_config

    for seed, fine in ((2**32 - 1, True), (2**32, False), (2**40, False)):
        raw = config.default_config()
        raw.update_from_flattened_dict({"data.max_prompt_tokens": 64, "refine.max_prompt_tokens": 128, "seed": seed})
        raw.sampling.max_new_tokens = 64
        if fine:
            check(config.from_config_dict(raw), tiny_config())
            continue
        with pytest.raises(ConfigError, match=f"seed = {seed}: must be at most 4294967295"):
            check(config.from_config_dict(raw), tiny_config())


def test_the_largest_seed_works():
    import numpy as np

    from cgrpo_jax.sampling.draw import step_key

    assert step_key(np.uint32(2**32 - 1), np.int32(0)) is not None


HEAD = "from cgrpo_jax.config import default_config\n"
BROKEN = {
    "a name": (HEAD + "def get_config():\n    c = default_config()\n    return d\n", "line 4: NameError: name 'd'"),
    "a key": (
        HEAD + "def get_config():\n    c = default_config()\n    c.trian.steps = 3\n    return c\n",
        "line 4: AttributeError: ",
    ),
    "a type": (
        HEAD + "def get_config():\n    c = default_config()\n    c.train.steps = 'x'\n    return c\n",
        "line 4: TypeError: ",
    ),
    "a value": ("def get_config():\n    return int('x')\n", "line 2: ValueError: invalid literal"),
    "syntax": ("def get_config(:\n    pass\n", "line 1: SyntaxError: invalid syntax"),
    "an import": ("\nimport no_such_module\n", "line 2: ModuleNotFoundError: No module named 'no_such_module'"),
    "deeper": (
        "import json\ndef get_config():\n    return json.loads('{')\n",
        "line 3: JSONDecodeError: ",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_in_a_configuration_file_has_its_line(tmp_path, name):
    text, words = BROKEN[name]
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        config_files.get_config(tmp_path / "own.py")
    assert f"{tmp_path}/own.py, {words}" in str(error.value) and "\n" not in str(error.value)
    assert error.value.__cause__ is not None  # for --debug


@pytest.mark.thorough
def test_debug_shows_where_a_configuration_file_fails(tmp_path):
    (tmp_path / "own.py").write_text(BROKEN["a name"][0])
    for debug in (False, True):
        done = run_main(f"--config={tmp_path}/own.py", f"--workdir={tmp_path}/w", *["--debug"] * debug)
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")
        assert ("Traceback" in done.stderr) == debug and (debug or len(done.stderr.splitlines()) == 1), done.stderr


KEYS = {  # what is typed -> what is meant, or what is said where nothing is near
    "sed": "config.seed", "steps": "config.train.steps", "train.stepz": "config.train.steps", "trian.steps": "config.train.steps",
    "samling.top_p": "config.sampling.top_p", "evl.temperature": "config.eval.temperature", "data.source.x": "config.data.source",
    "mesh.dat": "config.mesh.data", "sampling.temp": "config.sampling.temperature", "temprature": "config.sampling.temperature",
    "learning_rate": "config.optimizer.learning_rate", "optimizer.lr": "config.optimizer.learning_rate",
    "train.lr": "config.optimizer.learning_rate", "beta": "config.objective.kl_coef", "temperature": "config.sampling.temperature",
    "num_generations": "config.train.samples", "max_completion_length": "config.sampling.max_new_tokens",
    "per_device_train_batch_size": "config.train.micro_batch", "eval.steps": "config.eval.every", "output_dir": "--workdir",
    "actor_rollout_ref.rollout.n": "config.train.samples", "actor_rollout_ref.rollout.val_kwargs.n": "config.eval.samples",
    "train_batch_size": "config.train.prompts or config.train.updates_per_rollout", "foo": None, "train.foo": None, "sampling.tmp": None,
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_an_unknown_key_names_what_is_near_and_nothing_else(key):
    command_line._PARSER.parsed = config.default_config()
    said = command_line._unknown_key(["main", "--config=quickstart", "--config.train.steps=3", f"--config.{key}=3"])
    if KEYS[key] is None:
        part = f"config.{key.partition('.')[0]}" if "." in key else "config"
        assert said.startswith(f"unknown key config.{key}; {part} holds ") and "did you mean" not in said
    else:
        assert said == f"unknown key config.{key}; did you mean {KEYS[key]}?"


def test_names_of_other_frameworks_lead_to_options_that_are_there():
    """Each of the table's names, with `config.` and as an option of the command."""
    known = config.keys()
    assert "train.steps" in known and "train" not in known
    assert {row.ours for row in option_names.TABLE} <= {*known, "--workdir"} and len(option_names.elsewhere()) > 120
    command_line._PARSER.parsed = config.default_config()
    for name, ours in option_names.elsewhere().items():
        if name not in known:
            said = command_line._unknown_key(["main", f"--config.{name}=3"])
            assert all(key in said.partition("; did you mean ")[2] for key in ours), said
        if name not in known and name not in flags.FLAGS:
            said = command_line._unknown_key(["main", f"--{name}=3"])
            assert said.startswith(f"unknown option --{name}; did you mean --"), said


VALUES = [
    ("config.seed=abc", "config.seed = 'abc': int is needed"), ("config.seed=", "config.seed = '': int is needed"),
    ("config.objective.clip_eps=x", "config.objective.clip_eps = 'x': float is needed"),
    ("config.objective.clip_responses=x", "config.objective.clip_responses = 'x': bool is needed"),
    ("config.train=3", "config.train holds accept_changes, "), ("debug=x", "flag --debug=x: no boolean"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), VALUES)
def test_a_value_that_cannot_be_read_is_named_with_its_type(given, words):
    command_line._PARSER.parsed = config.default_config()
    assert command_line._bad_value(flags.IllegalFlagValueError(f"flag --{given}: no boolean")).startswith(words)


def test_a_key_without_its_prefix():
    command_line._PARSER.parsed = config.default_config()
    said = command_line._unknown_key(["main", "--config=quickstart", "--train.steps=3"])
    assert said == "unknown option --train.steps; did you mean --config.train.steps?"
    assert command_line._unknown_key(["main", "--config=quickstart", "--workdri=3"]) is None


COMMANDS = [
    (("--config.foo=3",), "unknown key config.foo; config holds method, seed, model, "),
    (("--num_generations=8",), "unknown option --num_generations; did you mean --config.train.samples?"),
    (("--config.mesh.dat", "3"), "unknown key config.mesh.dat; did you mean config.mesh.data?"),
    (("--config.seed=1099511627776",), "seed = 1099511627776: must be at most"),
    (("--config.seed", "abc"), "config.seed = 'abc': int is needed"),
    (("--workdri=x",), "'workdri'. Did you mean: workdir"),
    (("steps=3",), "'steps=3' is no option"),
    (("--workdir=",), "--workdir is empty"),
    (("--workdir=gs://bucket/run",), "--workdir = 'gs://bucket/run'"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("arguments", "words"), COMMANDS)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, arguments, words):
    done = run_main("--config=quickstart", f"--workdir={tmp_path}/w", *arguments, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines
    assert not list(tmp_path.iterdir())


def test_configuration_and_workdir_are_both_needed(tmp_path):
    done = run_main("--config=quickstart", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "are both needed" in done.stderr, done.stderr


def ended(monkeypatch, command):
    """What a command of the package says as it ends."""
    name, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as error:
        importlib.import_module(f"cgrpo_jax.{name}").main()
    return str(error.value)


def test_the_other_commands_say_in_a_line_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command, words in (
        ("bench --mode=sample --model=package://quickstart --json=none/b.json", "--json=none/b.json: no such folder"),
        ("convert --from= --to=hf --out=b", "--from is empty"),
        ("convert --from=a --to=hf --out=gs://bucket/b", "only a local folder works"),
        ("eval_report a b --out=gs://bucket/b", "only a local folder works"),
    ):
        said = ended(monkeypatch, command)
        assert said.startswith("error: ") and words in said and "\n" not in said
    assert not list(tmp_path.iterdir())


DAMAGED = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import SingleDeviceSharding
from cgrpo_jax.learning.update import TrainState
from cgrpo_jax.config.options import CheckpointConfig
from cgrpo_jax.workdir.checkpoints import Checkpointer, restore_params
rng, folder = np.random.default_rng(0), pathlib.Path(sys.argv[1])
params = {f"a{i}": jnp.asarray(rng.normal(size=(100, 100))) for i in range(60)}
state = TrainState(params, {"m": jnp.ones((64, 64))})
place = SingleDeviceSharding(jax.devices()[0])
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state._asdict())
with Checkpointer(folder, CheckpointConfig(), print) as checkpointer:
    checkpointer.save(1, state, {})
for path in (folder / "checkpoints/1/params").rglob("d/*"):
    content = bytearray(path.read_bytes())
    content[100::997] = bytes(byte ^ 4 for byte in content[100::997])
    path.write_bytes(content)
for _ in range(3):
    try:
        with Checkpointer(folder, CheckpointConfig(), print) as checkpointer:
            checkpointer.restore(1, **abstract)
    except ValueError as error:
        print("restore:", error)
    try:
        restore_params(folder / "checkpoints/1", lambda path, shape: place)
    except ValueError as error:
        print("restore_params:", error)
"""


def test_damage_in_a_checkpoint_is_one_line(tmp_path):
    """In each of 60 arrays at once: nothing is printed but what is raised, and that names one of them."""
    done = run_python(DAMAGED, tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr[:2000]
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and all("checkpoints/1" in line and "cannot be read (" in line for line in lines), lines
    assert all(len(line) < 500 and "TensorStore" not in line and '"a' in line for line in lines), lines


def test_the_details_of_tensorstore_are_cut_off():
    """However many specifications stand behind the message, and in whatever order."""
    for details in ("[tensorstore_spec='{}'] [tensorstore_spec[1]='{}']", "[tensorstore_spec[1]='{}'] [x='{}']"):
        assert checkpoints._one_line(ValueError(f"NOT_FOUND: no metadata {details}")) == "NOT_FOUND: no metadata"


WITHOUT_TORCH = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
import cgrpo_jax.text.tokenizer
import transformers
assert not transformers.utils.is_torch_available()
"""


@pytest.mark.thorough
def test_nothing_is_said_of_pytorch():
    done = run_python(WITHOUT_TORCH)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    advice = {
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "",
        "TRANSFORMERS_VERBOSITY": "warning",
    }  # what a user asks for counts
    assert "PyTorch was not found" in run_python(WITHOUT_TORCH, **advice).stderr


def test_a_checkpoint_error_is_one_line():
    """Of a folder that is none."""
    with pytest.raises(CheckpointError, match="no such folder"):
        model_folder("~/no/such/folder")
    for nothing in ("", " "):  # not the folder that one stands in
        with pytest.raises(CheckpointError, match="no such folder"):
            model_folder(nothing)
    assert compilation.watch() is compilation.watch()
