"""DoRA's part of a layer against its definition in fp64: outputs, gradients, and what is kept for them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bench.measure.memory import alive_bytes
from mica.ops import dora, recompute
from mica.ops.linear import linear
from mica.ops.operator import call_counts
from mica.paths.products import multiplies_itself
from tests.support import definition, kept_layers
from tests.support.linear_calls import addresses, kept_by
from tests.support.oracle import dropout_mask
from tests.support.tolerances import RELATIVE, error

TOKENS, IN, OUT, RANK, SCALING, P = 7, 12, 10, 3, 0.5, 0.3
ZERO_ROW, ZERO_MAGNITUDE = 4, 2
SEED = torch.tensor([2**40 + 5])
FP32, BF16 = torch.float32, torch.bfloat16
with_and_without_dropout = pytest.mark.parametrize("dropout_p", [0.0, P])
BIASES = ["none", "added to z", "added to y"]


@pytest.fixture(autouse=True)
def _is_never_small(monkeypatch):
    monkeypatch.setattr(recompute, "MIN_NUMBERS", 0)


class Layer:
    """A layer whose W and B have a row of zeros; one row's magnitude is 0."""

    def __init__(self, dtype=FP32, bias="added to z", out=OUT, tokens=TOKENS):
        generator = torch.Generator().manual_seed(0)
        wide = torch.promote_types(dtype, FP32)

        def randn(*shape, dtype=wide):
            return torch.randn(shape, generator=generator).to(dtype)

        self.x = randn(2, tokens, IN, dtype=dtype).requires_grad_()
        self.weight = randn(out, IN, dtype=dtype)
        self.bias = None if bias == "none" else randn(out, dtype=dtype)
        self.has_bias = bias == "added to z"
        self.lora_A, self.lora_B = randn(RANK, IN), randn(out, RANK)
        for row in (self.weight, self.lora_B):
            row[ZERO_ROW] = 0
        exact = self.weight.double() + SCALING * self.lora_B.double() @ self.lora_A.double()
        self.norms = exact.norm(dim=1)
        self.magnitude = (self.norms * torch.linspace(0.8, 1.3, out)).to(wide)
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
            z = self.linear(x, self.bias if self.has_bias else None)
            return dora.scaled(z, self.magnitude, norms, self.bias, self.has_bias)
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
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", RELATIVE)
def test_outputs_and_gradients(dtype, bias, dropout_p, way):
    """Those of a row without a norm, and of a magnitude of 0, too."""
    if way == "kernels" and dtype is torch.float64:
        pytest.skip("no kernels for fp64")
    call_counts.clear()
    layer = Layer(dtype, bias)
    ours, exact = layer.ours(dropout_p), layer.exact(dropout_p)
    assert_exact(ours, exact, dtype)
    assert ours[0].dtype == dtype
    assert [grad.dtype for grad in ours[2:]] == [trained.dtype for trained in layer.trained]
    assert call_counts["grad_magnitude"] == 1
    assert call_counts["grad_magnitude_kernels"] == (way == "kernels")


@pytest.mark.parametrize("frozen", range(3))
@with_and_without_dropout
def test_each_factor_and_the_magnitude_may_be_frozen(frozen, dropout_p):
    layer = Layer(bias="none")
    expected = [grad for i, grad in enumerate(layer.exact(dropout_p)[2:]) if i != frozen]
    layer.trained[frozen].requires_grad_(False)
    y = layer(dropout_p)
    (y * weights_of(y)).sum().backward()
    assert layer.trained[frozen].grad is None
    grads = [trained.grad for trained in layer.trained if trained.grad is not None]
    assert_exact(grads, expected, FP32)


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16])
@pytest.mark.parametrize("size", [10.0, 100.0])
@pytest.mark.parametrize("g", [1.0, 0.01])
def test_the_gradient_of_m_under_a_large_bias(dtype, size, g):
    """A bias of 16 bits hides z in y; in 32 bits it takes some digits, as it does in PEFT's formula."""
    layer = Layer(dtype, "added to z" if dtype is FP32 else "added to y")
    layer.bias.mul_(size)
    layer.magnitude.detach().copy_(g * layer.norms)
    found, expected = layer.ours()[-1], layer.exact()[-1]
    assert error(found, expected) <= RELATIVE[dtype] * (size if dtype is FP32 else 1)


def test_an_edited_y_is_no_error():
    """However it is edited: it is not kept."""
    layer = Layer()
    y = layer().relu_()
    y.data.mul_(3)
    found = gradients(y, *layer.trained)
    A, B, magnitude = (trained.detach().clone().requires_grad_() for trained in layer.trained)
    exact = definition.dora(layer.x, layer.weight, A, B, SCALING, magnitude, layer.bias).relu()
    weights = (weights_of(y) * (exact > 0)).detach()
    expected = torch.autograd.grad((exact * weights).sum(), (A, B, magnitude))
    assert_exact(found, expected, FP32)


