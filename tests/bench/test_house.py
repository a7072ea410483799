"""Which folder of the benchmarks may import which: downwards only, and no circles (bench/METHOD.md)."""

from tests.support.imports import MODULES, circular, imported

UPWARDS = [
    "results",
    "measure",
    "report",
    "suites",
    "conftest",
    "run",
    "on_a_gpu",
    "pages",
    "fits",
    "kinds",
    "gpu",
    "__main__",
]
BENCH = [module for module in MODULES if module.startswith("bench.")]


def level(module: str) -> int:
    return UPWARDS.index(module.split(".")[1])


def test_a_folder_imports_what_lies_below_it():
    for module in BENCH:
        others = [other for other in imported(module) if other.startswith("bench.")]
        assert all(level(other) <= level(module) for other in others), module
    assert not circular(BENCH)
