"""A layer's modelled cost: its bytes are those of the kernels' plans, and those that PyTorch really moves."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import mica.fast
from bench.measure.machine import ROOT
from bench.measure.memory import saved_bytes
from bench.model import __main__ as command
from bench.model import roofline
from mica.kernels.down_projection import down_projection
from mica.kernels.fused_linear import fused_linear
from mica.kernels.grad_a import grad_a
from mica.kernels.up_projection import up_projection_
from mica.paths import products, torch_path
from tests.support import models

H100 = roofline.DEVICES["h100"]
aten = torch.ops.aten


class Count(TorchDispatchMode):
    """Operators that are no mere views, and the bytes of all that they read and write."""

    bytes = launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket not in (aten.empty, aten.detach):
            operands = [one for one in tree_leaves((args, result)) if isinstance(one, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in operands)
            self.launches += 1
        return result


def layer(m=8192, n=4096, k=4096, rank=16, target="sm_90", **options):
    return roofline.Layer(m, n, k, rank, target, **options)


def percent(device=H100, **shape):
    """name -> percent over the base."""
    forms = roofline.compare(layer(**shape, target=device.target), device)["forms"]
    return {name: form["percent"] for name, form in forms.items()}


def traffic(kernels):
    return sum(kernel.bytes + kernel.partials for kernel in kernels)


def test_a_launch_takes_the_longer_of_compute_and_traffic_and_the_gap():
    device = roofline.Device("sm_90", tensor=100.0, fp32=10.0, bandwidth=2.0, gap=0.25)
    assert roofline.Kernel(6).seconds(device) == 3.25
    assert roofline.Kernel(6, partials=2).seconds(device) == 4.25
    assert roofline.Kernel(6, flops=200.0).seconds(device) == 3.25
    assert roofline.Kernel(6, flops=400.0, speed=0.5).seconds(device) == 8.25
    assert roofline.Kernel(6, flops=400.0, unit="fp32").seconds(device) == 40.25
    both = roofline.Cost([roofline.Kernel(2)], [roofline.Kernel(2), roofline.Kernel(4)], 0)
    assert both.microseconds(device) == {"forward": 1.25e6, "backward": 3.5e6, "both": 4.75e6}


@pytest.mark.parametrize("shape", [(8192, 4096, 4096, 16), (512, 4096, 1024, 64), (96, 320, 14336, 200)])
def test_bytes_are_those_of_the_kernels_plans(shape):
    m, n, k, rank = shape
    columns = (rank + 15) // 16 * 16

    def matrix(*size):
        return torch.empty(*size, dtype=torch.bfloat16, device="meta")

    x, y, w, h, a = matrix(m, k), matrix(m, n), matrix(k, n), matrix(m, columns), matrix(rank, k)
    b = matrix(n, columns).t()
    split, fused = (roofline.ours(layer(*shape), is_fused) for is_fused in (False, True))
    gemms = [split.forward[1], split.backward[2]]
    assert [one.bytes for one in gemms] == [x.nbytes + w.nbytes + y.nbytes] * 2
    assert split.saved == fused.saved == x.nbytes
    to = {"target": "sm_90"}
    for kernel, call, operands in [
        (split.forward[0], down_projection.plan(x, a, **to), (x, a, h)),
        (split.forward[2], up_projection_.plan(y, h, b, **to), (y, y, h, b)),
        (split.backward[0], down_projection.plan(y, b, **to), (y, b, h)),
        (split.backward[1], grad_a.plan(h, x, rank=rank, out_dtype=x.dtype, **to), (h, x, a)),
        (split.backward[3], up_projection_.plan(x, h, a, **to), (x, x, h, a)),
        (fused.forward[1], fused_linear.plan(x, w, h, b, **to), (x, w, h, b, y)),
        (fused.backward[2], fused_linear.plan(y, w.t(), h, a, **to), (y, w, h, a, x)),
    ]:
        assert kernel.bytes == sum(tensor.nbytes for tensor in operands)
        partial = call.bind()[1].args.get("partial_ptr")
        assert kernel.partials == (0 if partial is None else 2 * partial.nbytes)


@pytest.mark.parametrize("name", [roofline.STOCK_16, roofline.STOCK])
def test_stock_is_what_pytorch_does(name):
    m, n, k, rank = 48, 160, 96, 4
    base = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16))
    adapted = models.wrap(base, rank=rank, targets=["0"], autocast_adapter_dtype=name == roofline.STOCK)
    x = torch.randn(m, k, dtype=torch.bfloat16, requires_grad=True)
    (lora_a,) = (value for name, value in adapted.named_parameters() if "lora_A" in name)
    cost = roofline.FORMS[name](layer(m, n, k, rank))

    def check(kernels, call):
        with FlopCounterMode(display=False) as flops, Count() as count:
            result = call()
        assert (count.launches, count.bytes) == (len(kernels), traffic(kernels))
        assert flops.get_total_flops() == sum(kernel.flops for kernel in kernels)
        return result

    with mica.fast.disabled():
        y = check(cost.forward, lambda: adapted(x))
        assert cost.saved == saved_bytes(lambda: adapted(x), [adapted])
    dy = torch.ones_like(y)
    check(cost.backward, lambda: torch.autograd.grad(y, [x, lora_a], dy))


def test_the_control_is_what_the_reference_does(monkeypatch):
    monkeypatch.setattr(products, "has_native", lambda dtype: True)
    m, n, k, rank = 150, 40, 24, 4
    x, w, a, b, dy = (
        torch.randn(size, dtype=torch.bfloat16) for size in ((m, k), (n, k), (rank, k), (n, rank), (m, n))
    )
    cost = roofline.aten(layer(m, n, k, rank))
    with Count() as counted:
        torch_path.linear(x, w, a, b, 1.0)
    assert counted.bytes == traffic(cost.forward)
    with Count() as counted:
        torch_path.grad_x(dy, w, g := torch_path.grad_h(dy, b, 1.0, torch.bfloat16), a)
        g.t() @ x
    assert counted.bytes == traffic(cost.backward)


def test_what_the_forms_cost_in_comparison():
    order = [roofline.STOCK, roofline.STOCK_16, roofline.SPLIT, roofline.FUSED, roofline.BARE]
    for device in roofline.DEVICES.values():
        for part in ("forward", "backward"):
            over = {name: value[part] for name, value in percent(device).items()}
            assert sorted(order, key=over.get, reverse=True) == order
            assert over[roofline.BARE] == 0
    slow = roofline.compare(layer(triton_gemm=0.7), H100)["forms"]  # the GEMM's loss eats what fusing saves
    assert slow[roofline.FUSED]["us"]["both"] > slow[roofline.SPLIT]["us"]["both"]


def test_the_model_meets_the_targets():
    for _, target, value in roofline.targets(H100):
        sign, bound = target.split()
        assert value <= float(bound) if sign == "<=" else value >= float(bound)


def test_the_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    command.main(["--device", "a100", "--write"])
    text = (tmp_path / "a100.txt").read_text()
    assert capsys.readouterr().out == text
    first, *tables, last = text.split("\n\n")
    assert first.startswith("MODELLED, not measured: a100, rank 16")
    written = json.loads((tmp_path / "a100.json").read_text())
    assert written["label"].startswith("MODELLED")
    assert written["shapes"][0] == roofline.compare(layer(target="sm_80"), roofline.DEVICES["a100"])
    for table, row in zip(tables, written["shapes"], strict=True):
        assert table.startswith("MODELLED {m} x {n} x {k}".format(**row))
        lines = {line[:49].strip(): line[49:].split() for line in table.splitlines()[2:]}
        assert lines.keys() == row["forms"].keys()
        for name, form in row["forms"].items():
            values = [*form["percent"].values(), form["saved_bytes"] / 1e6]
            assert lines[name] == [f"{value:.1f}" for value in values]
    assert [line.split()[-1] for line in last.splitlines()[1:]] == [
        f"{value:.2f}" for *_, value in written["targets"]
    ]


def test_the_committed_table_is_that_of_these_kernels():
    """`python -m bench.model --write` regenerates it after a change of configurations or splits."""
    committed = ROOT / "bench" / "results" / "modelled" / "h100.txt"
    assert committed.read_text() == command.table(command.modelled("h100"))
