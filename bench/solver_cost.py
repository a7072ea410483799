"""MODELLED, not measured: what the batched solver would cost on an accelerator (``-m bench.solver_cost``).

The solver's own code for accelerators runs here on the CPU while every kernel it would launch is counted:
floating-point operations, bytes read and written, launches. A time follows from assumed rates of a device,
kernel by kernel: the longer of compute and traffic, and the launch. Work on the host (eigenproblems of a few
hundred numbers, synchronisation) is not in it. Devices with weak fp64 are modelled with the mixed-precision
Gram that the solver tries there.
"""

from __future__ import annotations

import argparse
from collections import Counter
from math import prod
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mica.subspace import batched
from mica.subspace.device import solve_batch


class Device(NamedTuple):
    """Assumed rates: fp64 and fp32 products (flop/s), factorisations' share of them, bytes/s, s a launch."""

    weak_fp64: bool
    fp64: float
    fp32: float
    factor_share: float
    bandwidth: float
    launch: float


DEVICES = {
    "h100": Device(False, 50e12, 45e12, 0.3, 3.0e12, 5e-6),
    "a100": Device(False, 17e12, 17e12, 0.3, 1.8e12, 5e-6),
    "rtx4090": Device(True, 1.2e12, 70e12, 0.5, 0.9e12, 5e-6),
}

SHAPES = ("576x576", "1024x4096", "4096x4096", "4096x14336", "14336x4096")

aten = torch.ops.aten


def _product(a, b) -> float:
    return 2.0 * prod(a.shape) * b.shape[-1]


_FLOPS = {
    aten.mm: lambda args: _product(args[0], args[1]),
    aten.bmm: lambda args: _product(args[0], args[1]),
    aten.addmm: lambda args: _product(args[1], args[2]),
    aten.addmm_: lambda args: _product(args[1], args[2]),
    aten.baddbmm: lambda args: _product(args[1], args[2]),
    aten.baddbmm_: lambda args: _product(args[1], args[2]),
}
_FACTORISATION_FLOPS = {
    aten.linalg_cholesky_ex: lambda args: prod(args[0].shape) * args[0].shape[-1] / 3,
    aten.linalg_solve_triangular: lambda args: prod(args[0].shape) * args[1].shape[-1],
    aten.linalg_qr: lambda args: 4.0 * prod(args[0].shape) * args[0].shape[-1],
    aten._linalg_svd: lambda args: 8.0 * prod(args[0].shape) * min(args[0].shape[-2:]),
}


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class Count(TorchDispatchMode):
    """Adds up what every operator costs that is not a mere view."""

    def __init__(self):
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.bytes = 0
        self.launches = 0
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket in (aten.empty, aten.detach, aten._local_scalar_dense):
            return result
        results = result if isinstance(result, (list, tuple)) else [result]
        operands = [*_tensors(args), *_tensors(results)]
        traffic = sum(tensor.numel() * tensor.element_size() for tensor in operands)
        packet = func.overloadpacket
        product = _FLOPS.get(packet, lambda args: 0.0)(args)
        factorisation = _FACTORISATION_FLOPS.get(packet, lambda args: 0.0)(args)
        single = any(tensor.dtype == torch.float32 for tensor in operands)
        self.flops["products" if product else "factorisations"] += product + factorisation
        self.bytes += traffic
        self.launches += 1
        for name, device in DEVICES.items():
            rate = device.fp32 if single else device.fp64
            compute = product / rate + factorisation / (rate * device.factor_share)
            self.seconds[name] += max(compute, traffic / device.bandwidth) + device.launch
        return result


def modelled(shape: tuple[int, int], rank: int, batch: int, weak_fp64: bool = False) -> Count:
    """The cost of ``batch`` Gaussian weights (out_features, in_features) solved together."""
    weights = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    count = Count()
    with torch.no_grad(), count, patch.object(batched, "has_weak_fp64", lambda device: weak_fp64):
        solved = dict(solve_batch(weights, rank, "auto", True, 0))
    if len(solved) != batch:
        raise RuntimeError(f"{batch - len(solved)} of {batch} weights of shape {shape} would go to the host")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="OUTxIN", help="one weight's shape")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="weights solved together (default 1)")
    args = parser.parse_args()
    print("MODELLED from assumed rates, for one weight:", ", ".join(DEVICES))
    times = (f"{name:>9} ms" for name in DEVICES)
    print(f"{'out x in':>14}  GF products  GF factor.     GB  launches", *times)
    for text in args.shapes:
        out_features, in_features = map(int, text.lower().split("x"))
        counts = [
            modelled((out_features, in_features), args.rank, args.batch, weak) for weak in (False, True)
        ]
        count = counts[False]
        times = (
            f"{counts[device.weak_fp64].seconds[name] / args.batch * 1e3:>12.2f}"
            for name, device in DEVICES.items()
        )
        print(
            f"{out_features:>6} x {in_features:<6}"
            f"{count.flops['products'] / args.batch / 1e9:>12.1f}"
            f"{count.flops['factorisations'] / args.batch / 1e9:>12.1f}"
            f"{count.bytes / args.batch / 1e9:>7.2f}{count.launches / args.batch:>10.1f}",
            *times,
            flush=True,
        )


if __name__ == "__main__":
    main()
