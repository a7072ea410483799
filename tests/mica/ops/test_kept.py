"""x that the backward computes again instead of saving it, in layers from Python and from C++."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from mica.ops import kept
from mica.ops.linear import linear_eager
from tests.support.linear_calls import addresses, saved_by
from tests.support.tolerances import RELATIVE, error

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
TOKENS, IN, OUT, RANK = 5, 12, 8, 3

pytestmark = pytest.mark.usefixtures("language")


@pytest.fixture
def norms():
    kept.recompute_norms(True)
    yield
    kept.recompute_norms(False)


@pytest.fixture(params=[FP32, BF16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


class Layer:
    def __init__(self, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(OUT, IN, generator=generator).to(dtype)
        self.lora_A = torch.randn(RANK, IN, generator=generator).requires_grad_()
        self.lora_B = torch.randn(OUT, RANK, generator=generator)
        if dtype == FP64:
            self.lora_A = self.lora_A.detach().double().requires_grad_()
            self.lora_B = self.lora_B.double()

    def __call__(self, x, autocast_dtype=None):
        return linear_eager(x, self.weight, self.lora_A, self.lora_B, 0.5, None, None, autocast_dtype)


def leaves(*dtypes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(TOKENS, IN, generator=generator).to(dtype).requires_grad_() for dtype in dtypes]


def rms_norm(h, weight):
    """As models have it that are written in PyTorch's operators."""
    wide = h.to(FP32)
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * (wide * rstd).to(h.dtype)


def gradients(y, *inputs):
    return torch.autograd.grad(y.float().sin().sum(), inputs, materialize_grads=True)


def is_saved(layers, made):
    """Whether the layers' graphs keep x, the only element of a list that nobody else refers to."""
    ys = [layer(made[0]) for layer in layers]
    reference = StorageWeakRef(made.pop().untyped_storage())
    assert all(y.requires_grad for y in ys)
    return not reference.expired()


def check_same(layers, make, inputs):
    """The gradients are those of an x that is saved: a clone's."""
    ours = gradients(sum(layer(x) for x in [make()] for layer in layers), *inputs)
    expected = gradients(sum(layer(x) for x in [make().clone()] for layer in layers), *inputs)
    for mine, other in zip(ours, expected, strict=True):
        assert torch.equal(mine, other)


def norm_weight(dtype):
    return torch.linspace(0.5, 2, IN).to(dtype)


def offset_norm(h):
    """Gemma's: the product is in fp32, and what is cast is the whole."""
    wide = h.float()
    weight = torch.linspace(-0.5, 1, IN).to(h.dtype)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(h)


MADE = {  # x of two tensors: (how it is made, whether that needs norms to be computed again)
    "a product": (lambda gate, up: torch.nn.functional.silu(gate) * up, False),
    "a product in another shape": (lambda h, weight: weight[0] * h.sin(), False),
    "a norm": (lambda h, _: rms_norm(h, norm_weight(h.dtype)), True),
    "a norm scaled by a number": (lambda gate, up: 2.5 * (gate * up), True),
    "a norm whose weight is offset": (lambda h, _: offset_norm(h), True),
}
SAVED = {
    "a copy": lambda gate, up: (torch.nn.functional.silu(gate) * up).clone(),
    "times a Python number": lambda h, _: h * 2.5,
    "a norm, by default": MADE["a norm"][0],
}


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("name", MADE)
def test_an_x_that_is_computed_again_is_not_saved_and_gives_the_same_gradients(dtype, name, number, request):
    """For one layer and for several that share it."""
    make, is_norm = MADE[name]
    if is_norm:
        request.getfixturevalue("norms")
    layers = [Layer(dtype, seed) for seed in range(number)]
    inputs = leaves(dtype, dtype)
    assert not is_saved(layers, [make(*inputs)])
    trained = [layer.lora_A for layer in layers]
    check_same(layers, lambda: make(*inputs), (*trained, *inputs))


@pytest.mark.parametrize("name", SAVED)
def test_any_other_x_is_saved(dtype, name):
    layer = Layer(dtype)
    inputs = leaves(dtype, dtype)
    assert is_saved([layer], [SAVED[name](*inputs)])
    check_same([layer], lambda: SAVED[name](*inputs), (layer.lora_A, inputs[0]))


def profiled_backward(ys, **options):
    with torch.profiler.profile(**options) as profiler:
        sum(y.sum() for y in ys).backward(retain_graph=True)
    return profiler.events()


def of_shared_norm(number):
    """The outputs of so many layers that share a norm's output, and their layers."""
    (h,) = leaves(BF16)
    layers = [Layer(BF16, seed) for seed in range(number)]
    x = rms_norm(h, torch.ones(IN, dtype=BF16))
    return [layer(x) for layer in layers], layers


@pytest.mark.usefixtures("norms")
def test_layers_that_share_compute_once_in_each_backward():
    counts = []
    for number in (1, 3):
        ys, _ = of_shared_norm(number)
        names = [[event.name for event in profiled_backward(ys)] for _ in range(2)]
        counts.append([of_one.count("aten::mul") for of_one in names])
    for one, three in zip(*counts, strict=True):
        assert three - one < 2 * 2  # the products of a norm, if both further layers made them


