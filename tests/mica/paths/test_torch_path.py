import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mica.paths import products, torch_path
from mica.paths.products import addmm
from tests.support.oracle import DTYPES, problem, solve
from tests.support.tolerances import RELATIVE, error

SHAPES = [(1, 1, 1, 1), (5, 7, 3, 2), (33, 17, 65, 5), (2100, 19, 23, 16)]


def compute(p, compute_dtype):
    y = torch_path.linear(p.x, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias, compute_dtype)
    g = torch_path.grad_h(p.grad_output, p.lora_B, p.scaling, compute_dtype or p.x.dtype)
    return {
        "y": y,
        "grad_x": torch_path.grad_x(p.grad_output, p.weight, g, p.lora_A),
        "grad_A": torch_path.grad_a(g, p.x),
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
    assert error(torch_path.grad_a(g, x), g.double().t() @ x.double()) <= RELATIVE[torch.float32]


def stated_forward(p, dtype):
    """`torch_path.linear` as its docstring states it, no step left out: what its bits must be."""
    h = addmm(None, (p.x.to(dtype), (p.lora_A * p.scaling).to(dtype).t()))
    if dtype == p.x.dtype:
        return addmm(p.bias, (p.x, p.weight.t()), (h, p.lora_B.to(dtype).t()))
    y, wide = addmm(p.bias, (p.x, p.weight.t())), torch.promote_types(p.x.dtype, dtype)
    return addmm(y.to(wide), (h.to(wide), p.lora_B.to(wide).t())).to(p.x.dtype)


def stated_backward(p, dtype):
    """`torch_path.linear_backward` in the same way; dA in chunks of 1024 tokens where x or g is cast."""
    g = addmm(None, (p.grad_output.to(dtype), (p.lora_B * p.scaling).to(dtype)))
    if dtype == p.x.dtype:
        dx = addmm(None, (p.grad_output, p.weight), (g, p.lora_A.to(dtype)))
    else:
        dx = addmm(None, (p.grad_output, p.weight))
        dx = dx + addmm(None, (g, p.lora_A.to(dtype))).to(dx.dtype)
    wide = torch.promote_types(torch.promote_types(dtype, p.x.dtype), torch.float32)
    step = len(p.x) if dtype == p.x.dtype == wide else 1024
    parts = zip(g.split(max(1, step)), p.x.split(max(1, step)), strict=True)
    (g_part, x_part), *others = [(g_part.to(wide).t(), x_part.to(wide)) for g_part, x_part in parts]
    dA = g_part @ x_part
    for g_part, x_part in others:
        dA = torch.addmm(dA, g_part, x_part)
    return dx, dA.to(p.lora_A.dtype)


def assert_same_bits(p, compute_dtype, stated_dtype):
    """With factors that lie dense, as parameters do: what BLAS gives depends on where rows begin."""
    p.lora_A, p.lora_B = p.lora_A.contiguous(), p.lora_B.contiguous()
    operands = p.weight, p.lora_A, p.lora_B, p.scaling
    y = torch_path.linear(p.x, *operands, p.bias, compute_dtype)
    assert torch.equal(y, stated_forward(p, stated_dtype))
    actual = torch_path.linear_backward(p.grad_output, p.x, *operands, compute_dtype or p.x.dtype)
    for value, expected in zip(actual, stated_backward(p, stated_dtype), strict=True):
        assert torch.equal(value, expected)
        assert value.dtype == expected.dtype


SCALINGS = [1.0, 2.0, -0.125, 1 / 3, 32 / 128**0.5, 0.0]  # 32 / sqrt(128): as rslora has it
MANY = products.FEW_TO_ROUND + 1


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features", "rank"),
    [(MANY, 31, 23, 5), (1100, 9, 13, 16)],
)
def test_short_cuts_change_no_bit(
    dtype, adapter_dtype, compute_dtype, scaling, tokens, in_features, out_features, rank
):
    p = problem((tokens,), in_features, out_features, rank, dtype, adapter_dtype, scaling=scaling)
    assert_same_bits(p, compute_dtype, compute_dtype or dtype)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("scaling", [2.0, 2.0**-10])
