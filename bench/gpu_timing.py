"""Times on a GPU: rivals take turns, the L2 cache is flushed before each, medians over the rounds count."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from mica.kernels.down_projection import plan_down_projection
from mica.kernels.grad_a import plan_grad_a
from mica.kernels.launching import Launch
from mica.kernels.up_projection import plan_up_projection

FLUSH_BYTES = 256 * 2**20  # five times the L2 cache of an H100


def interleaved(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, list[float]]:
    """Microseconds of every call in every round. On a CPU (a dry run) by the host's clock."""
    for call in calls.values():
        call()
    if device == "cpu":
        return {name: [_host(call) for _ in range(rounds)] for name, call in calls.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(100_000)  # the host gets ahead: launches are not what is timed
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [1e3 * start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _host(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def summary(times: list[float]) -> dict[str, float]:
    """Median and the quartiles."""
    ordered = sorted(times)
    count = len(ordered)
    return {"us": median(ordered), "us_25": ordered[count // 4], "us_75": ordered[(3 * count) // 4]}


def launch_bytes(launch: Launch, out: Tensor) -> int:
    """What a launch must read and write once: its operands, and its output twice where it is updated."""
    ignored = ("counter_ptr", "partial_ptr")
    operands = [t for name, t in launch.args.items() if isinstance(t, Tensor) and name not in ignored]
    once = sum(t.numel() * t.element_size() for t in {id(t): t for t in operands}.values())
    is_updated = launch.args.get("base_ptr") is out
    return once + (out.numel() * out.element_size() if is_updated else 0)


def kernel_bandwidths(layer, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Each kernel's microseconds and GB/s, beside those of a plain copy as large as x."""
    x, rank = layer.x.detach(), layer.lora_A.shape[0]
    lora_A, factor = layer.lora_A.detach(), layer.lora_B.to(x.dtype).t()
    y = layer.grad_output.clone()
    h = torch.zeros(x.shape[0], rank, dtype=x.dtype, device=device)
    copy = torch.empty_like(x)
    planned = {
        "h = x Aᵀ": plan_down_projection(x, lora_A).bound(),
        "g = dy B": plan_down_projection(layer.grad_output, factor).bound(),
        "y += h Bᵀ": plan_up_projection(y, h, factor).bound(),
        "dA = gᵀ x": plan_grad_a(h, x, rank).bound(),
    }
    calls = {name: launch for name, (_, launch) in planned.items()}
    sizes = {name: launch_bytes(launch, out) for name, (out, launch) in planned.items()}
    calls["copy"], sizes["copy"] = lambda: copy.copy_(x), 2 * x.numel() * x.element_size()
    found = {}
    for name, times in interleaved(calls, device, rounds).items():
        found[name] = summary(times)
        found[name]["gb_s"] = sizes[name] / found[name]["us"] / 1e3
    for entry in found.values():
        entry["share_of_copy"] = entry["gb_s"] / found["copy"]["gb_s"]
    return found
