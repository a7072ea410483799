import pytest
import torch
from oracle import DTYPES, problem, solve
from tolerances import RELATIVE, error

from mica import reference

SHAPES = [(1, 1, 1, 1), (5, 7, 3, 2), (33, 17, 65, 5), (2100, 19, 23, 16)]


def compute(p, compute_dtype):
    y = reference.forward(p.x, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias, compute_dtype)
    g = reference.grad_h(p.grad_output, p.lora_B, p.scaling, compute_dtype or p.x.dtype)
    return {
        "y": y,
        "grad_x": reference.grad_x(p.grad_output, p.weight, g, p.lora_A),
        "grad_A": reference.grad_a(g, p.x),
    }


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize(("tokens", "in_features", "out_features", "rank"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_the_dense_oracle(
    dtype, adapter_dtype, compute_dtype, tokens, in_features, out_features, rank, bias
):
    p = problem((tokens,), in_features, out_features, rank, dtype, adapter_dtype, bias)
    expected = solve(p)
    for name, actual in compute(p, compute_dtype).items():
        assert error(actual, expected[name]) <= RELATIVE[dtype], name


@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
def test_dtypes_of_the_results(dtype, adapter_dtype, compute_dtype):
    result = compute(problem((4,), 6, 5, 2, dtype, adapter_dtype), compute_dtype)
    assert result["y"].dtype == result["grad_x"].dtype == dtype
    assert result["grad_A"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grad_a_is_accumulated_and_returned_in_fp32(dtype):
    """Within fp32 round-off of the exact product of the 16-bit factors, over more than one chunk."""
    g, x = torch.randn(3000, 4).to(dtype), torch.randn(3000, 9).to(dtype)
    assert error(reference.grad_a(g, x), g.double().t() @ x.double()) <= RELATIVE[torch.float32]


def test_inputs_are_left_alone():
    p = problem((6,), 8, 5, 3, torch.float32)
    before = [t.clone() for t in (p.x, p.weight, p.lora_A, p.lora_B, p.bias, p.grad_output)]
    compute(p, None)
    reference.merge(p.weight, p.lora_A, p.lora_B, p.scaling)
    for old, new in zip(before, (p.x, p.weight, p.lora_A, p.lora_B, p.bias, p.grad_output), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merge_rounds_once(dtype):
    p = problem((1,), 40, 30, 4, dtype, torch.promote_types(dtype, torch.float32))
    exact = p.weight.double() + p.scaling * (p.lora_B.double() @ p.lora_A.double())
    merged = reference.merge(p.weight, p.lora_A, p.lora_B, p.scaling)
    assert merged.dtype == dtype
    spacing = torch.finfo(dtype).eps * exact.abs()
    # half a unit in the last place for the rounding, the rest for the fp32 product below it
    assert ((merged.double() - exact).abs() <= 0.5 * spacing + 2e-6 * (dtype != torch.float64) + 1e-14).all()


def test_embedding_and_its_gradient():
    indices = torch.tensor([3, 0, 3, 6, 3])
    lora_A = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    lora_B = torch.randn(5, 2, dtype=torch.float64)
    dense = 0.5 * (lora_B @ lora_A)
    out = reference.embedding(indices, lora_A.detach(), lora_B, 0.5)
    assert error(out, dense.t()[indices]) <= RELATIVE[torch.float64]
    grad_output = torch.randn(5, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(dense.t()[indices], lora_A, grad_output)
    actual = reference.grad_a_embedding(grad_output, indices, lora_B, 0.5, 7)
    assert error(actual, expected) <= RELATIVE[torch.float64]


def test_dropout_keeps_the_asked_share_independently():
    """Rows, columns and neighbours: shares and correlations within five standard errors of chance."""
    rows, columns, p = 1024, 768, 0.3
    keep = reference.dropout_keep(torch.tensor([1234]), rows, columns, p).double()
    deviation = (p * (1 - p)) ** 0.5
    centred = (keep - (1 - p)) / deviation
    assert abs(centred.mean()) <= 5 / (rows * columns) ** 0.5
    assert centred.mean(0).abs().max() <= 5 / rows**0.5
    assert centred.mean(1).abs().max() <= 5 / columns**0.5
    for shifted in (
        centred[1:] * centred[:-1],
        centred[:, 1:] * centred[:, :-1],
        centred[:512] * centred[512:],
    ):
        assert abs(shifted.mean()) <= 5 / shifted.numel() ** 0.5
    other = reference.dropout_keep(torch.tensor([1235]), rows, columns, p).double()
    assert abs((centred * (other - (1 - p)) / deviation).mean()) <= 5 / (rows * columns) ** 0.5
    assert not torch.equal(
        reference.dropout_keep(torch.tensor([1234 + 2**40]), rows, columns, p), keep.bool()
    )


def test_dropout_is_a_function_of_seed_row_and_column():
    seed = torch.tensor([-(2**62) + 5])
    keep = reference.dropout_keep(seed, 50, 40, 0.5)
    assert torch.equal(reference.dropout_keep(seed, 20, 30, 0.5, first_row=30), keep[30:, :30])
    assert reference.dropout_keep(seed, 50, 40, 0.0).all()
    assert (reference.dropout_keep(seed, 50, 40, 0.2) | ~keep).all()  # what p = 0.5 keeps, 0.2 keeps too


@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
def test_dropout_agrees_with_autograd_on_the_masked_input(dtype, adapter_dtype, compute_dtype):
    """More tokens than one chunk of `grad_a`: the mask's rows go on counting."""
    p = problem((2100,), 19, 23, 4, dtype, adapter_dtype)
    seed, rate = torch.tensor([6]), 0.25
    x, lora_A = (t.detach().double().requires_grad_() for t in (p.x, p.lora_A))
    dropped = x * reference.dropout_keep(seed, 2100, 19, rate) / (1 - rate)
    y = x @ p.weight.double().t() + p.bias.double()
    y = y + p.scaling * dropped @ lora_A.t() @ p.lora_B.double().t()
    dx, dA = torch.autograd.grad(y, (x, lora_A), p.grad_output.double())
    dtype_ = compute_dtype or dtype
    actual = reference.forward(
        p.x, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias, compute_dtype, rate, seed
    )
    assert error(actual, y) <= RELATIVE[dtype]
    backward = reference.linear_backward(
        p.grad_output, p.x, p.weight, p.lora_A, p.lora_B, p.scaling, dtype_, rate, seed
    )
    for value, expected in zip(backward, (dx, dA), strict=True):
        assert error(value, expected) <= RELATIVE[dtype]