def test_numbers_below_the_normal_ones_of_float16_are_scaled_before_they_are_rounded(scaling):
    p = problem((MANY,), 31, 23, 5, torch.float16, torch.float32, scaling=scaling)
    for factor in (p.lora_A, p.lora_B):
        factor *= 1e-5
    assert_same_bits(p, None, torch.float16)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features", "rank"),
    [(0, 6, 5, 2), (1, 31, 23, 40), (MANY - 1, 31, 23, 5)],
)
def test_few_tokens_are_computed_in_fp32_where_masters_are(
    dtype, adapter_dtype, compute_dtype, scaling, tokens, in_features, out_features, rank
):
    p = problem((tokens,), in_features, out_features, rank, dtype, adapter_dtype, scaling=scaling)
    stated = compute_dtype or dtype
    if adapter_dtype == torch.float32 and products.has_native(dtype):
        stated = torch.float32
    assert_same_bits(p, compute_dtype, stated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_tokens_are_nearer_to_the_oracle_than_with_rounded_masters(monkeypatch, dtype):
    monkeypatch.setattr(products, "has_native", lambda dtype: True)
    closer = {"y": [], "grad_x": [], "grad_A": []}
    for _ in range(20):
        p = problem((8,), 64, 48, 16, dtype, torch.float32, scaling=1 / 3)
        oracle, operands = solve(p), (p.weight, p.lora_A, p.lora_B, p.scaling)
        y = torch_path.linear(p.x, *operands, p.bias)
        dx, dA = torch_path.linear_backward(p.grad_output, p.x, *operands, dtype)
        rounded = dict(zip(oracle, (stated_forward(p, dtype), *stated_backward(p, dtype)), strict=True))
        for (name, value), stated in zip(
            {"y": y, "grad_x": dx, "grad_A": dA}.items(), rounded.values(), strict=True
        ):
            closer[name].append(error(value, oracle[name]) - error(stated, oracle[name]))
    assert all(sum(values) < 0.0 for values in closer.values())


class _Calls(TorchDispatchMode):
    """What PyTorch computes, without views, and the most numbers that one call returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.names.append(function._schema.name.removeprefix("aten::"))
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("scaling", [1.0, 2.0, 1 / 3])
def test_few_tokens_take_three_products_and_nothing_else(scaling):
    p = problem((2,), 40, 30, 16, torch.float32, bias=False, scaling=scaling)
    operands = p.weight, p.lora_A, p.lora_B, p.scaling
    with _Calls() as forward:
        torch_path.linear(p.x, *operands)
    with _Calls() as backward:
        torch_path.linear_backward(p.grad_output, p.x, *operands, torch.float32)
    scaled = [] if scaling == 1.0 else ["mul_"] if scaling == 2.0 else ["mul"]
    # a power of two is the last product's own factor
    assert sorted(forward.names) == sorted(["mm", "mm", "addmm_", *(["mul"] if scaling == 1 / 3 else [])])
    assert sorted(backward.names) == sorted(["mm", "mm", "addmm_", "mm", *scaled])
    assert forward.largest == (2 * 30 if scaling != 1 / 3 else 16 * 40)


@pytest.mark.parametrize("tokens", [3, MANY])
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
def test_vmap_over_adapters_of_one_layer(dtype, adapter_dtype, compute_dtype, tokens):
    p = problem((tokens,), 12, 9, 4, dtype, adapter_dtype)
    batch = torch.func.vmap(lambda A, B: torch_path.linear(p.x, p.weight, A, B, 2.0, p.bias, compute_dtype))(
        torch.stack([p.lora_A, -p.lora_A]), torch.stack([p.lora_B, p.lora_B])
    )
    p.scaling, p.lora_A = 2.0, -p.lora_A
    assert error(batch[1], solve(p)["y"]) <= RELATIVE[dtype]


def test_inputs_are_left_alone():
    p = problem((6,), 8, 5, 3, torch.float32)
    before = [t.clone() for t in (p.x, p.weight, p.lora_A, p.lora_B, p.bias, p.grad_output)]
    compute(p, None)
    torch_path.delta(p.lora_A, p.lora_B, p.scaling)
    for old, new in zip(before, (p.x, p.weight, p.lora_A, p.lora_B, p.bias, p.grad_output), strict=True):
        assert torch.equal(old, new)


def test_embedding_and_its_gradient():
    indices = torch.tensor([3, 0, 3, 6, 3])
    lora_A = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    lora_B = torch.randn(5, 2, dtype=torch.float64)
    dense = 0.5 * (lora_B @ lora_A)
    out = torch_path.embedding(indices, lora_A.detach(), lora_B, 0.5)
    assert error(out, dense.t()[indices]) <= RELATIVE[torch.float64]
    grad_output = torch.randn(5, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(dense.t()[indices], lora_A, grad_output)
    actual = torch_path.embedding_backward(grad_output, indices, lora_A, lora_B, 0.5, None)
    assert error(actual, expected) <= RELATIVE[torch.float64]


def test_dropout_keeps_the_given_share_independently():
    """Rows, columns and neighbours: shares and correlations within five standard errors of chance."""
    rows, columns, p = 1024, 768, 0.3
    keep = torch_path.dropout_keep(torch.tensor([1234]), rows, columns, p).double()
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
    other = torch_path.dropout_keep(torch.tensor([1235]), rows, columns, p).double()
    assert abs((centred * (other - (1 - p)) / deviation).mean()) <= 5 / (rows * columns) ** 0.5
    assert not torch.equal(
        torch_path.dropout_keep(torch.tensor([1234 + 2**40]), rows, columns, p), keep.bool()
    )


def test_dropout_is_a_function_of_seed_row_and_column():
    seed = torch.tensor([-(2**62) + 5])
    keep = torch_path.dropout_keep(seed, 50, 40, 0.5)
    assert torch.equal(torch_path.dropout_keep(seed, 20, 30, 0.5, first_row=30), keep[30:, :30])
    assert torch_path.dropout_keep(seed, 50, 40, 0.0).all()
    assert (torch_path.dropout_keep(seed, 50, 40, 0.2) | ~keep).all()  # what p = 0.5 keeps, 0.2 keeps too


@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
def test_dropout_agrees_with_autograd_on_the_masked_input(dtype, adapter_dtype, compute_dtype):
    """More tokens than one chunk of `grad_a`: the mask's rows go on counting."""
    p = problem((2100,), 19, 23, 4, dtype, adapter_dtype)
    seed, rate = torch.tensor([6]), 0.25
    x, lora_A = (t.detach().double().requires_grad_() for t in (p.x, p.lora_A))
    dropped = x * torch_path.dropout_keep(seed, 2100, 19, rate) / (1 - rate)
    y = x @ p.weight.double().t() + p.bias.double()
    y = y + p.scaling * dropped @ lora_A.t() @ p.lora_B.double().t()
    dx, dA = torch.autograd.grad(y, (x, lora_A), p.grad_output.double())
    dtype_ = compute_dtype or dtype
    actual = torch_path.linear(
        p.x, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias, compute_dtype, rate, seed
    )
    assert error(actual, y) <= RELATIVE[dtype]
    backward = torch_path.linear_backward(
        p.grad_output, p.x, p.weight, p.lora_A, p.lora_B, p.scaling, dtype_, rate, seed
    )
    for value, expected in zip(backward, (dx, dA), strict=True):
        assert error(value, expected) <= RELATIVE[dtype]


def test_products_in_another_dtype_than_all_operands():
    """bf16 x, A and B, and products in fp32: h is not rounded on its way."""
    p = problem((40,), 48, 30, 12, torch.bfloat16, torch.bfloat16, scaling=2.0)
    y = torch_path.linear(p.x, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias, torch.float32)
    h = torch_path.down_projection(p.x, p.lora_A, p.scaling, torch.float32)
    base = torch_path.addmm(p.bias, (p.x, p.weight.t()))
    assert torch.equal(y, torch_path.up_projection(base, h, p.lora_B))
    assert not torch.equal(y, torch_path.linear(p.x, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias))
