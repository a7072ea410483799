"""A layer from C++ against the same layer from Python, which is held against the definition: the same bits.

What a layer has to be beside its numbers (saved tensors, views, function transforms) is tested for both
languages in tests/mica/ops and tests/mica/fast.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mica import native, ops
from mica.ops.linear import linear_eager
from mica.paths import products, reference_path
from tests.support.cpp import needs_cpp
from tests.support.processor import has_instructions

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
IN, OUT, RANK = 24, 20, 6

pytestmark = needs_cpp


@pytest.fixture(autouse=True)
def every_dtype(monkeypatch):
    """16-bit products take long on processors without such instructions, but not with so few numbers."""
    has_instructions(True, monkeypatch)


class Layer:
    """Operands, and a call of them."""

    def __init__(self, rows=(5,), dtype=FP32, adapter_dtype=None, scaling=0.75, bias=True, is_called=False):
        generator = torch.Generator().manual_seed(0)

        def random(*shape, dtype=dtype):
            return torch.randn(shape, generator=generator).to(dtype)

        self.x = random(*rows, IN)
        self.weight = random(OUT, IN)
        self.lora_A = random(RANK, IN, dtype=adapter_dtype or dtype)
        self.lora_B = random(OUT, RANK, dtype=adapter_dtype or dtype)
        self.bias = random(OUT) if bias else None
        self.base_output = random(*rows, OUT) if is_called else None
        self.grad_output = random(*rows, OUT)
        self.scaling = scaling
        self.compute_dtype = None
        self.autocast_dtype = None
        self.dropout = 0.0, None

    def __call__(self, x, lora_A):
        is_called = self.base_output is not None
        weight, bias = (None, None) if is_called else (self.weight, self.bias)
        numbers = self.compute_dtype, *self.dropout, self.autocast_dtype, False
        return linear_eager(x, weight, lora_A, self.lora_B, self.scaling, bias, *numbers, self.base_output)

    def leaves(self):
        """x, in the strides that it has, and lora_A."""
        return self.x.detach().requires_grad_(), self.lora_A.detach().requires_grad_()


def results(layer):
    """y without a gradient, y, and the gradients of x and lora_A."""
    x, lora_A = layer.leaves()
    with torch.no_grad():
        alone = layer(x, lora_A)
    y = layer(x, lora_A)
    return [alone, y.detach(), *torch.autograd.grad(y, (x, lora_A), layer.grad_output.to(y.dtype))]


compiled = native.module()


def by_compiled(g, x):
    """`reference_path._by_native` with MICA_NATIVE=0."""
    return compiled.wide_product(g, x) if g.dtype is BF16 else None


def check_same_bits(layer, monkeypatch):
    ops.call_counts.clear()
    ours = results(layer)
    for name in ("linear", "linear_native", "linear_added"):
        assert ops.call_counts[name] == 2 * (name != "linear_added" or layer.base_output is not None)
    for name in ("linear_backward", "linear_backward_native"):
        assert ops.call_counts[name] == 1
    with monkeypatch.context() as patch:
        patch.setenv("MICA_NATIVE", "0")
        patch.setattr(
            reference_path, "_by_native", by_compiled
        )  # without which dA is summed in another order
        ops.call_counts.clear()
        expected = results(layer)
        assert ops.call_counts["linear_native"] == 0
    # NaN: fp16 overflows
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)


ROWS = [(), (1,), (5,), (16,), (17,), (2, 3), (2, 1, 9), (1, 1024), (1030,), (0,)]
base_is_called = pytest.mark.parametrize("is_called", [False, True])
DTYPES = [  # x, adapter, compute_dtype
    (FP64, FP64, None),
    (FP32, FP32, None),
    (BF16, BF16, None),
    (FP16, FP16, None),
    (BF16, FP32, None),
    (FP16, FP32, FP32),
    (BF16, FP32, FP32),
    (BF16, BF16, FP32),
    (FP32, FP32, FP64),
]


@pytest.mark.parametrize(
    ("scaling", "p"),
    [
        *((scaling, 0.0) for scaling in (1.0, 2.0, -0.25, 0.75, 2.0**40)),
        *((0.75, p) for p in (0.05, 0.5, 0.999, 1e-9)),
    ],
)
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@base_is_called
def test_the_bits_are_python_s(monkeypatch, is_called, rows, dtype, adapter_dtype, compute_dtype, scaling, p):
    layer = Layer(rows, dtype, adapter_dtype, scaling, bias=len(rows) != 1, is_called=is_called)
    layer.compute_dtype = compute_dtype
    if p:
        layer.dropout = p, torch.tensor([0x1234_5678_9ABC_DEF0])
        layer.x.view(-1)[:1] = math.nan  # dropped or not
    check_same_bits(layer, monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "scaling", "size"),
    [(FP16, 2.0**-20, 2.0**10), (FP32, 2.0**-140, 2.0**100), (FP32, 2.0**127, 2.0**-100)],
)
def test_the_bits_of_scalings_that_no_factor_can_take_exactly(monkeypatch, dtype, scaling, size):
    """Numbers of x and dy that large bring back what the scaled factors have lost."""
    layer = Layer((2,), dtype, scaling=scaling, bias=False)
    layer.weight.zero_()
    layer.x *= size
    layer.grad_output *= size
    check_same_bits(layer, monkeypatch)
    y, *_ = results(layer)
    assert y.any()


@pytest.mark.parametrize("autocast_dtype", [BF16, FP16])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32)])
@pytest.mark.parametrize("rows", [(5,), (2, 9), (1100,)], ids=str)
@base_is_called
def test_the_bits_under_autocast(monkeypatch, is_called, rows, dtype, adapter_dtype, autocast_dtype):
    layer = Layer(rows, dtype, adapter_dtype, is_called=is_called)
    layer.autocast_dtype = autocast_dtype
    with torch.autocast("cpu", autocast_dtype):
        check_same_bits(layer, monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "autocast_dtype"), [(BF16, None, None), (FP32, BF16, None), (FP32, None, FP16)]
)
@base_is_called
def test_products_without_instructions(monkeypatch, is_called, dtype, compute_dtype, autocast_dtype):
    """They are Python's, but those of few tokens with fp32 factors: all but x Wᵀ are in fp32 there."""
    has_instructions(False, monkeypatch)
    few = products.FEW_TO_ROUND if is_called else products.FEW_ROWS
    for rows, adapter_dtype, is_native in ((few, FP32, True), (few + 1, FP32, False), (few, FP16, False)):
        layer = Layer((rows,), dtype, adapter_dtype, is_called=is_called)
        layer.compute_dtype, layer.autocast_dtype = compute_dtype, autocast_dtype
        with torch.autocast("cpu", autocast_dtype or BF16, enabled=autocast_dtype is not None):
            if is_native:
                check_same_bits(layer, monkeypatch)
                continue
            ops.call_counts.clear()
            layer(*layer.leaves())
        assert (ops.call_counts["linear"], ops.call_counts["linear_native"]) == (1, 0)


