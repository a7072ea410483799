"""Which modules of this checkout a module imports, read from its source."""

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from tests.support.processes import ROOT

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


# "mica.fast.layers" -> its file, of all Python files of the checkout
MODULES: dict[str, Path] = {
    _name(package, file.relative_to(folder)): file
    for package, folder in FOLDERS.items()
    for file in sorted(folder.rglob("*.py"))
    if package != "mica" or "kernels" not in file.relative_to(folder).parts
}


def imported(module: str, *, at_import: bool = False) -> set[str]:
    """The modules of this checkout that a module imports; ``at_import``: without imports in functions."""
    modules = set()
    for node in _nodes(tree(module), at_import):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= submodules & MODULES.keys() or {node.module}
    return modules & MODULES.keys()


def circular(modules: Iterable[str], *, at_import: bool = False) -> set[str]:
    """Those of the modules that import each other in a circle, or import one that does."""
    waiting = {module: imported(module, at_import=at_import) - {module} for module in modules}
    while ready := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        for module in ready:
            del waiting[module]
    return set(waiting)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _nodes(node: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (at_import and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield child
            yield from _nodes(child, at_import)


def mirrored(module: str) -> str:
    """What a test module tests, by its name: tests.kernels.test_x -> mica.kernels.x."""
    name = module.removeprefix("tests.").replace("test_", "")
    return f"mica.{name}" if name.startswith("kernels.") else name


def private_uses(code: ast.Module) -> list[str]:
    """Private names of other modules of the checkout, imported or looked up in an imported module."""
    uses, bound = [], {}
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in FOLDERS:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                if _is_private(alias.name):
                    uses.append(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in FOLDERS:
                    bound[alias.asname or alias.name] = alias.name
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = bound.get(ast.unparse(node.value))
            if owner in MODULES:
                uses.append(f"{owner}.{node.attr}")
    return uses


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
