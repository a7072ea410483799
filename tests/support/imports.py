"""Which modules of this checkout a module imports, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# `mica/kernels` is a link to `kernels/`, which is imported as `mica.kernels`.
FOLDERS = {
    "mica": ROOT / "mica",
    "mica.kernels": ROOT / "kernels",
    "bench": ROOT / "bench",
    "tests": ROOT / "tests",
}


def _name(package: str, path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))


# "mica.fast.grouping" -> its file, of all Python files of the checkout
MODULES: dict[str, Path] = {
    _name(package, file.relative_to(folder)): file
    for package, folder in FOLDERS.items()
    for file in sorted(folder.rglob("*.py"))
    if package != "mica" or "kernels" not in file.relative_to(folder).parts
}


def imports(module: str, *, at_import: bool = False) -> Iterator[tuple[str, str | None]]:
    """(imported module, imported name or None), of this checkout alone.

    at_import: only what runs when the module is imported, neither within functions nor for type checkers.
    """
    for node in _nodes(ast.parse(MODULES[module].read_text(encoding="utf-8")), at_import):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in MODULES:
                    yield submodule, None
                elif node.module in MODULES:
                    yield node.module, alias.name


def imported(module: str, *, at_import: bool = False) -> set[str]:
    """The modules of `imports`."""
    return {name for name, _ in imports(module, at_import=at_import)}


def _nodes(tree: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield node
        yield from _nodes(node, at_import)


def private_uses(module: str) -> Iterator[str]:
    """Private names of other modules of the checkout that the module uses, imported or as an attribute.

    A test may look into the module that it mirrors: tests.mica.test_x_y into mica.x_y or mica.x.
    """
    mirrored = module.removeprefix("tests.").replace("test_", "")
    mirrored = f"mica.{mirrored}" if mirrored.startswith("kernels.") else mirrored
    aliases = {}
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in MODULES:
                    aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif node.module in MODULES and _is_private(alias.name):
                    yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES and alias.asname:
                    aliases[alias.asname] = alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and _is_private(node.attr):
            other = aliases.get(node.value.id)
            if other is not None and not mirrored.startswith(other):
                yield f"{other}.{node.attr}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
