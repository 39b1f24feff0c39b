"""The notebooks run from the first cell to the last, with the replacements that their cells name for `nbmake`."""

import ast
import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def mocks(cell):
    """What a cell's variables are replaced with, as `pytest --nbmake` does it."""
    return cell.metadata.get("nbmake", {}).get("mock", {})


def run(notebook, folder):
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}})

    async def replace(cell, cell_index, execute_reply):
        for name, value in mocks(cell).items():
            await client.kc.execute_interactive(f"{name} = {value!r}", store_history=False)

    client.on_cell_executed = replace
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_it_runs(tmp_path, monkeypatch, path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    run(notebook, tmp_path)
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "model: package://quickstart" in said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_saved_outputs_are_whole_and_of_these_cells(path):
    """Each code cell was run, in order, without an error; nothing of the machine that made them is in it."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not re.search(r"/tmp/|/work/|/root/", path.read_text())
    for cell in cells:
        if not cell.source.startswith("%%"):
            ast.parse(cell.source)


def test_all_install_alike():
    """One cell, in each notebook letter by letter."""
    cells = {nbformat.read(path, as_version=4).cells[1].source for path in NOTEBOOKS}
    assert len(NOTEBOOKS) == 4 and len(cells) == 1 and "REPOSITORY" in cells.pop()
