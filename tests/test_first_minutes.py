"""What somebody sees first: which command to give, help, what a run says as it starts, and errors."""

import json
import re
import sys
import types

import huggingface_hub
import pytest
from test_messages import run_main, run_python
from test_train import small

import cgrpo_jax
from cgrpo_jax import main
from cgrpo_jax.config import files as config_files
from cgrpo_jax.config import flags as command_line
from cgrpo_jax.config import from_config_dict
from cgrpo_jax.config.options import VerifierConfig
from cgrpo_jax.errors import ConfigError
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.main import unforeseen
from cgrpo_jax.process import stopping
from cgrpo_jax.process.user import UserProcess
from cgrpo_jax.run import beginning, build, opening, resuming
from cgrpo_jax.workdir.changes import check_changes


def test_the_package_names_the_likeliest_commands(tmp_path, monkeypatch):
    """So does main without arguments; their configurations are there."""
    start = "import runpy, sys; sys.argv = ['cgrpo_jax', *sys.argv[1:]]; runpy.run_module('cgrpo_jax', run_name='__main__'); print('jax' in sys.modules)"
    done = run_python(start, cwd=tmp_path)
    assert done.stdout == f"{command_line.COMMANDS}\nFalse\n" and done.returncode == 0, done.stderr
    named = re.findall(r"--config=(\S+)", command_line.COMMANDS)
    assert len(named) == 2 and set(named) <= set(config_files.names())
    done = run_python(start, "--config=quickstart", cwd=tmp_path)
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: '--config=quickstart'")
        and "cgrpo_jax.main" in done.stderr
    )
    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(SystemExit) as end:
        main.main(["main"])
    assert end.value.code == f"error: --config and --workdir are both needed\n{command_line.COMMANDS}"
    assert not list(tmp_path.iterdir())


def test_help_reads_like_help(tmp_path):
    """The docstring, then each option of the command once, with what it takes; nothing of absl, on a page."""
    done = run_main("--config=quickstart", "--help", cwd=tmp_path)
    head, _, options = done.stdout.partition("\nOptions:\n")
    assert done.returncode == 0 and head.startswith("Trains as a configuration file says") and not done.stderr
    named = re.findall(r"^  (--\S+)", options, re.MULTILINE)
    assert named == [
        "--config.KEY=VALUE",
        "--config=CONFIG",
        "--debug",
        "--hosts=HOSTS",
        "--preflight",
        "--workdir=WORKDIR",
    ]
    assert all(name in options for name in config_files.names())
    assert done.stdout.count("\n") < 30 and max(map(len, done.stdout.splitlines())) <= 120
    assert "flags:" not in done.stdout and "main.py" not in done.stdout and "None" not in done.stdout


