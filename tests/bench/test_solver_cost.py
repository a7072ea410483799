"""The cost model runs the solver's own code and counts what it would launch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.solver_cost", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("MODELLED")
    return [line.split() for line in done.stdout.splitlines()[2:]]


def test_a_row_a_shape_and_flops_that_grow_as_they_must():
    small, wide = run("400x400", "400x1600", "--rank", "4", "--batch", "3")
    assert small[:3] == ["400", "x", "400"]
    assert wide[:3] == ["400", "x", "1600"]
    products, factorisations, _, launches, *times = map(float, wide[3:])
    # the Gram: at least 5/8 of 2 · 400² · 1600 flops more than its quarter
    assert products - float(small[3]) >= 5 / 8 * 2 * 400**2 * 1200 / 1e9 - 0.1
    assert factorisations == float(small[4])
    assert launches > 10
    assert len(times) == 3
    assert all(time > 0 for time in times)
