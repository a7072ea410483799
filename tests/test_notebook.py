"""The notebook: saved without outputs, runs from top to bottom and learns; a progress bar is shown in it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import tqdm.auto

from mica.fast.create import solving
from tests.support.imports import ROOT

NOTEBOOK = ROOT / "examples/mica.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]

LEARNED = """
assert mica.fast.explain(model).counts() == {"reference": 14}
assert losses[-1] < 0.8 * losses[0], losses
assert 0 < report.swallowed < 1 and len(report.layers) == 14
assert figure.axes[0].lines[0].get_ydata().tolist() == losses
print("learned")
"""


def run(code, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_saved_as_it_is_written():
    assert not [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")]
    assert [cell["cell_type"] for cell in CELLS].count("markdown") == len(CODE)


@pytest.mark.slow
def test_its_cells_run_one_after_the_other(tmp_path):
    assert "learned" in run("\n".join([*CODE, LEARNED]), tmp_path)


def in_jupyter(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(LEARNED))
    bar = "from mica.fast.create.solving import tqdm\ntqdm([1], disable=None, leave=False)"
    notebook.cells.insert(-1, nbformat.v4.new_code_cell(bar))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs[-1]["text"] == "learned\n"
    assert any(
        "application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in notebook.cells[-2].outputs
    )
    assert any("image/png" in output.get("data", {}) for output in outputs)


if all(map(find_spec, ("nbclient", "ipykernel", "ipywidgets"))):
    test_in_jupyter = pytest.mark.slow(in_jupyter)


def test_the_bar_of_an_initialisation_is_jupyter_s_there():
    """tqdm's own bar, with ``disable=None``, is shown in terminals only, and a notebook's stderr is none."""
    assert solving.tqdm is tqdm.auto.tqdm
