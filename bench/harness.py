"""What the suites share: how large a run is, which device it measures, and memory beside time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import TypeVar

import cpuinfo  # pytest-benchmark's own
import torch

T = TypeVar("T")

# `python -m bench --quick` and `--full` set it.
SIZE = os.environ.get("MICA_BENCH_SIZE", "default")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pick(quick: T, default: T, full: T | None = None) -> T:
    """What this size of run takes; a full run takes the default's where it has nothing of its own."""
    chosen = {"quick": quick, "default": default, "full": default if full is None else full}
    return chosen[SIZE]


def instructions() -> str:
    """Of matrix products in bf16 on this CPU: they decide what an adapter costs there. "" without any."""
    if limit():
        return ""
    flags = cpuinfo.get_cpu_info().get("flags", [])
    return "amx" if "amx_bf16" in flags else "avx512-bf16" if "avx512_bf16" in flags else ""


def limit() -> str:
    """The latest instructions that oneDNN may use in this run, like "AVX2"; "" without a limit."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "")


def finished(call: Callable[[], object]) -> Callable[[], object]:
    """``call``, and on an accelerator the wait until it is done."""
    if DEVICE == "cpu":
        return call

    def waiting() -> object:
        result = call()
        torch.cuda.synchronize()
        return result

    return waiting


def iterations(seconds: float, sample: float = 0.005) -> int:
    """How many calls of this length make one sample of about ``sample`` seconds: 1 to 100.

    The calls are those of the fastest rival, the bare one; the others take up to five times as long.
    """
    return min(100, max(1, ceil(sample / seconds)))


@contextmanager
def peak_growth() -> Iterator[Callable[[], float | None]]:
    """What is yielded gives, afterwards, by how many bytes memory grew at its highest point inside.

    Of the device's allocator on CUDA, of the process's resident memory on Linux, None elsewhere.
    """
    unknown = DEVICE == "cpu" and not Path("/proc/self/clear_refs").exists()
    before = None if unknown else _peak(reset=True)
    yield lambda: None if before is None else max(0, after - before)
    after = None if before is None else _peak()


def _peak(reset: bool = False) -> int:
    """Highest use since the last reset; directly after a reset, the present use."""
    if DEVICE == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def trainable_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the states, as they are after a step."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in values if torch.is_tensor(value))