@pytest.mark.parametrize("offline", [True, False])
def test_a_run_says_where_it_works(monkeypatch, offline):
    """Versions, devices, memory, caches, hub, in four lines; never what a token is."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    said = beginning.lines(build.open_run(small()))
    assert len(said) == 4 and "hf_secret" not in "".join(said)
    assert re.search(
        r"^Python 3\.\d+\.\d+  jax \S+  flax \S+  transformers \S+  on 1 x cpu \(cpu\), \d+\.\d GiB of the host$",
        said[0],
    )
    assert "quickstart" in said[1] and said[1].endswith("computed in float32")
    assert said[2] == "a response ends at '<|im_end|>'"
    assert (
        said[3].endswith("hub is not asked (HF_HUB_OFFLINE)" if offline else "with a token") and "caches /" in said[3]
    )


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A reader's folder: questions under names of their own, and a reward that fails on them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"frage": f"What is {n}+1?", "antwort": str(n + 1)} for n in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own_rewards_of_mine.py").write_text("def fails(completions, **columns):\n    return 1 / 0\n")
    return tmp_path


def opened(raw, log=print):
    cfg = from_config_dict(raw)
    run = opening.open_run(cfg)
    with Verifier(VerifierConfig(workers=1)) as verifier, UserProcess() as process:
        return opening.open_all(cfg, run.policy.tokenizer, verifier, process, log)


def test_all_that_is_wrong_is_said_at_once_with_what_mends_it(files):
    """Each round pastes what the message says; three rounds find what is wrong on as many levels."""
    raw = cgrpo_jax.get_config("quickstart")
    wrong = {"data.source": "min.jsonl", "refine.k": 9, "train.steps": 0, "reward.fn": "no_such_module:f"}
    raw.update_from_flattened_dict(wrong)
    counts = []
    for _ in range(4):
        try:
            opening_of = opened(raw)
            break
        except ValueError as error:
            said = str(error)
        pasted = dict(re.findall(r"--config\.([\w.]+)=([^\s()]*)", said))
        counts.append(len(pasted))
        for key, value in pasted.items():
            raw.update_from_flattened_dict({key: type(raw[key.split(".")[0]][key.split(".")[1]])(value)})
        if len(counts) == 1:
            assert said.startswith("3 things keep this run from starting:\n1. the configuration cannot be run:\n")
            assert all(f"\n{number}. " in said for number in (2, 3)) and "min.jsonl: no such file" in said
            raw.reward.fn = "own_rewards_of_mine:fails"
    assert counts == [4, 2, 1]
    assert opening_of.loaded[0].size == 18 and len(opening_of.loaded[1]["eval"]) == 2


@pytest.mark.parametrize("method", ["quickstart", "quickstart:sft"])
def test_a_file_is_enough(files, method):
    """Its questions are split, which is said; a run that splits otherwise is not resumed."""
    rows = [
        {"question": f"What is {n % 15}+1?", "answer": str(n % 15 + 1), "target": f"\\boxed{{{n % 15 + 1}}}"}
        for n in range(20)
    ]
    (files / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw, said = cgrpo_jax.get_config(method), []
    raw.data.source = "mine.jsonl"
    problems, evaluations, _ = opened(raw, said.append).loaded
    trained = {problems.get(index).question for index in range(problems.size)}
    held = {problem.question for problem in evaluations["eval"]}
    assert len(held) == 1 and len(trained) == 14 and not held & trained
    assert any("1 of its 15 questions are held out for evaluation" in line for line in said)
    whole = resuming.contents_of(build.open_run(from_config_dict(raw)))
    raw.eval.every = 0
    other = resuming.contents_of(build.open_run(from_config_dict(raw)))
    with pytest.raises(ConfigError, match=r"data\.held_out = None .*: eval\.every, eval\.source or eval\.tasks decide"):
        check_changes(whole, other, "", 1, print)


def broken(cfg, workdir, hosts):
    workdir.mkdir()
    raise RuntimeError("something\nhas broken")


def given(monkeypatch, workdir, debug):
    """The command line of a run that breaks."""
    monkeypatch.setattr(sys, "argv", ["main", "--config=quickstart"])  # a worker of pytest has none
    monkeypatch.setattr(main, "train", broken)
    values = {"CONFIG": cgrpo_jax.get_config("quickstart"), "DEBUG": debug}
    for name, value in values.items():
        monkeypatch.setattr(main.command_line, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(main, "_WORKDIR", types.SimpleNamespace(value=str(workdir)))
    monkeypatch.setattr(main, "_PREFLIGHT", types.SimpleNamespace(value=False))
    monkeypatch.setattr(main, "_HOSTS", types.SimpleNamespace(value=""))


def test_an_error_that_nobody_foresaw_is_one_line(tmp_path, monkeypatch):
    """With its place; the traceback is in the workdir, or shown under --debug."""
    given(monkeypatch, tmp_path / "w", debug=False)
    with pytest.raises(SystemExit) as end:
        main.main(["main"])
    line = str(end.value)
    assert "\n" not in line and line.startswith("error: RuntimeError: something has broken (main.py, line ")
    assert line.endswith(f"the traceback is in {tmp_path}/w/traceback.txt")
    kept = (tmp_path / "w/traceback.txt").read_text()
    assert kept.startswith("Traceback") and "in broken" in kept and "RuntimeError: something\nhas broken" in kept
    given(monkeypatch, tmp_path / "v", debug=True)
    with pytest.raises(RuntimeError, match="has broken"):
        main.main(["main"])
    assert not list((tmp_path / "v").iterdir())


def test_a_full_disk_has_its_mend(tmp_path, monkeypatch):
    given(monkeypatch, tmp_path / "w", debug=False)

    def full(*_):
        raise OSError(28, "No space left on device", "/a/metrics.jsonl")

    monkeypatch.setattr(main, "train", full)
    with pytest.raises(SystemExit, match=r"'/a/metrics.jsonl'; make room on that disk, and the same command goes on"):
        main.main(["main"])


def test_a_run_that_was_stopped_says_what_it_left(tmp_path, monkeypatch, capsys):
    """In its own words, and with the code of its signal."""
    given(monkeypatch, tmp_path / "w", debug=False)

    def stopped(*_):
        raise stopping.Stopped("stopped after step 7, which is saved")

    monkeypatch.setattr(main, "train", stopped)
    with pytest.raises(SystemExit) as end:
        main.main(["main"])
    assert end.value.code == 130 and capsys.readouterr().err == "stopped after step 7, which is saved\n"


def raised(error, workdir):
    try:
        raise error
    except Exception as caught:
        return unforeseen(caught, workdir)


def test_want_of_memory_has_its_mend(tmp_path):
    said = raised(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes"), "")
    assert "lower sampler.kv_cache_mb or train.micro_batch" in said and said.endswith("--debug shows the traceback")
    assert "memory" in raised(MemoryError("no memory"), str(tmp_path / "none"))
