"""Every install line of the pages and the messages can be followed, and help names no page."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement

from mica.cli.extras import DISTRIBUTION
from tests.support.imports import ROOT
from tests.support.pages import FENCED, pages, read

COMMAND = re.compile(r"\bpip install [^\n`]+")
FROM_A_CLONE = re.compile(r"\.(/mica)?\[(?P<extras>[\w,-]+)\]")
# A name of a module that only a checkout has, in a text that users of the wheel read
PAGE = re.compile(r"\b(?:mica|bench|kernels|recipes|tests|examples)/[\w/.-]*\.md\b|\bCONTRIBUTING\.md\b")


def declared_extras() -> set[str]:
    section = read("pyproject.toml").partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))


def commands(text: str) -> list[str]:
    """The install commands in a page's code, whether in blocks or between backticks."""
    blocks = "\n".join(code for _, code in FENCED.findall(text))
    spans = "\n".join(re.findall(r"`([^`\n]+)`", FENCED.sub("", text)))
    return COMMAND.findall(f"{blocks}\n{spans}")


def requirements(command: str) -> list[str]:
    """What a command installs: its arguments without options and comments."""
    words = shlex.split(command, comments=True)[2:]
    return [word for word in words if not word.startswith("-")]


@cache
def printable() -> dict[Path, list[str]]:
    """The texts that each module can print."""
    return {path: strings(path) for path in sorted((ROOT / "mica").rglob("*.py"))}


def strings(path: Path) -> list[str]:
    """The string constants of a module, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)
    }
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [text for text in constants if isinstance(text, str) and text not in docstrings]


def test_a_command_names_what_can_be_found():
    """From a clone, or one step above it, and without an index that has this package."""
    on_pages = [command for page in pages() for command in commands(read(page))]
    in_messages = [
        command
        for path, texts in printable().items()
        for command in COMMAND.findall("\n".join(texts))
        if path.name != "extras.py"
    ]
    assert on_pages
    assert in_messages
    for command in on_pages + in_messages:
        assert_can_be_found(command)


def assert_can_be_found(command):
    assert requirements(command), command
    for text in requirements(command):
        if text.endswith(".whl"):
            continue
        if own := FROM_A_CLONE.fullmatch(text):
            assert set(own["extras"].split(",")) <= declared_extras(), command
        else:
            assert Requirement(text).name != DISTRIBUTION, command


def test_no_message_names_a_page_of_the_checkout():
    found = {str(path): [text for text in texts if PAGE.search(text)] for path, texts in printable().items()}
    assert {path: texts for path, texts in found.items() if texts} == {}
