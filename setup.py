"""README.md as the long description: on a package index its relative links would be dead."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # tomllib is Python 3.11's
VERSION = re.search(r'^version = "(.*)"', PROJECT, re.MULTILINE)[1]
FILES = re.search(r'^Repository = "(.*)"', PROJECT, re.MULTILINE)[1] + f"/blob/v{VERSION}/"
README = (ROOT / "README.md").read_text(encoding="utf-8")

setup(
    long_description=re.sub(r"\]\((?!\w+:|#)", f"]({FILES}", README),
    long_description_content_type="text/markdown",
)
