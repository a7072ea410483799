"""The cost model of a layer: its bytes are those of the kernels' plans, and of what PyTorch really does."""

import json
import sys
from importlib import import_module

import pytest
import torch

import mica.fast
from mica import products, reference
from mica.kernels.down_projection import plan_down_projection
from mica.kernels.fused_linear import plan_fused_linear
from mica.kernels.grad_a import plan_grad_a
from mica.kernels.up_projection import plan_up_projection
from tests.support import models

model = import_module("bench.kernel_cost")
solver_cost = import_module("bench.solver_cost")

H100 = model.DEVICES["h100"]
STOCK_BF16 = "stock PEFT, bf16 adapters"


def layer(m=8192, n=4096, k=4096, rank=16, **options):
    return model.Layer(m, n, k, rank, "sm_90", **options)


def percent(device=H100, **shape):
    """name -> percent over the base."""
    forms = model.compare(layer(**shape)._replace(target=device.target), device)["forms"]
    return {name: form["percent"] for name, form in forms.items()}


def traffic(kernels):
    return sum(kernel.bytes + kernel.partials for kernel in kernels)


def test_sizes_and_rates():
    assert (torch.bfloat16.itemsize, torch.float32.itemsize) == (model.BF16, model.FP32)
    for name, device in solver_cost.DEVICES.items():  # one device, one rate, whichever model asks
        assert (model.DEVICES[name].fp32, model.DEVICES[name].bandwidth) == (device.fp32, device.bandwidth)


def test_a_launch_takes_the_longer_of_compute_and_traffic_and_the_gap():
    device = model.Device("sm_90", tensor=100.0, fp32=10.0, bandwidth=2.0, gap=0.25)
    assert model.Kernel(6).seconds(device) == 3.25
    assert model.Kernel(6, partials=2).seconds(device) == 4.25
    assert model.Kernel(6, flops=200.0).seconds(device) == 3.25
    assert model.Kernel(6, flops=400.0).seconds(device) == 4.25
    assert model.Kernel(6, flops=400.0, speed=0.5).seconds(device) == 8.25
    assert model.Kernel(6, flops=400.0, unit="fp32").seconds(device) == 40.25
    assert model.gemm(2, 3, 5) == model.Kernel(2 * (10 + 15 + 6), 60.0)
    assert model.gemm(2, 3, 5, model.FP32, adds=True) == model.Kernel(4 * (10 + 15 + 2 * 6), 60.0, "fp32")
    both = model.Cost([model.Kernel(2)], [model.Kernel(2), model.Kernel(4)], 0).microseconds(device)
    assert both == {"forward": 1.25e6, "backward": 3.5e6, "both": 4.75e6}


