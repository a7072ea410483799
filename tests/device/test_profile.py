"""The kernels of one training step on a GPU by time: one file per implementation, next to the journal."""

import os
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure.machine import DEVICE, ON_ACCELERATOR
from bench.results import journal
from bench.results.names import FAST, STOCK
from bench.suites.bench_step import CELLS, build, work_of
from bench.suites.harness import pick

pytestmark = pytest.mark.skipif(not ON_ACCELERATOR, reason="it profiles an accelerator's kernels")
ROWS, WARM_UP = 25, pick(default=3, dry=1)


def table(events, device: bool) -> str:
    """The slowest events: µs, calls and name. In a dry run PyTorch's operators, by CPU time."""
    attribute = "self_device_time_total" if device else "self_cpu_time_total"
    spent = sorted(((getattr(event, attribute), event.count, event.key) for event in events), reverse=True)
    lines = [f"{'us':>12} {'calls':>7}  name"]
    lines += [f"{us:>12.1f} {calls:>7}  {name}" for us, calls, name in spent[:ROWS] if us > 0]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def work():
    return work_of(CELLS[0])


@pytest.mark.parametrize("implementation", [STOCK, FAST])
def test_kernels_of_a_step(work, implementation, tmp_path):
    device = DEVICE == "cuda"
    step = build(CELLS[0], work, implementation)
    with step.form.context():
        for _ in range(WARM_UP):
            step()
        with profile(activities=[ProfilerActivity.CUDA if device else ProfilerActivity.CPU]) as profiled:
            step()
            if device:
                torch.cuda.synchronize()
    text = table(profiled.key_averages(), device)
    assert len(text.splitlines()) > 1, "the profiler saw nothing"
    journal_file = Path(os.environ.get(journal.VARIABLE) or tmp_path / "step.jsonl")
    name = "-".join(implementation.replace(",", "").replace(".", " ").lower().split())
    file = journal_file.with_name(f"{journal_file.stem}-kernels-{name}.txt")
    file.write_text(f"One step of {CELLS[0].name.partition(' of ')[2]}: {implementation}\n\n{text}")
