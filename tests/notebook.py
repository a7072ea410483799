"""``python -m tests.notebook``: executes examples/mica.ipynb and stores its outputs in it.

Needs nbclient, ipykernel, ipywidgets and matplotlib. To be run with the extra `cli` only: optional
libraries of quantisation print messages when they are imported. Progress bars are not stored: they are
widgets, which a page without a kernel cannot show. Messages on stderr are stored, and tests/test_notebook.py
accepts none.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

from tests.support.imports import ROOT

FILE = ROOT / "examples" / "mica.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"
_NUMBER = re.compile(r"\d[\d,.]*(e[+-]?\d+)?%?")
_DTYPE = re.compile(r"\b(bfloat16|float32)\b")
_WORST_LAYER = re.compile(r"most in \S+:")
_TOPICS = re.compile(r"held out: .*")  # of the installed Python's reference


def read() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def installs(cell: dict) -> bool:
    """Whether it has commands of IPython, which plain Python does not run."""
    return "%pip" in source(cell)


def printed(cell: dict) -> str:
    """What a cell has written to stdout."""
    streams = [output for output in cell["outputs"] if output.get("name") == "stdout"]
    return "".join("".join(output["text"]) for output in streams)


def is_bar(output: dict) -> bool:
    return WIDGET in output.get("data", {})


def without_numbers(text: str) -> list[str]:
    """Its lines, without what may differ between machines: numbers, dtypes, topics, and the worst layer."""
    patterns = {_WORST_LAYER: "most in #:", _TOPICS: "held out: #", _DTYPE: "#", _NUMBER: "#"}
    lines = []
    for line in text.splitlines():
        for pattern, word in patterns.items():
            line = pattern.sub(word, line)
        lines.append(" ".join(line.split()))
    return lines


def execute(notebook: dict, folder: Path) -> dict:
    """The notebook as it is after an execution in ``folder``, by Jupyter."""
    import nbformat
    from nbclient import NotebookClient

    executed = nbformat.reads(json.dumps(notebook), as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(executed, timeout=1800, resources=resources, record_timing=False)
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    return executed


def main() -> None:
    notebook = read()
    with tempfile.TemporaryDirectory() as folder:
        executed = execute(notebook, Path(folder))
    for cell, done in zip(notebook["cells"], executed["cells"], strict=True):
        if cell["cell_type"] == "code":
            cell["outputs"] = [_stored(output) for output in done["outputs"] if not is_bar(output)]
            cell["execution_count"] = done["execution_count"]
    FILE.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _stored(output: dict) -> dict:
    """With text as a list of lines, as notebooks are saved."""
    stored = json.loads(json.dumps(output))
    if "text" in stored:
        stored["text"] = stored["text"].splitlines(keepends=True)
    return stored


if __name__ == "__main__":
    main()
