"""DoRA's part of a layer against its definition in fp64: outputs, gradients, and what is kept for them."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mica.ops import dora, recompute
from mica.ops.linear import linear
from mica.ops.operator import call_counts
from mica.paths.products import multiplies_itself
from tests.support import definition
from tests.support.linear_calls import addresses, kept_by
from tests.support.oracle import dropout_mask
from tests.support.tolerances import RELATIVE, error

TOKENS, IN, OUT, RANK, SCALING, P = 7, 12, 10, 3, 0.5, 0.3
ZERO_ROW, ZERO_MAGNITUDE = 4, 2
SEED = torch.tensor([2**40 + 5])
FP32, BF16 = torch.float32, torch.bfloat16
with_and_without_dropout = pytest.mark.parametrize("dropout_p", [0.0, P])
pytestmark = pytest.mark.usefixtures("kept_y")


@pytest.fixture(params=[0, 2**17], ids=["y is kept", "z is kept"])
def kept_y(request, monkeypatch):
    """A large x, or a small one."""
    monkeypatch.setattr(recompute, "MIN_NUMBERS", request.param)
    return request.param == 0


class Layer:
    """A layer whose W and B have a row of zeros; one row's magnitude is 0."""

    def __init__(self, dtype=FP32, has_bias=True):
        generator = torch.Generator().manual_seed(0)
        wide = torch.promote_types(dtype, FP32)

        def randn(*shape, dtype=wide):
            return torch.randn(shape, generator=generator).to(dtype)

        self.x = randn(2, TOKENS, IN, dtype=dtype).requires_grad_()
        self.weight = randn(OUT, IN, dtype=dtype)
        self.bias = randn(OUT, dtype=dtype) if has_bias else None
        self.lora_A, self.lora_B = randn(RANK, IN), randn(OUT, RANK)
        for row in (self.weight, self.lora_B):
            row[ZERO_ROW] = 0
        exact = self.weight.double() + SCALING * self.lora_B.double() @ self.lora_A.double()
        self.norms = exact.norm(dim=1)
        self.magnitude = (self.norms * torch.linspace(0.8, 1.3, OUT)).to(wide)
        self.magnitude[ZERO_MAGNITUDE] = 0
        for trained in self.trained:
            trained.requires_grad_()

    @property
    def trained(self):
        return self.lora_A, self.lora_B, self.magnitude

    def linear(self, x, bias=None, dropout_p=0.0):
        factors = self.weight, self.lora_A, self.lora_B, SCALING
        return linear(x, *factors, bias, None, dropout_p, SEED, None, True)

    def __call__(self, dropout_p=0.0, x=None):
        x = self.x if x is None else x
        operands = self.weight, self.lora_A, self.lora_B
        norms = dora.row_norms(*operands, SCALING)
        if not dropout_p:
            unscaled = partial(self.linear, bias=self.bias)
            return dora.scaled(unscaled, x, operands, self.magnitude, norms, self.bias)
        y = self.linear(x, self.bias, dropout_p)
        return dora.corrected(self.linear, x, operands, self.magnitude, norms, y, dropout_p, SEED)

    def exact(self, dropout_p=0.0):
        """y and the gradients in fp64."""
        x, *trained = (t.detach().double().requires_grad_() for t in (self.x, *self.trained))
        mask = dropout_mask(x, dropout_p, SEED)
        bias = 0.0 if self.bias is None else self.bias.double()
        y = definition.dora(x, self.weight.double(), *trained[:2], SCALING, trained[2], bias, mask)
        return y, *gradients(y, x, *trained)

    def ours(self, dropout_p=0.0):
        y = self(dropout_p)
        return y, *gradients(y, self.x, *self.trained)


def gradients(y, *inputs, **options):
    return torch.autograd.grad((y * weights_of(y)).sum(), inputs, **options)


def weights_of(y):
    return torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)


def assert_exact(ours, exact, dtype):
    for mine, theirs in zip(ours, exact, strict=True):
        assert error(mine, theirs) <= RELATIVE[dtype]


@with_and_without_dropout
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", RELATIVE)
def test_outputs_and_gradients(dtype, has_bias, dropout_p, kept_y, way):
    """Those of a row without a norm, and of a magnitude of 0, too."""
    if way == "kernels" and dtype is torch.float64:
        pytest.skip("no kernels for fp64")
    call_counts.clear()
    layer = Layer(dtype, has_bias)
    ours, exact = layer.ours(dropout_p), layer.exact(dropout_p)
    is_lost = kept_y and not dropout_p and (has_bias or dtype is torch.float16)
    if is_lost:  # y − bias = 0 says nothing of z
        assert ours[-1][ZERO_MAGNITUDE].abs() <= 1e-3 * exact[-1].abs().max() or has_bias
        ours[-1][ZERO_MAGNITUDE] = exact[-1][ZERO_MAGNITUDE]
    assert_exact(ours, exact, dtype)
    assert ours[0].dtype == dtype
    assert [grad.dtype for grad in ours[2:]] == [trained.dtype for trained in layer.trained]
    assert call_counts["grad_magnitude"] == 1
    assert call_counts["grad_magnitude_kernels"] == (way == "kernels")


