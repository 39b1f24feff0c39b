"""The notebooks run from the first cell to the last, by nbmake, with what their cells name for it in place of a large model."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NBMAKE = ["-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--nbmake", "--overwrite", "--nbmake-timeout=900"]


def assert_pictures(notebook):
    """Each cell that draws curves or anything else shows a PNG, and none the text that stands for a figure."""
    drawing = [
        cell for cell in notebook.cells if re.search(r"Curves\(|plt\.", cell.source) and cell.cell_type == "code"
    ]
    shown = [[output.get("data", {}).keys() for output in cell.outputs] for cell in drawing]
    assert all(any("image/png" in kinds for kinds in outputs) for outputs in shown)
    everything = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    bare = [one for one in everything if "<Figure" in one.get("data", {}).get("text/plain", "")]
    assert all("image/png" in one.data for one in bare)


@pytest.mark.thorough
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_it_runs(tmp_path, path):
    copy = shutil.copy(path, tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *NBMAKE, copy]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=1000)
    assert done.returncode == 0, done.stdout
    notebook = nbformat.read(copy, as_version=4)
    cells = notebook.cells
    assert_pictures(notebook)
    said = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert "model: package://quickstart" in said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_saved_outputs_are_whole_and_of_these_cells(path):
    """Each code cell was run, in order, without an error; nothing of the machine that made them is in it."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert_pictures(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not re.search(r"/tmp/|/root/|/home/", path.read_text())
    for cell in cells:
        if not cell.source.startswith("%%"):
            ast.parse(cell.source)


def test_all_install_alike():
    """One cell, in each notebook letter by letter."""
    cells = {nbformat.read(path, as_version=4).cells[1].source for path in NOTEBOOKS}
    assert len(NOTEBOOKS) == 4 and len(cells) == 1 and "REPOSITORY" in cells.pop()
