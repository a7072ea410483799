"""An A that kernels read again and again is rounded before the launches: when, and that no bit differs."""

import pytest
import torch

from mica.kernels import launching
from mica.ops import mica_down_projection, mica_linear
from mica.paths import triton_path
from tests.support.kernel_cases import DEVICE
from tests.support.oracle import problem, solve
from tests.support.tolerances import RELATIVE, error

pytestmark = pytest.mark.usefixtures("on_kernels")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RANK, TOKENS = 64, 40  # the rule's own number of tokens would take the interpreter long


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(triton_path, "MANY_TOKENS", TOKENS)


def layer(out_features=40, rank=RANK, dtype=BF16, tokens=TOKENS):
    p = problem((tokens,), 48, out_features, rank, dtype, FP32)
    for name in ("x", "weight", "lora_A", "lora_B", "bias", "grad_output"):
        setattr(p, name, getattr(p, name).to(DEVICE).contiguous())  # as descriptors want them
    return p


def of_linear(p, dropout_p=0.0):
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    y = mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias, dropout_p=dropout_p, seed=seed)
    y.backward(p.grad_output)
    return y.detach(), x.grad, lora_A.grad


def of_factor(p, dropout_p=0.4):
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    h = mica_down_projection(x, lora_A, p.scaling, dropout_p=dropout_p, seed=torch.tensor([5], device=DEVICE))
    h.backward(torch.ones_like(h))
    return h.detach(), x.grad, lora_A.grad


CALLS = {
    "linear": of_linear,
    "linear with dropout": lambda p: of_linear(p, 0.4),
    "factor": of_factor,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_no_bit_differs(monkeypatch, launched, call, dtype):
    """And kernels are launched with what was rounded: at first, and by the plans of the first call."""
    results = {}
    for tokens in (TOKENS + 1, TOKENS):
        monkeypatch.setattr(triton_path, "MANY_TOKENS", tokens)
        launching.clear()
        for _ in range(2):
            torch.manual_seed(0)
            p = layer(dtype=dtype)
            launched.clear()
            results.setdefault(tokens, []).append(CALLS[call](p))
            kinds = {kind for _, kind in launched if kind}
            assert (FP32 in kinds) == (tokens > TOKENS)
            assert kinds <= {FP32, dtype}
    plain, *others = (*results[TOKENS + 1], *results[TOKENS])
    for other in others:
        assert all(map(torch.equal, plain, other))


@pytest.mark.parametrize("form", ["split", "fused", "descriptor"])
def test_no_bit_differs_in_another_form(monkeypatch, choose_form, launched, form):
    choose_form(form)
    p = layer()
    rounded = of_linear(p)
    assert FP32 not in {kind for _, kind in launched if kind}
    monkeypatch.setattr(triton_path, "MANY_TOKENS", TOKENS + 1)
    assert all(map(torch.equal, rounded, of_linear(p)))


def test_a_write_that_no_version_counts_is_seen():
    p = layer()
    for _ in range(2):
        of_linear(p)
    version = p.lora_A._version
    p.lora_A.data.mul_(-2.0)
    assert p.lora_A._version == version
    expected = solve(p)
    for name, value in zip(("y", "grad_x", "grad_A"), of_linear(p), strict=True):
        assert error(value, expected[name]) <= RELATIVE[BF16], name


@pytest.mark.parametrize(
    ("rank", "tokens", "a_dtype", "dtype", "is_rounded"),
    [
        (64, 2048, FP32, BF16, True),
        (256, 8192, FP32, FP16, True),
        (63, 8192, FP32, BF16, False),
        (64, 2047, FP32, BF16, False),
        (64, 8192, BF16, BF16, False),
        (64, 8192, BF16, FP16, False),
        (64, 8192, FP32, FP32, False),
        (64, 8192, BF16, FP32, False),
    ],
)
def test_where_it_is_read_often_enough(monkeypatch, rank, tokens, a_dtype, dtype, is_rounded):
    monkeypatch.undo()
    lora_A = torch.randn(rank, 4).to(a_dtype)
    operand = triton_path.as_operand(lora_A, tokens, dtype)
    assert operand.dtype == (dtype if is_rounded else a_dtype)
    assert (operand is not lora_A) == is_rounded


def test_the_gradient_has_the_dtype_of_the_parameter():
    _, _, grad_A = of_linear(layer())
    assert grad_A.dtype == FP32
