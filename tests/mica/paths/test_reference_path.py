from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mica import native
from mica.paths import dropout, products, reference_path
from mica.paths.operands import Operands
from tests.support.cpp import needs_cpp
from tests.support.linear_calls import Seen, agree
from tests.support.oracle import problem, solve
from tests.support.processor import has_instructions
from tests.support.tolerances import RELATIVE, error

in_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
in_each_way = pytest.mark.usefixtures("sixteen_bit_products")


def operands(p, bias=None):
    return Operands(p.weight, p.lora_A, p.lora_B, p.scaling, bias)


def compute(p):
    """By `linear` and `linear_backward`."""
    of_p = operands(p, p.bias)
    y, _ = reference_path.linear(p.x, of_p)
    grad_x, grad_A = reference_path.linear_backward(p.grad_output, p.x, of_p, True)
    return {"y": y, "grad_x": grad_x, "grad_A": grad_A}


@in_half
def test_grad_a_in_sixteen_bits_is_one_product_where_the_processor_has_it(monkeypatch, dtype):
    """It sums in fp32 and rounds once; elsewhere, or not asked for it, through fp32 in chunks."""
    g, x = torch.randn(3000, 4).to(dtype), torch.randn(3000, 9).to(dtype)
    for has_native, grad_dtype in ((True, dtype), (True, torch.float32), (False, dtype)):
        has_instructions(has_native, monkeypatch)
        with Seen() as seen:
            dA = reference_path.grad_a(g, x, grad_dtype=grad_dtype)
        is_one = has_native and grad_dtype == dtype
        assert (seen.largest(torch.float32) == 0) == is_one
        assert (dA.dtype == dtype) == is_one
        assert error(dA, g.double().t() @ x.double()) <= RELATIVE[dA.dtype]


def test_a_wide_product_is_that_of_native_where_it_has_one(monkeypatch):
    g, x, product = torch.ones(8, 4).bfloat16(), torch.ones(8, 9).bfloat16(), torch.ones(4, 9)
    has_instructions(True, monkeypatch)
    monkeypatch.setattr(native, "module", lambda: SimpleNamespace(wide_product=lambda g, x: product))
    assert reference_path.grad_a(g, x) is product
    assert reference_path.grad_a(g.float(), x.float()) is not product


@in_half
def test_on_cuda_grad_a_is_one_product_without_copies_in_fp32(dtype):
    """Counted at 8192 tokens, whose chunks take 24 launches; of tensors without memory."""
    with FakeTensorMode():
        g, x = (torch.empty(8192, width, dtype=dtype, device="cuda") for width in (16, 64))
        with Seen() as seen:
            grad = reference_path.grad_a(g, x)
    assert (grad.dtype, grad.shape) == (torch.float32, (16, 64))
    assert [name for name in seen.names if name.startswith("aten")] == ["aten::mm"]


MANY = products.FEW_TO_ROUND + 1


@in_each_way
@pytest.mark.parametrize(("factor", "result"), [("lora_A", "y"), ("lora_B", "grad_A")])
def test_numbers_below_the_normal_ones_of_float16_are_scaled_before_they_are_rounded(factor, result):
    p = problem((MANY,), 31, 23, 5, torch.float16, torch.float32, scaling=2.0**13)
    p.weight.zero_(), p.bias.zero_()  # beside which the update would not show
    getattr(p, factor).mul_(1e-6)
    agree({result: compute(p)[result]}, solve(p), torch.float16)


def test_a_gradient_of_h_is_scaled_as_h_is():
    """The h that `linear` returns has scaling in it; a second derivative asks for its gradient."""
    p = problem((MANY,), 31, 23, 5, torch.float32, scaling=3.0)
    of_h = torch.randn(MANY, 5)
    alone = reference_path.linear_backward(p.grad_output, p.x, operands(p), True)
    together = reference_path.linear_backward(p.grad_output, p.x, operands(p), True, of_h)
    x, lora_A, of_wide = (tensor.double() for tensor in (p.x, p.lora_A, 3.0 * of_h))
    updates = of_wide @ lora_A, of_wide.t() @ x
    for before, after, update in zip(alone, together, updates, strict=True):
        assert error(after, before.double() + update) <= RELATIVE[torch.float32]


def test_of_many_tokens_grad_b_is_a_transpose_of_grad_a():
    """Rounded as grad_a is, and in memory as lora_B, which optimizers and DDP expect of a gradient."""
    dy = torch.randn(MANY, 23, dtype=torch.bfloat16)
    h = torch.randn(MANY, 5, dtype=torch.bfloat16)
    grad = reference_path.grad_b(dy, h, torch.float32, torch.bfloat16)
    assert grad.is_contiguous()
    assert torch.equal(grad, reference_path.grad_a(h, dy, torch.bfloat16).t().float())
    few = reference_path.grad_b(dy[:-1], h[:-1], torch.float32, torch.bfloat16)
    assert not torch.equal(few, few.bfloat16().float())


@pytest.mark.parametrize(
    ("scaling", "forward_scale", "backward_scale", "largest"),
    [
        (1.0, [], [], 2 * 30),
        (2.0, ["aten::mul_"], ["aten::mul_"], 2 * 30),  # a power of two scales where there is least
        (1 / 3, ["aten::mul"], ["aten::mul"], 16 * 40),
    ],
)
def test_few_tokens_take_three_products_and_nothing_else(scaling, forward_scale, backward_scale, largest):
    p = problem((2,), 40, 30, 16, torch.float32, bias=False, scaling=scaling)
    with Seen() as forward:
        reference_path.linear(p.x, operands(p))
    with Seen() as backward:
        reference_path.linear_backward(p.grad_output, p.x, operands(p), True)
    needed = ["aten::addmm_", "aten::mm", "aten::mm"]
    assert sorted(forward.names) == sorted([*needed, *forward_scale])
    assert sorted(backward.names) == sorted([*needed, "aten::mm", *backward_scale])
    assert forward.largest(torch.float32) == largest


