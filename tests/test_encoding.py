"""Text files are UTF-8 in any locale: nothing leaves the encoding to it."""

import ast
import os
import pathlib
import subprocess
import sys

import cgrpo_jax

ROOT = pathlib.Path(cgrpo_jax.__file__).parent


def calls_without_encoding(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [value.value for value in node.args if isinstance(value, ast.Constant)]
        text = name in ("read_text", "write_text") or (name == "open" and not any("b" in str(mode) for mode in modes))
        text &= ast.unparse(node.func) != "tarfile.open"  # of bytes
        if text and "encoding" not in {keyword.arg for keyword in node.keywords}:
            yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_text_file_is_opened_as_utf8():
    kernel = [f"grading/worker.py:{line}" for line in range(1000)]  # the null device
    found = [place for path in ROOT.rglob("*.py") for place in calls_without_encoding(path)]
    assert not [place for place in found if not place.endswith(tuple(kernel))]


WRITES = """
import pathlib, sys
from cgrpo_jax.errors import DataError
from cgrpo_jax.workdir.progress import Progress
from cgrpo_jax.data.sources import load_problems
from cgrpo_jax.config.options import DataConfig
with Progress(0, 2) as progress:
    progress.log("row 3: Wi\\u00e9 \\u221e")
try:
    load_problems(DataConfig(source=sys.argv[1]), 0, None, lambda problem: 1, progress.log)
except DataError as error:
    sys.exit(f"error: {error}")
"""


def test_messages_are_shown_in_any_locale(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"frage": "x", "l\\u00f6sung": "1"}', encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", WRITES, str(tmp_path / "a.jsonl")]
    done = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "missing; there: frage" in done.stderr, (
        done.stderr
    )
