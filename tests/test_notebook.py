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

NOTEBOOK = json.loads((ROOT / "examples/mica.ipynb").read_text(encoding="utf-8"))
LEARNED = """
assert mica.fast.explain(model).counts() == {"reference": 14}
assert losses[-1] < 0.8 * losses[0], losses
assert 0 < report.swallowed < 1 and len(report.layers) == 14
assert figure.axes[0].lines[0].get_ydata().tolist() == losses
from mica.fast.create.solving import tqdm
bar = tqdm([1], disable=None)
"""


def test_it_is_saved_as_it_is_written():
    assert not [cell for cell in NOTEBOOK["cells"] if cell.get("outputs") or cell.get("execution_count")]


def in_python(tmp_path):
    code = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", "\n".join([*code, LEARNED])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def in_jupyter(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.reads(json.dumps(NOTEBOOK), 4)
    path = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
    notebook.cells = [path, *notebook.cells, nbformat.v4.new_code_cell(LEARNED)]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    kinds = [list(output.get("data", {})) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in kind for kind in kinds)
    assert sum("application/vnd.jupyter.widget-view+json" in kind for kind in kinds) == 2


JUPYTER = all(map(find_spec, ("nbclient", "ipykernel", "ipywidgets")))


@pytest.mark.slow
@pytest.mark.parametrize("execute", [in_python, *[in_jupyter] * JUPYTER])
def test_it_runs(execute, tmp_path):
    execute(tmp_path)


def test_the_bar_of_an_initialisation_is_jupyter_s_there():
    """tqdm's own bar, with ``disable=None``, is shown in terminals only, and a notebook's stderr is none."""
    assert solving.tqdm is tqdm.auto.tqdm