@pytest.mark.parametrize(
    ("name", "called"),
    [("lora_A", "lora_A"), ("lora_B", "lora_B"), ("magnitude", "magnitude"), ("bias", "bias"), ("x", "x")],
)
def test_an_edited_operand_is_an_error(name, called):
    layer = Layer()
    x = layer.x * 1
    y = layer(x=x)
    with torch.no_grad():
        (x if name == "x" else getattr(layer, name)).add_(1)
    with pytest.raises(RuntimeError, match=f"{called}.*has been modified by an inplace operation"):
        gradients(y, *layer.trained)


def test_edited_weights_matter_where_x_needs_no_gradient():
    """Neither W nor, of a frozen B, A is needed: the gradients are those of the forward."""
    layer = Layer()
    layer.lora_B.requires_grad_(False)
    expected = layer.exact()[-1]
    y = layer(x=layer.x.detach()).relu_()
    with torch.no_grad():
        layer.weight.add_(1)
    exact = definition.dora(
        layer.x.detach(), layer.weight - 1, layer.lora_A, layer.lora_B, SCALING, layer.magnitude, layer.bias
    )
    expected = gradients(exact.relu(), layer.lora_A, layer.magnitude)
    assert_exact(gradients(y, layer.lora_A, layer.magnitude), expected, FP32)


@with_and_without_dropout
def test_a_checkpoint_computes_the_same_and_keeps_nothing(dropout_p):
    layer = Layer()
    y = checkpoint(layer, dropout_p, use_reentrant=False)
    y.relu_()
    expected = gradients(layer(dropout_p).relu(), *layer.trained)
    found = gradients(y, *layer.trained)
    assert_exact(found, expected, FP32)


def test_what_is_kept():
    """Beside x, the operands and small ones z alone; with dropout z', and drop(x) is computed again."""
    layer = Layer(bias="none")
    small = {OUT, IN * RANK, OUT * RANK, OUT * IN, 2 * TOKENS * RANK, 1}
    saved, y = kept_by(layer)
    own = {*addresses(layer.x), *addresses(y)}
    (z,) = {t.data_ptr(): t for t in saved if t.numel() not in small and t.data_ptr() not in own}.values()
    assert z.shape == y.shape


def _attended(q, k, v):
    q, k, v = (tensor.view(1, -1, 2, kept_layers.IN // 2).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, kept_layers.IN)


USES = {  # what makes x from y of so many layers, and how many tensors like x are kept beside each z
    "gated MLP": (lambda gate, up: F.silu(gate) * up, 2, 0),
    "one product for G and U": (lambda joint: kept_layers.gated(*joint.chunk(2, dim=-1)), 1, 0),
    "GELU": (F.gelu, 1, 0),
    "a square": (torch.square, 1, 0),
    "attention": (_attended, 3, 1),  # its output
    "one product for q, k and v": (lambda joint: _attended(*joint.split(kept_layers.IN, dim=-1)), 1, 1),
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("use", USES)
def test_autograd_keeps_no_output_beside_z(use, bias):
    """A layer that takes x has the nodes before it compute y again, with the same bits."""
    function, number, expected = USES[use]
    joint = {"one product for G and U": 2, "one product for q, k and v": 3}.get(use, 1)
    layers = [Layer(bias=bias, out=joint * kept_layers.IN, tokens=50) for _ in range(number)]
    after = kept_layers.Layer()

    def forward(change=lambda x: x):
        return after(change(function(*[layer().flatten(0, 1) for layer in layers])))

    inputs = [layer.magnitude for layer in layers]
    kept_layers.as_saved(lambda change: gradients(forward(change), *inputs))
    size = layers[0].x[..., 0].numel() * kept_layers.IN * 4
    kept = (alive_bytes(forward) - forward().nbytes) // size
    assert kept == number * joint + expected


@with_and_without_dropout
def test_second_derivatives_and_compiled_code_follow_the_formula(dropout_p):
    layer = Layer(torch.float64, bias="none")
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


@pytest.mark.parametrize(("dtype", "least"), [(FP32, 0.0024), (BF16, 0.077)])
def test_compiled_norms_of_cancelled_rows_are_bounded(dtype, least):
    """There, as on a GPU, no row is looked at."""
    generator = torch.Generator().manual_seed(1)
    lora_A, B = (torch.randn(*shape, generator=generator) for shape in ((4, 512), (300, 4)))
    update = SCALING * B.double() @ lora_A.double()
    left = torch.logspace(0, -5, 300, dtype=torch.float64)[:, None]  # of a row
    weight = (-update * (1 + left)).to(dtype)
    exact = (weight.double() + update).norm(dim=1)
    own = weight.double().norm(dim=1)
    norms = torch.compile(dora.row_norms, backend="eager")(weight, lora_A, B, SCALING).double()
    assert norms.isfinite().all()
    if dtype is FP32 or multiplies_itself(weight):
        assert (norms >= least * own).all()
    assert (norms <= 1.5 * torch.maximum(exact, least * own)).all()
    is_kept = exact >= own / 3
    assert (norms / exact - 1).abs()[is_kept].max() <= 2e-2