def test_split_counted_by_hand():
    cost = model.FORMS["split"](layer(100, 300, 200, rank=5))
    x, w, y, h = 100 * 200, 300 * 200, 100 * 300, 100 * 16  # h, g and B are padded to 16 columns, A is not
    a, b = 5 * 200, 300 * 16
    assert [kernel.bytes // 2 for kernel in cost.forward] == [x + a + h, x + w + y, y + y + h + b]
    assert [kernel.bytes // 2 for kernel in cost.backward] == [y + b + h, h + x + a, y + w + x, x + x + h + a]
    assert [kernel.flops for kernel in cost.forward] == [2 * 16 * x, 2 * 100 * 300 * 200, 2 * 16 * y]
    assert cost.saved == 2 * x


@pytest.mark.parametrize("shape", [(8192, 4096, 4096, 16), (512, 4096, 1024, 64), (96, 320, 14336, 200)])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_bytes_are_those_of_the_kernels_plans(shape, target):
    m, n, k, rank = shape
    columns = (rank + 15) // 16 * 16

    def matrix(*size):
        return torch.empty(*size, dtype=torch.bfloat16, device="meta")

    x, y, w, h, a = matrix(m, k), matrix(m, n), matrix(k, n), matrix(m, columns), matrix(rank, k)
    b = matrix(n, columns).t()
    found = model.ours(layer(*shape)._replace(target=target), fused=False)
    fused = model.ours(layer(*shape)._replace(target=target), fused=True)
    for kernel, choice, operands in [
        (found.forward[0], plan_down_projection(x, a, target=target), "x p h"),
        (found.forward[2], plan_up_projection(y, h, b, target=target), "base out h p"),
        (found.backward[0], plan_down_projection(y, b, target=target), "x p h"),
        (found.backward[1], plan_grad_a(h, x, rank, out_dtype=x.dtype, target=target), "g x grad"),
        (found.backward[3], plan_up_projection(x, h, a, target=target), "base out h p"),
        (fused.forward[1], plan_fused_linear(x, w, h, b, target=target), "x w h p out"),
        (fused.backward[2], plan_fused_linear(y, w.t(), h, a, target=target), "x w h p out"),
    ]:
        _, launch = choice.bound()
        assert kernel.bytes == sum(launch.args[f"{name}_ptr"].nbytes for name in operands.split())
        partial = launch.args.get("partial_ptr") if launch.meta.get("SPLIT") else None
        assert kernel.partials == (0 if partial is None else 2 * partial.nbytes)


@pytest.mark.parametrize("name", [STOCK_BF16, model.STOCK])
def test_stock_is_what_pytorch_does(name):
    m, n, k, rank = 48, 160, 96, 4
    base = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16))
    adapted = models.wrap(base, rank=rank, targets=["0"], autocast_adapter_dtype=name == model.STOCK)
    x = torch.randn(m, k, dtype=torch.bfloat16, requires_grad=True)
    weights = dict(adapted.named_parameters())
    own = {weight.untyped_storage().data_ptr() for weight in weights.values()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    forward, backward = solver_cost.Count(), solver_cost.Count()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with mica.fast.disabled(), forward, hooks:
        y = adapted(x)
    dy = torch.ones_like(y)
    lora_a = next(weight for key, weight in weights.items() if "lora_A" in key)
    with backward:
        torch.autograd.grad(y, [x, lora_a], dy)

    cost = model.FORMS[name](layer(m, n, k, rank))
    for counted, kernels in ((forward, cost.forward), (backward, cost.backward)):
        assert (counted.launches, counted.bytes) == (len(kernels), traffic(kernels))
        assert sum(counted.flops.values()) == sum(kernel.flops for kernel in kernels)
    assert cost.saved == sum(one.nbytes for pointer, one in saved.items() if pointer not in own)


def test_aten_is_what_the_reference_does(monkeypatch):
    monkeypatch.setattr(products, "has_native", lambda dtype: True)
    m, n, k, rank = 1500, 40, 24, 4
    x, w, a, b, dy = (
        torch.randn(size, dtype=torch.bfloat16) for size in ((m, k), (n, k), (rank, k), (n, rank), (m, n))
    )
    forward, backward, control = solver_cost.Count(), solver_cost.Count(), solver_cost.Count()
    with forward:
        reference.forward(x, w, a, b, 1.0)
    with backward:
        reference.linear_backward(dy, x, w, a, b, 1.0, torch.bfloat16)
    with control:
        reference.grad_x(dy, w, g := reference.grad_h(dy, b, 1.0, torch.bfloat16), a)
        g.t() @ x
    cost, chunked = (model.FORMS[name](layer(m, n, k, rank)) for name in ("aten control", "aten reference"))
    assert traffic(cost.forward) == traffic(chunked.forward) == forward.bytes
    assert traffic(cost.backward) == control.bytes
    assert traffic(chunked.backward) == backward.bytes


def test_what_the_forms_cost_in_comparison():
    for device in model.DEVICES.values():
        for part in ("forward", "backward"):
            found = {name: value[part] for name, value in percent(device).items()}
            assert found["bare frozen linear"] == 0
            assert found[model.STOCK] > found[STOCK_BF16] > found["split"] > found["fused"] > 0
            assert found["split"] > found[model.GROUPED]
    slow = model.compare(layer(triton_gemm=0.7), H100)["forms"]  # the GEMM's loss eats what fusing saves
    assert slow["fused"]["us"]["both"] > slow["split"]["us"]["both"]


def test_overhead_falls_with_the_width_that_is_not_read_again():
    forward, backward = (
        [percent(**{side: width})["split"][part] for width in (1024, 4096, 14336)]
        for part, side in (("forward", "k"), ("backward", "n"))
    )
    assert forward == sorted(forward, reverse=True)
    assert backward == sorted(backward, reverse=True)
    wide = [percent(n=width)["split"]["forward"] for width in (1024, 4096, 14336)]
    assert wide == sorted(wide, reverse=True)


def test_grouped_reads_x_once():
    one, (together, base) = layer(), model.grouped([layer()] * 3)
    x = 2 * one.m * one.k
    forward, backward = (
        3 * sum(kernel.bytes for kernel in passes) for passes in model.FORMS["split"](one)[:2]
    )
    assert sum(kernel.bytes for kernel in together.forward) == forward - 2 * x
    # x once and not three times; dx: one update and not three, and two GEMMs that read it
    assert sum(kernel.bytes for kernel in together.backward) == backward - 2 * x - 2 * 2 * x + 2 * x
    assert together.saved == x
    assert traffic(base.backward) == 3 * traffic(model.bare(one).backward) + 2 * 3 * x
    assert model.GROUPED not in percent(rank=128)  # wider than a kernel takes


def test_the_model_meets_what_is_asked_of_a_gpu():
    rows = model.acceptance(H100, 0.97)
    assert len(rows) == 6
    for _, asked, value in rows:
        sign, bound = asked.split()
        assert value <= float(bound) if sign == "<=" else value >= float(bound)


def test_command(monkeypatch, capsys, tmp_path):
    file = tmp_path / "cost.json"
    arguments = ["512x1024x2048", "64x128x256", "--device", "a100", "--rank", "8", "--triton-gemm", "0.5"]
    monkeypatch.setattr(sys, "argv", ["kernel_cost", *arguments, "--json", str(file)])
    model.main()
    first, *tables = capsys.readouterr().out.split("\n\n")
    assert first.startswith("MODELLED, not measured: a100, rank 8")
    assert len(tables) == 3
    assert all(table.startswith("MODELLED") for table in tables)
    assert "grouped q/k/v" in tables[0]
    written = json.loads(file.read_text())
    assert written["label"].startswith("MODELLED")
    device = model.DEVICES["a100"]
    assert written["shapes"][0] == model.compare(model.Layer(512, 1024, 2048, 8, "sm_80", 0.5), device)
    for table, row in zip(tables, written["shapes"], strict=False):
        lines = {line[:49].strip(): line[49:].split() for line in table.splitlines()[2:]}
        assert lines.keys() == row["forms"].keys()
        for name, form in row["forms"].items():
            values = [*form["percent"].values(), form["saved_bytes"] / 1e6]
            assert lines[name] == [f"{value:.1f}" for value in values]
