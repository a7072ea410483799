"""Sources of Python packages that tests cannot import, from where they are at hand; nothing is imported."""

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

# What reads a package: its file's path, from the package's folder on -> the text
Read = Callable[[str], str]


def at_hand(package: str) -> Read | None:
    """As installed, or in the folder MICA_WHEELS."""
    spec = importlib.util.find_spec(package)  # of a package without a dot it imports nothing
    if spec is not None and spec.origin is not None:
        above = Path(spec.origin).parents[1]
        return lambda path: (above / path).read_text(encoding="utf-8")
    folder = os.environ.get("MICA_WHEELS")
    return None if folder is None else in_wheels(Path(folder), package)


def in_wheels(folder: Path, package: str) -> Read | None:
    """From the wheel in the folder that has the package, if one does."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            if f"{package}/__init__.py" in archive.namelist():
                return lambda path, wheel=wheel: zipfile.Path(wheel, path).read_text(encoding="utf-8")
    return None


def download(distributions: list[str], folder: Path) -> str | None:
    """The newest wheels from the package index into the folder; why not, if that fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--retries", "0", "--timeout", "10", "--dest", str(folder), *distributions]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


class Source:
    """The syntax tree of a file."""

    def __init__(self, text: str):
        self.tree = ast.parse(text)

    def function(self, name: str) -> ast.FunctionDef:
        """The first one of that name, wherever it is; "Class.name" is sought in that class."""
        scope, _, name = name.rpartition(".")
        tree = self.cls(scope) if scope else self.tree
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node
        raise AssertionError(f"no function {name}")

    def cls(self, name: str) -> ast.ClassDef:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
        raise AssertionError(f"no class {name}")

    def assigned(self) -> set[str]:
        """Targets of all assignments, as they are written: "LoraModel.__init__"."""
        targets = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                targets.update(ast.unparse(target) for target in node.targets)
        return targets

    def fields(self) -> set[str]:
        """Names with an annotation in the bodies of classes, like those of dataclasses."""
        names = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef):
                annotated = [part for part in node.body if isinstance(part, ast.AnnAssign)]
                names.update(ast.unparse(part.target) for part in annotated)
        return names


def parameters(function: ast.FunctionDef) -> list[str]:
    """Without annotations and defaults: ["self", "x", "*args", "**kwargs"]."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    names += [argument.arg for argument in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return names


def texts(node: ast.AST) -> set[str]:
    """All string constants in it."""
    constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


def called(node: ast.AST) -> set[str]:
    """Names of what is called in it: "f" of f(x), "a.f" of a.f(x)."""
    return {ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}
