"""A layer's modelled cost: its bytes are those of the kernels' plans, and those that PyTorch really moves."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import mica.fast
from bench.measure.memory import saved_bytes
from bench.model import experts, roofline
from bench.model.roofline import BF16, FP32
from mica.kernels.down_projection import down_projection
from mica.kernels.fused_linear import fused_linear
from mica.kernels.grad_a import grad_a
from mica.kernels.up_projection import up_projection_
from mica.paths import products, torch_path
from tests.support import models
from tests.support.static_cases import empty

aten = torch.ops.aten
TO = {"target": "sm_90"}


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


def layer(m, n, k, rank):
    return roofline.Layer(m, n, k, rank, "sm_90")


def bytes_of(kernels):
    return [kernel.bytes for kernel in kernels]


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
    sizes = ((m, k), (m, n), (k, n), (m, columns), (rank, k))
    x, y, w, h, a = (torch.empty(*size, dtype=torch.bfloat16, device="meta") for size in sizes)
    b = torch.empty(n, columns, dtype=torch.bfloat16, device="meta").t()
    split, fused = (roofline.ours(layer(*shape), is_fused) for is_fused in (False, True))
    assert bytes_of([split.forward[1], split.backward[2]]) == [x.nbytes + w.nbytes + y.nbytes] * 2
    assert split.saved == fused.saved == x.nbytes
    for kernel, call, operands in [
        (split.forward[0], down_projection.plan(x, a, **TO), (x, a, h)),
        (split.forward[2], up_projection_.plan(y, h, b, **TO), (y, y, h, b)),
        (split.backward[0], down_projection.plan(y, b, **TO), (y, b, h)),
        (split.backward[1], grad_a.plan(h, x, rank=rank, out_dtype=x.dtype, **TO), (h, x, a)),
        (split.backward[3], up_projection_.plan(x, h, a, **TO), (x, x, h, a)),
        (fused.forward[1], fused_linear.plan(x, w, h, b, **TO), (x, w, h, b, y)),
        (fused.backward[2], fused_linear.plan(y, w.t(), h, a, **TO), (y, w, h, a, x)),
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


def test_what_the_vendor_multiplies_of_the_mixed_form(monkeypatch):
    m, n, k, rank = 150, 48, 32, 16
    x, w, a, b, dy = (
        torch.empty(size, dtype=torch.bfloat16, device="meta")
        for size in ((m, k), (n, k), (rank, k), (n, rank), (m, n))
    )
    cost, split = roofline.mixed(layer(m, n, k, rank)), roofline.ours(layer(m, n, k, rank), fused=False)
    with Count() as counted:
        g = torch_path.grad_h(dy, b, 1.0, torch.bfloat16)
        torch.mm(g.t(), x, out_dtype=torch.float32).to(a.dtype)
        torch.mm(dy, w)
    assert (counted.launches, counted.bytes) == (4, traffic(cost.backward[:4]))
    with Count() as counted:
        torch_path.down_projection(x, a, 1.0, torch.bfloat16)
        torch.mm(x, w.t())
    assert (counted.launches, counted.bytes) == (2, traffic(cost.forward[:2]))
    assert (cost.forward[-1], cost.backward[-1]) == (split.forward[-1], split.backward[-1])


def test_the_control_is_what_the_reference_does(monkeypatch):
    monkeypatch.setattr(products, "has_native", lambda dtype: True)
    m, n, k, rank = 150, 40, 24, 4
    sizes = ((m, k), (n, k), (rank, k), (n, rank), (m, n))
    x, w, a, b, dy = (torch.randn(size, dtype=torch.bfloat16) for size in sizes)
    cost = roofline.aten(layer(m, n, k, rank))
    with Count() as counted:
        torch_path.linear(x, w, a, b, 1.0)
    assert counted.bytes == traffic(cost.forward)
    with Count() as counted:
        torch_path.grad_x(dy, w, g := torch_path.grad_h(dy, b, 1.0, torch.bfloat16), a)
        g.t() @ x
    assert counted.bytes == traffic(cost.backward)


# 6 rows, 2 experts, K 5, N 3, r 1. Bytes: x and dx 60; y and dy 36; W, W' and dW' 60; A and dA 20, in fp32
# 40; B 12, prepared (16 columns) 192; h and g (16 columns) 192.
SMALL = experts.Stack(6, 2, 5, 3, 1)
BASE = 60 + 60 + 36


@pytest.mark.parametrize(("adapter", "A"), [(BF16, 20), (FP32, 40)])
def test_bytes_of_experts(adapter, A):
    bare, cost, stock = experts.bare(SMALL), experts.ours(SMALL, adapter), experts.stock(SMALL, adapter)
    assert bytes_of(bare.forward) == bytes_of(bare.backward) == [BASE]
    # x A h | x W y | y h B y;  dy B g | g x dA | dy W dx | dx g A dx
    assert bytes_of(cost.forward) == [60 + A + 192, BASE, 36 + 192 + 192 + 36]
    assert bytes_of(cost.backward) == [36 + 192 + 192, 192 + 60 + A, BASE, 60 + 192 + A + 60]
    # W A B W' | x W' y; dy W' dx | dy x dW' | dW' B dA; casts of fp32's A and B
    casts = [[40 + 20, 24 + 12], [20 + 40]] if adapter == FP32 else [[], []]
    assert bytes_of(stock.forward) == [*casts[0], 60 + 20 + 12 + 60, BASE]
    assert bytes_of(stock.backward) == [BASE, BASE, 60 + 12 + 20, *casts[1]]
    assert (cost.saved, stock.saved) == (60, 60 + 60)
    # 6 rows of 3 tokens are gathered again: 30 bytes are read and 60 written, and 30 kept
    tokens = experts.ours(SMALL._replace(top_k=2), adapter)
    assert bytes_of(tokens.backward) == [*bytes_of(cost.backward), 30 + 60]
    assert tokens.saved == 30


@pytest.mark.parametrize("stack", experts.BLOCK)
def test_bytes_of_experts_are_those_of_the_plans(stack):
    """Each tensor of a launch once, y and dx twice; no sum is split, whose parts would be more."""
    sizes = ((stack.rows, stack.in_features), (stack.rows, stack.out_features), (stack.rows, stack.rank))
    x, y, h = (empty(*size, dtype=torch.bfloat16) for size in sizes)
    A = empty(stack.experts, stack.rank, stack.in_features, dtype=torch.float32)
    B = empty(stack.experts, stack.out_features, stack.rank, dtype=torch.bfloat16).transpose(1, 2)
    offsets, cost = empty(stack.experts, dtype=torch.int32), experts.ours(stack, FP32)
    for kernel, call, again in (
        (cost.forward[0], down_projection.plan(x, A, None, offsets, **TO), []),
        (cost.forward[2], up_projection_.plan(y, h, B, None, None, None, offsets, **TO), [y]),
        (cost.backward[0], down_projection.plan(y, B, None, offsets, **TO), []),
        (cost.backward[1], grad_a.plan(h, x, None, offsets, rank=stack.rank, **TO), []),
        (cost.backward[3], up_projection_.plan(x, h, A, None, None, None, offsets, **TO), [x]),
    ):
        launch = call.bind()[1]
        assert launch.args.get("partial_ptr") is None
        operands = {id(one): one for one in launch.args.values() if isinstance(one, torch.Tensor)}
        moved = sum(one.nbytes for one in (*operands.values(), *again) if one is not offsets)
        assert kernel.bytes == moved, launch.kernel.__name__