@pytest.mark.parametrize("frozen", range(3))
@with_and_without_dropout
def test_each_factor_and_the_magnitude_may_be_frozen(frozen, dropout_p):
    layer = Layer(has_bias=False)
    expected = [grad for i, grad in enumerate(layer.exact(dropout_p)[2:]) if i != frozen]
    layer.trained[frozen].requires_grad_(False)
    y = layer(dropout_p)
    (y * weights_of(y)).sum().backward()
    assert layer.trained[frozen].grad is None
    grads = [trained.grad for trained in layer.trained if trained.grad is not None]
    assert_exact(grads, expected, FP32)


def test_an_edited_y_is_no_error():
    layer = Layer()
    y = layer().relu_()
    found = gradients(y, *layer.trained)
    A, B, magnitude = (trained.detach().clone().requires_grad_() for trained in layer.trained)
    exact = definition.dora(layer.x, layer.weight, A, B, SCALING, magnitude, layer.bias).relu()
    expected = gradients(exact, A, B, magnitude)
    assert_exact(found, expected, FP32)


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "magnitude", "x"])
def test_an_edited_operand_is_an_error(name):
    layer = Layer()
    x = layer.x * 1
    y = layer(x=x)
    with torch.no_grad():
        (x if name == "x" else getattr(layer, name)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(y, *layer.trained)


@with_and_without_dropout
def test_a_checkpoint_computes_the_same_and_keeps_nothing(dropout_p):
    layer = Layer()
    y = checkpoint(layer, dropout_p, use_reentrant=False)
    y.relu_()
    expected = gradients(layer(dropout_p).relu(), *layer.trained)
    found = gradients(y, *layer.trained)
    assert_exact(found, expected, FP32)


def test_what_is_kept(kept_y):
    """Beside x, the operands and small ones y alone, or z; with dropout z, and drop(x) is computed again."""
    layer = Layer(has_bias=False)
    small = {OUT, IN * RANK, OUT * RANK, OUT * IN, 2 * TOKENS * RANK, 1}

    def large(dropout_p):
        found, y = kept_by(lambda: layer(dropout_p))
        own = addresses(layer.x)
        return {t.data_ptr(): t for t in found if t.numel() not in small and t.data_ptr() not in own}, y

    saved, y = large(0.0)
    assert [tensor.shape for tensor in saved.values()] == [y.shape]
    assert (set(saved) == addresses(y)) == kept_y


@with_and_without_dropout
def test_second_derivatives_and_compiled_code_follow_the_formula(dropout_p):
    layer = Layer(torch.float64, has_bias=False)
    with torch.no_grad():
        layer.magnitude[ZERO_MAGNITUDE] = 1

    def function(x, lora_A, magnitude):
        layer.lora_A, layer.magnitude = lora_A, magnitude
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dora, "row_norms", lambda *_: fixed)
            return layer(dropout_p, x)

    fixed = dora.row_norms(layer.weight, layer.lora_A, layer.lora_B, SCALING)
    inputs = layer.x, layer.lora_A, layer.magnitude
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    followed = gradients(layer(dropout_p), *inputs, create_graph=True)
    assert_exact(followed, gradients(layer(dropout_p), *inputs), torch.float64)
    compiled = torch.compile(lambda: layer(dropout_p), backend="aot_eager", fullgraph=True)
    assert_exact(gradients(compiled(), *inputs), gradients(layer(dropout_p), *inputs), torch.float64)


# -- norms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (FP32, 3e-7), (BF16, 1e-4), (torch.float16, 1e-4)]
)
@pytest.mark.parametrize("update", [0.1, 1.0, "cancels"])
def test_norms(dtype, tolerance, update):
    """Rows that the update nearly cancels are as exact as the others."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, FP32)
    lora_A, B = (torch.randn(*shape, generator=generator) for shape in ((4, 96), (2048, 4)))
    weight = torch.randn(2048, 96, generator=generator)
    if update == "cancels":
        weight[::3] = -0.99 * SCALING * B[::3] @ lora_A
    else:
        B *= update * weight.norm() / (SCALING * B @ lora_A).norm()
    B[5] = weight[5] = 0
    weight, lora_A, B = weight.to(dtype), lora_A.to(wide), B.to(wide)
    exact = (weight.double() + SCALING * B.double() @ lora_A.double()).norm(dim=1)
    norms = dora.row_norms(weight, lora_A, B, SCALING)
    assert norms.dtype == wide
    assert norms[5] == torch.inf
    assert exact[5] == 0
    exact[5] = norms[5] = 1
    if update == "cancels":
        tolerance *= 20
    elif dtype == BF16 and multiplies_itself(weight):
        tolerance = 1e-3  # A is rounded, and so is its product: seen are 8e-4 with these few columns
    assert (norms.double() / exact - 1).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", RELATIVE)
def test_a_fresh_adapter_scales_nothing(dtype):
    rows, columns = 65_536, 8  # PyTorch's fp64 root of a square is another number in 1 row of 10,000
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = torch.promote_types(dtype, FP32)
    magnitude = torch.linalg.norm(weight.to(wide), dim=1)
    norms = dora.row_norms(weight, torch.randn(4, columns), torch.zeros(rows, 4), SCALING)
    assert dora.factor_of(magnitude, norms).eq(1).all()
