"""The notebook: saved without outputs, runs from top to bottom and learns; a progress bar is shown in it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

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

# What Jupyter is to tqdm: a kernel's IPython, and widgets that are shown by `display`
JUPYTER = """
import sys, types
shown = []
class Widget:
    def __init__(self, *args, children=(), **options):
        self.children, self.layout, self.value = list(children), types.SimpleNamespace(), 0
        self.style, self.bar_style = types.SimpleNamespace(), ""
    def close(self):
        pass
config = types.SimpleNamespace(config={"IPKernelApp": {}})
for name, members in {
    "IPython": {"get_ipython": lambda: config, "version_info": (9,), "__version__": "9"},
    "IPython.display": {"display": shown.append},
    "ipywidgets": {name: Widget for name in ("HTML", "FloatProgress", "HBox")} | {"__version__": "8"},
}.items():
    sys.modules[name] = module = types.ModuleType(name)
    vars(module).update(members)
sys.modules["IPython"].display = sys.modules["IPython.display"]
from mica.fast.create import solving
with solving.tqdm(total=2, desc="MiCA initialisation", disable=None, leave=False) as bar:
    bar.update()
assert len(shown) == 1
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
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs[-1]["text"] == "learned\n"
    assert any("image/png" in output.get("data", {}) for output in outputs)


if find_spec("nbclient") and find_spec("ipykernel"):
    test_in_jupyter = pytest.mark.slow(in_jupyter)


@pytest.mark.slow
def test_the_bar_of_an_initialisation_is_shown(tmp_path):
    run(JUPYTER, tmp_path)
