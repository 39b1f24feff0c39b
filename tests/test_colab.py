"""The cell that installs, in an environment as Colab's: Python 3.13 with the libraries that are there in August 2026."""

import os
import pathlib
import shutil
import subprocess

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PREINSTALLED = ["jax==0.7.2", "flax==0.11.2", "transformers==5.15.*", "numpy<2.4"]
KERNEL = """
class Kernel:
    def do_shutdown(self, restart):
        print("restart", restart)

class Shell:
    kernel = Kernel()

def get_ipython():
    return Shell()
"""


def python_3_13():
    found = shutil.which("python3.13")
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    here = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")) / "versions"
    return next((str(path) for path in sorted(here.glob("3.13.*/bin/python"))), None)


@pytest.mark.slow
def test_the_first_cell_installs_and_survives_the_restart(tmp_path):
    python = python_3_13()
    if python is None:
        pytest.skip("no Python 3.13 here")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    own = str(tmp_path / "venv/bin/python")
    subprocess.run([own, "-m", "pip", "install", "-q", *PREINSTALLED], check=True, timeout=1200)
    cell = nbformat.read(ROOT / "notebooks/01_quickstart.ipynb", as_version=4).cells[1].source
    cell = cell.replace('"https://github.com/OWNER/cgrpo_jax"', repr(f"file://{ROOT}"))
    assert f"file://{ROOT}" in cell

    def run(before, after):
        code = f"{KERNEL}\n{before}\n{cell}\n{after}"
        done = subprocess.run([own, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    first = run("import jax; assert jax.__version__ == '0.7.2'", "")
    assert "run the cells again" in first and "restart True" in first
    code = "import jax, cgrpo_jax; print(jax.__version__, cgrpo_jax.get_config('quickstart').train.steps, RUNS)"
    version, *rest = run("", code).split()
    assert version.startswith("0.10.") and rest == ["50", "runs"]
