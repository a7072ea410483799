"""Which folder of the benchmarks may import which: downwards only, and no circles."""

from tests.support.imports import MODULES, circular, imported

# As bench/METHOD.md has it.
MAY_IMPORT = {
    "results": set(),
    "measure": {"results"},
    "suites": {"measure", "results"},
    "conftest": {"measure", "results", "suites"},
    "run": {"measure", "results"},
    "report": {"results"},
    "quality": {"measure", "report"},
    "on_a_gpu": {"report", "results"},
    "pages": {"on_a_gpu", "quality", "report", "results"},
    "gpu": {"run", "suites", "measure", "pages", "report", "results"},
    "__main__": {"run", "measure", "report", "results"},
}
BENCH = [module for module in MODULES if module.startswith("bench.")]


def part(module: str) -> str:
    return module.split(".")[1]


def test_a_folder_imports_what_lies_below_it():
    for module in BENCH:
        parts = {part(other) for other in imported(module) if other.startswith("bench.")}
        assert parts <= MAY_IMPORT[part(module)] | {part(module)}, module


def test_there_is_no_circle():
    assert not circular(BENCH)
