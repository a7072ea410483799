"""Which folder of the benchmarks may import which: downwards only, and no module itself in a circle."""

import ast
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
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
MODULES = {
    ".".join(("bench", *file.relative_to(BENCH).with_suffix("").parts)): file for file in BENCH.rglob("*.py")
}


def imported(file: Path) -> set[str]:
    """Modules of bench, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "bench":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("bench.")}
    return found


def part(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_imports_what_lies_below_it(module):
    found = imported(MODULES[module])
    assert found <= MODULES.keys()
    assert {part(one) for one in found} <= MAY_IMPORT[part(module)] | {part(module)}


def test_there_is_no_circle():
    waiting = {module: imported(file) for module, file in MODULES.items()}
    while ready := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        for module in ready:
            del waiting[module]
    assert not waiting