@pytest.mark.usefixtures("norms")
def test_nothing_that_was_computed_outlives_a_backward():
    (h,) = leaves(BF16)
    layers = [Layer(BF16, seed) for seed in range(2)]

    def outputs():
        x = rms_norm(h, torch.ones(IN, dtype=BF16))
        return [layer(x) for layer in layers]

    profiled_backward(outputs())  # makes the gradients
    ys = outputs()
    assert sum(event.self_cpu_memory_usage for event in profiled_backward(ys, profile_memory=True)) == 0


@pytest.mark.usefixtures("norms")
def test_a_backward_through_some_of_the_layers():
    ys, layers = of_shared_norm(3)
    expected = torch.autograd.grad(ys[1].sum(), layers[1].lora_A, retain_graph=True)
    for _ in range(3):
        assert torch.equal(*torch.autograd.grad(ys[1].sum(), layers[1].lora_A, retain_graph=True), *expected)


def test_an_edit_of_the_product_after_the_layer_changes_nothing():
    """x itself is not needed any more; what it was is known."""
    layer = Layer(FP32)
    gate, up = leaves(FP32, FP32)
    x = gate * up
    y = layer(x)
    (expected,) = torch.autograd.grad(y.sum(), layer.lora_A, retain_graph=True)
    x.detach().zero_()
    assert torch.equal(*torch.autograd.grad(y.sum(), layer.lora_A, retain_graph=True), expected)
    with torch.no_grad():
        gate.zero_()
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("what", ["x", "factor"])
def test_an_edit_before_the_layer(what):
    """Then x is not the product of what is kept, or what is kept is not what it was: x is saved."""
    layer = Layer(FP32)
    gate, up = leaves(FP32, FP32)
    act = gate.sin()
    x = act * up
    with torch.no_grad():
        (x if what == "x" else act).mul_(2)
    y = layer(x)
    (ours,) = torch.autograd.grad(y.sum(), layer.lora_A)
    (expected,) = torch.autograd.grad(layer(x.detach().clone()).sum(), layer.lora_A)
    assert torch.equal(ours, expected)


def test_saved_tensor_hooks_get_x():
    layer = Layer(FP32)
    gate, up = leaves(FP32, FP32)
    x = gate * up
    saved, _ = saved_by(lambda: layer(x))
    assert saved == addresses(x, layer.weight, layer.lora_A, layer.lora_B)


def test_factors_that_hooks_have_packed():
    layer = Layer(FP32)
    gate, up = leaves(FP32, FP32)
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        x = gate * up
    layer(x)
    assert not unpacked


def test_a_product_whose_graph_is_freed():
    layer = Layer(FP32)
    gate, up = leaves(FP32, FP32)
    x = gate.sin() * up
    x.sum().backward()
    y = layer(x)
    (ours,) = torch.autograd.grad(y.sum(), layer.lora_A)
    (expected,) = torch.autograd.grad(layer(x.detach()).sum(), layer.lora_A)
    assert torch.equal(ours, expected)


def test_a_cast_of_autocast_is_computed_again():
    layer = Layer(BF16)
    gate, up = leaves(FP32, FP32)
    found = []
    for make in (lambda: gate * up, lambda: (gate * up).clone()):
        with torch.autocast("cpu", BF16):
            y = layer(make(), BF16)
        found.append(gradients(y, layer.lora_A, gate, up))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize("make", [lambda gate, up: gate.sin() * up, lambda gate, up: up * (gate.sin() * up)])
def test_second_derivatives_by_the_product_itself(make):
    """Which a caller can ask for as long as he has it."""
    layer = Layer(FP64)
    gate, up = leaves(FP64, FP64)
    found = []
    for keeps in (True, False):
        x = make(gate, up)
        y = layer(x if keeps else x.clone()).sin().sum()
        first = torch.autograd.grad(y, (layer.lora_A, gate), create_graph=True)
        found.append(
            torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), (layer.lora_A, gate, up, x))
        )
    for ours, expected in zip(*found, strict=True):
        assert error(ours, expected) <= RELATIVE[FP64]
    x = make(gate, up)
    assert torch.autograd.gradgradcheck(lambda gate, up, A: layer(make(gate, up)), (gate, up, layer.lora_A))


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(dtype, use_reentrant):
    layer = Layer(dtype)
    gate, up = leaves(dtype, dtype)

    def block(gate, up):
        return layer(torch.nn.functional.silu(gate) * up)

    y = checkpoint(block, gate, up, use_reentrant=use_reentrant)
    ours = gradients(y, layer.lora_A, gate) if not use_reentrant else None
    if ours is None:
        y.float().sin().sum().backward()
        ours = layer.lora_A.grad, gate.grad
    expected = gradients(block(gate, up), layer.lora_A, gate)
    for mine, other in zip(ours, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.slow
@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize("number", [1, 3])
def test_compiled_autograd(number):
    for _ in range(2):  # the second backward is the compiled one of the first
        ys, layers = of_shared_norm(number)
        (expected, *_) = gradients(sum(ys), layers[0].lora_A)
        ys, layers = of_shared_norm(number)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            sum(ys).float().sin().sum().backward()
        assert torch.equal(layers[0].lora_A.grad, expected)
