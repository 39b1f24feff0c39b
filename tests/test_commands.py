"""The commands of the README and of the page on configurations are run, in their order, in one folder, at small sizes.

What installs is run by continuous integration (`.ci/run`, from the README's own line) and by tests/test_packaging.py; the
pages of launch_tpu and notebooks are run by their own tests. tests/test_readme.py parses what stands inside of sentences.
"""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import QUICKSTART
from test_served import GOOD, serve  # noqa: F401  a fixture

ROOT = pathlib.Path(__file__).parent.parent
SUMS = [(23, 46), (58, 37), (105, 88), (7, 9)]
SIZES = {
    "train.steps": 1, "train.prompts": 2, "train.micro_batch": 1, "checkpoint.every": 1,
    "data.max_prompt_tokens": 300, "refine.max_prompt_tokens": 448, "sampling.max_new_tokens": 64,
    "refine.critique_tokens": 16, "eval.every": 0, "eval.problems": 2, "sampler.kv_cache_mb": 8.0, "verifier.workers": 1,
}  # fmt: skip
IN_SMALL = {  # program -> what stands behind its own arguments
    "main": [f"--config.{key}={value}" for key, value in SIZES.items()],
    "plan": ["--only=sums,empty_slots", "--most=false"],
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page):
    """The lines of a page's shell blocks as words, joined where they are broken, without what installs."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    parts = [part.split(" #")[0].strip() for line in lines for part in line.split("&&")]
    installs = ("python3 -m venv", ". .venv", "pip install")
    return [shlex.split(part) for part in parts if part and part != "pytest" and not part.startswith(installs)]


@pytest.fixture
def folder(tmp_path):
    """What a reader would have: the checkout's configurations, data of their own, a checkpoint."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    rows = [{"question": f"What is {a}+{b}?", "answer": f"#### {a + b}"} for a, b in SUMS]
    (tmp_path / "gsm8k").mkdir()
    for name in ("train.jsonl", "gsm8k/test.jsonl", "tasks.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(QUICKSTART, tmp_path / "CHECKPOINT")
    return tmp_path


def run(words, folder):
    """One command of a page, ended by what makes it small. Its output, or a failure that shows it."""
    words, environment = list(words), {}
    while "=" in words[0] and not words[0].startswith("-"):
        name, value = words.pop(0).split("=", 1)
        environment[name] = value
    assert words[:2] == ["python", "-m"], words
    program = words[2].removeprefix("cgrpo_jax.")
    command = [sys.executable, *words[1:], *IN_SMALL.get(program, [])]
    given = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | environment
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=given, timeout=600)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.thorough
def test_the_readme(folder):
    """To a trained, exported, reported and evaluated model."""
    local = "--config.eval.tasks=one=tasks.jsonl,two=gsm8k/test.jsonl"  # there is no hub here
    for words in commands("README.md"):
        if words[2] == "cgrpo_jax.plan":  # needs more than the README's line installs: the next test
            continue
        if words[2] == "cgrpo_jax.eval_report":
            for name in ("runs/eval_before", "runs/eval_after"):
                shutil.copytree(folder / "runs/eval", folder / name)
        run([*words, local] if "configs/eval.py" in " ".join(words) else words, folder)
    steps = {path.parent.name: path.read_text().count("\n") for path in folder.glob("runs/*/metrics.jsonl")}
    assert steps == {"quickstart": 1, "smollm2": 1, "gsm8k": 1}
    assert {path.parent.name for path in folder.glob("runs/*/model.safetensors")} == {"smollm2_model", "smollm2_card"}
    assert "license: apache-2.0" in (folder / "runs/smollm2_card/README.md").read_text()
    for made in ("compared.html", "eval/results.md", "pass_at_k/pass_at_k.png", "compared/compared.md"):
        assert (folder / "runs" / made).is_file(), made


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_plan_of_the_readme(folder):
    (words,) = [words for words in commands("README.md") if words[2] == "cgrpo_jax.plan"]
    assert "fits: " in run(words, folder)


@pytest.mark.thorough
def test_python_of_the_readme(folder):
    (code,) = blocks("README.md", "python")
    small = "\n".join(f"config.{key} = {value!r}" for key, value in SIZES.items())
    assert "config.train.steps = 12\n" in code
    code = code.replace("config.train.steps = 12\n", small + "\n")
    code += "\nprint(len(tables.metrics), len(tables.rollouts))"
    (folder / "code_of_the_page.py").write_text(code)
    said = run(["python", "-m", "code_of_the_page"], folder)
    # two problems of 7 responses, with 7 refinements where none was right
    assert re.search("^1 (14|21|28)$", said, re.MULTILINE)


@pytest.mark.thorough
def test_the_page_on_configurations(folder, serve):  # noqa: F811
    server, api = serve(GOOD)
    for words in commands("configs/README.md"):
        run([word.replace("http://127.0.0.1:8000/v1", api.base_url) for word in words], folder)
    assert server.asked and (folder / "runs/raft_rows/rows.jsonl").read_text()
    trained = {path.parent.name for path in folder.glob("runs/*/metrics.jsonl") if '"loss/total"' in path.read_text()}
    assert trained == {"api", "local", "weak", "raft"}
