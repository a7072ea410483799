"""A wrong edit: which function of which file, what is replaced there, and which tests must notice."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import yaml


class Mutant(NamedTuple):
    """``old`` becomes ``new`` in one definition of a file.

    function: a function, method, class or constant by its qualified name, like "Plan.__call__".
    old: occurs once in it; white space between tokens does not matter, so reformatting moves no mutant.
    tests: arguments of pytest.
    """

    file: str
    function: str
    old: str
    new: str
    tests: list[str]

    def span(self, source: str) -> tuple[int, int]:
        """Where in the file's text the definition is, from the start of its first line.

        Raises:
            LookupError: it is missing, or not unique.
        """
        spans = [span for name, *span in _definitions(source) if name == self.function]
        if len(spans) != 1:
            raise LookupError(f"{self.file} defines {self.function} {len(spans)} times")
        return tuple(spans[0])

    def applied(self, source: str) -> str:
        """The file's text with the edit.

        Raises:
            LookupError: the function or the text to replace is missing, or not unique.
        """
        start, end = self.span(source)
        places = list(_pattern(self.old).finditer(source, start, end))
        if len(places) != 1:
            raise LookupError(f"{self.old!r} occurs {len(places)} times in {self.function} of {self.file}")
        return source[: places[0].start()] + self.new + source[places[0].end() :]


def mutants(path: Path) -> Iterator[Mutant]:
    """Those that a file lists."""
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        tests = shlex.split(entry["tests"])
        for function, edits in entry["edits"].items():
            for old, new in _EDIT.findall(edits):
                yield Mutant(entry["file"], function, _text(old), _text(new), tests)


# Lines of what is replaced, then lines of what replaces it
_EDIT = re.compile(r"((?:^-.*\n)+)((?:^\+.*\n?)+)", re.MULTILINE)


def _text(lines: str) -> str:
    return "\n".join(line[2:] for line in lines.splitlines())


def _pattern(old: str) -> re.Pattern:
    """Matches the tokens of ``old`` with any white space between them."""
    tokens = re.findall(r"\w+|[^\w\s]", old)
    parts = tokens[:1]
    for before, token in pairwise(tokens):
        parts.append(r"\s+" if f"{before[-1]}{token[0]}".replace("_", "a").isalnum() else r"\s*")
        parts.append(token)
    text = "".join(part if part in (r"\s+", r"\s*") else re.escape(part) for part in parts)
    return re.compile(rf"(?<!\w){text}" if parts[0][0].isidentifier() else text)


@lru_cache(maxsize=1)  # one file has many edits
def _definitions(source: str) -> list[tuple[str, int, int]]:
    """(qualified name, start, end) of all functions, classes and constants; offsets in characters."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def below(node: ast.AST, prefix: str) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            name = getattr(child, "name", None)
            if not isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = _assigned(child) if isinstance(node, (ast.Module, ast.ClassDef)) else None
            if name is None:
                yield from below(child, prefix)
                continue
            first = min([child.lineno, *(line.lineno for line in getattr(child, "decorator_list", ()))])
            yield prefix + name, starts[first - 1], starts[child.end_lineno]
            yield from below(child, f"{prefix}{name}.")

    return list(below(ast.parse(source), ""))


def _assigned(node: ast.AST) -> str | None:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return targets[0].id if isinstance(targets[0], ast.Name) else None
