"""What pyproject.toml cannot say: a link where links came as text, and a README whose links are absolute."""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # tomllib is Python 3.11's
VERSION = re.search(r'^version = "(.*)"', PROJECT, re.MULTILINE)[1]
FILES = re.search(r'^Repository = "(.*)"', PROJECT, re.MULTILINE)[1] + f"/blob/v{VERSION}/"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def link_kernels():
    """mica/kernels is a link, and a file of text where Git or an archive came without links (Windows)."""
    target = ROOT / "kernels"
    link = ROOT / "mica" / "kernels"
    if not target.exists() or link.resolve() == target:  # in an sdist the kernels are there themselves
        return
    if link.is_dir():
        shutil.rmtree(link)
    else:
        link.unlink(missing_ok=True)
    try:
        os.symlink(os.path.join("..", "kernels"), link, target_is_directory=True)
    except OSError:  # no right to make links, or a disk without them
        if sys.platform == "win32":
            import _winapi

            _winapi.CreateJunction(str(target), str(link))
        else:
            shutil.copytree(target, link)


link_kernels()
setup(
    # on a package index relative links would be dead
    long_description=re.sub(r"\]\((?!\w+:|#)", f"]({FILES}", README),
    long_description_content_type="text/markdown",
)