def test_dropout_keeps_the_given_share_independently():
    """Rows, columns, neighbours and seeds: shares and correlations within five standard errors of chance."""
    rows, columns, p = 1024, 768, 0.3
    keep, other, far = (
        dropout.dropout_keep(torch.tensor([seed]), rows, columns, p).double()
        for seed in (1234, 1235, 1234 + 2**40)
    )
    deviation = (p * (1 - p)) ** 0.5
    centred, others = (keep - (1 - p)) / deviation, (other - (1 - p)) / deviation
    assert centred.mean(0).abs().max() <= 5 / rows**0.5
    assert centred.mean(1).abs().max() <= 5 / columns**0.5
    neighbours = centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred[:512] * centred[512:]
    for chance in (centred, *neighbours, centred * others):
        assert abs(chance.mean()) <= 5 / chance.numel() ** 0.5
    assert not torch.equal(far, keep)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 2**31, -(2**63), 2**63 - 1])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0), (1, 1), (201, 1000), (9, 40_000)])
def test_blocks_of_rows_are_the_mask(seed, rows, columns):
    """As devices and function transforms draw it, at once."""
    seed = torch.tensor([seed])
    for p in (1e-9, 0.05, 0.5, 0.999):
        expected = dropout.keep_rows(seed, 0, rows, columns, round(p * 2**24))
        keep = dropout.dropout_keep(seed, rows, columns, p)
        assert keep.dtype == torch.bool
        assert torch.equal(keep, expected)


def test_a_mask_is_where_its_seed_is():
    keep = dropout.dropout_keep(torch.zeros(1, dtype=torch.int64, device="meta"), 3, 4, 0.5)
    assert (keep.device.type, keep.shape, keep.dtype) == ("meta", (3, 4), torch.bool)


def test_what_is_kept_at_exactly_the_threshold():
    """A probability whose threshold is a hash that occurs: that element is kept."""
    seed = torch.tensor([3])
    hashes = torch.tensor([[_hash(3, row, column) for column in range(5)] for row in range(4)])
    for threshold in (2**20, *hashes.flatten().tolist()):
        assert torch.equal(dropout.keep_rows(seed, 0, 4, 5, threshold), hashes >= threshold)


def _hash(seed, row, column):
    """The upper 24 bits of an element's, in Python's integers."""

    def mix(z, between=0):
        z = ((z ^ z >> 16) * dropout.FIRST_FACTOR & 0xFFFFFFFF) ^ between
        z = (z ^ z >> 15) * dropout.SECOND_FACTOR & 0xFFFFFFFF
        return z ^ z >> 15

    first = mix(row ^ (seed & 0xFFFFFFFF))
    second = mix(first + (seed >> 32) & 0xFFFFFFFF)
    return mix(column * dropout.COLUMN_FACTOR + first & 0xFFFFFFFF, second) >> 8


def test_dropout_under_a_function_transform_with_a_seed_for_each(monkeypatch):
    monkeypatch.setattr(dropout, "_BLOCK", 8)  # elements: a row
    x, lora_A, lora_B, weight = (torch.randn(shape) for shape in ((3, 8), (2, 8), (4, 2), (4, 8)))

    def linear(seed):
        return reference_path.linear(x, Operands(weight, lora_A, lora_B, dropout_p=0.5, seed=seed))[0]

    seeds = torch.tensor([[1], [2]])
    expected = torch.stack([linear(seed) for seed in seeds])
    assert error(torch.func.vmap(linear)(seeds), expected) <= RELATIVE[torch.float32]


@pytest.mark.skipif(not products.has_native(torch.bfloat16), reason="no instructions for bfloat16")
@needs_cpp
@pytest.mark.parametrize("tokens", [1, 2, 127, 129, 1500])
@pytest.mark.parametrize("columns", [1, 31, 300, 1111])
def test_wide_products_of_bfloat16_numbers(tokens, columns):
    """Exact products, summed in fp32 and not rounded to bf16, whatever the strides and the threads."""
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(tokens, size, generator=generator).bfloat16() for size in (5, columns))
    wide = torch.randn(tokens, 2 * columns, generator=generator).bfloat16()
    for left, right in (
        (g, x),
        (g, x.t().contiguous().t()),
        (g, wide[:, columns:]),
        (g.t().contiguous().t(), x),
    ):
        exact = left.double().t() @ right.double()
        dA = reference_path.grad_a(left, right)
        assert dA.dtype == torch.float32
        assert error(dA, exact) <= RELATIVE[torch.float32]
        from_cpp = native.module().wide_product(left, right)
        assert from_cpp is None or torch.equal(dA, from_cpp)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    several = reference_path.grad_a(g, x)
    torch.set_num_threads(threads)
    assert torch.equal(several, reference_path.grad_a(g, x))


def test_no_wide_product_where_bfloat16_is_slow(monkeypatch):
    """There the operands are copied to fp32, as for every other product."""
    g, x = torch.randn(200, 5).bfloat16(), torch.randn(200, 300).bfloat16()
    has_instructions(False, monkeypatch)
    monkeypatch.setattr(native, "module", lambda: pytest.fail("asked for it"))
    assert torch.equal(reference_path.grad_a(g, x), g.float().t() @ x.float())
