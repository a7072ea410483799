"""The Markdown pages of the checkout."""

import os
import re
from pathlib import Path

from tests.support.imports import ROOT

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def pages() -> list[str]:
    """Every Markdown file, relative to the root. `os.walk` does not follow the link mica/kernels."""
    names = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "build"]
        names += [os.path.relpath(Path(folder, name), ROOT) for name in files if name.endswith(".md")]
    return sorted(names)


def read(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")
