"""Which folder of the benchmarks may import which: downwards only, no circles, and no private names."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As bench/README.md has it.
MAY_IMPORT = {
    "results": set(),
    "measure": {"results"},
    "model": {"measure"},
    "suites": {"measure", "results"},
    "run": {"measure", "results"},
    "report": {"results"},
    "quality": {"measure"},
    "gpu": {"run", "measure", "report"},
    "__main__": {"run", "measure", "report", "results"},
}
FILES = [file for folder in ("bench", "tests/bench") for file in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text()) for file in FILES
}
BENCH = {module: tree for module, tree in MODULES.items() if module.startswith("bench.")}


def imported(tree: ast.Module) -> set[str]:
    """Modules of bench, wherever in the file."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "bench":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= names & BENCH.keys() or {node.module}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.startswith("bench.")}
    return modules


def private(tree: ast.Module) -> list[str]:
    """Private names that are imported from modules of this project, or looked up in those imported."""
    names, bound = [], set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or node.names[0].name
            if module.partition(".")[0] in ("bench", "mica", "tests"):
                names += [f"{module}.{alias.name}" for alias in node.names if alias.name.startswith("_")]
                bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner.partition(".")[0] in bound and owner.replace(".", "").isidentifier():
                names.append(f"{owner}.{node.attr}")
    return [name for name in names if not name.endswith(("__main__", "._replace", "._asdict"))]


def part(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", BENCH)
def test_a_folder_imports_what_lies_below_it(module):
    modules = imported(BENCH[module])
    assert modules <= BENCH.keys()
    assert {part(one) for one in modules} <= MAY_IMPORT[part(module)] | {part(module)}


def test_there_is_no_circle():
    waiting = {module: imported(tree) for module, tree in BENCH.items()}
    while ready := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        for module in ready:
            del waiting[module]
    assert not waiting


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_of_another_module_is_used(module):
    assert private(MODULES[module]) == []


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from bench.run import _x, y", ["bench.run._x"]),
        ("from bench import run\nrun._x()", ["run._x"]),
        ("import mica.fast\nmica.fast._x.y", ["mica.fast._x"]),
        ("import torch\ntorch.cuda._sleep(1)\nfrom bench.gpu import __main__", []),
    ],
)
def test_private_names_are_seen(code, names):
    assert private(ast.parse(code)) == names