# -- autograd ----------------------------------------------------------------------------------------


def test_a_gradient_that_nobody_asks_for_is_not_computed():
    layer = Layer((4,))
    x, lora_A = layer.leaves()
    flops = []
    for asked in ((x, lora_A), (x,), (lora_A,)):
        y = layer(x, lora_A)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y, asked, layer.grad_output)
        flops.append(counter.get_total_flops())
    g = 2 * 4 * OUT * RANK
    of_x = 2 * 4 * OUT * IN  # the counter does not know addmm_
    of_A = 2 * 4 * RANK * IN
    assert flops == [g + of_x + of_A, g + of_x, g + of_A]


def test_backwards_in_several_threads():
    layer = Layer((64,))
    with ThreadPoolExecutor(4) as pool:
        # not with those of this thread, for which MKL may have another number of threads
        expected, *others = pool.map(lambda _: results(layer), range(200))
    assert all(torch.equal(*pair) for result in others for pair in zip(result, expected, strict=True))
    torch.testing.assert_close(expected, results(layer))


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
def test_nothing_leaks(around):
    """References to operands are all given back."""
    layer = Layer()
    x, lora_A = layer.leaves()
    counts = []
    for _ in range(3):
        with around():
            y = layer(x, lora_A)
        if y.requires_grad:
            y.backward(layer.grad_output)
        del y
        operands = x, lora_A, layer.weight, layer.lora_B, layer.bias, layer.grad_output
        counts.append([t._use_count() for t in operands])
    assert counts[1] == counts[2]


# -- the compiled backward ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled_autograd(p):
    """Every seed has the same compiled backward."""
    layer = Layer((2, 3))
    torch._dynamo.utils.counters.clear()
    for seed in (1, 2):
        layer.dropout = p, torch.tensor(seed)
        expected = results(layer)[2:]
        x, lora_A = layer.leaves()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            layer(x, lora_A).backward(layer.grad_output)
        torch.testing.assert_close([x.grad, lora_A.grad], expected, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] == 1
