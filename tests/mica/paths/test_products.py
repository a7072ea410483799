"""16-bit products through fp32: rounded once, in bounded copies, followed by autograd and graphs."""

import pytest
import torch

from mica.paths import products
from tests.support.linear_calls import Seen
from tests.support.oracle import padded
from tests.support.processes import printed_by
from tests.support.processor import has_instructions
from tests.support.tolerances import RELATIVE, error

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]
in_half = pytest.mark.parametrize("dtype", HALVES)
in_each_way = pytest.mark.usefixtures("sixteen_bit_products")


def operands(dtype, rows=37, inner=(33, 8), columns=29, transposed=True):
    def right(length):
        if transposed:
            return padded(columns, length, dtype=dtype).t()
        return padded(length, columns, dtype=dtype)

    return [(padded(rows, length, dtype=dtype), right(length)) for length in inner]


def exact(addend, pairs):
    total = sum(left.double() @ right.double() for left, right in pairs)
    return total if addend is None else total + addend.double()


@in_each_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("addend", [None, (29,), (37, 29)])
def test_agrees_with_the_oracle(dtype, transposed, addend):
    pairs = operands(dtype, transposed=transposed)
    addend = None if addend is None else torch.randn(addend).to(dtype)
    before = None if addend is None else addend.clone()
    result = products.addmm(addend, *pairs)
    assert result.dtype == dtype
    assert error(result, exact(addend, pairs)) <= RELATIVE[dtype]
    assert addend is None or torch.equal(addend, before)


class OnCuda(torch.Tensor):
    """In the host's memory, where PyTorch has no such product and says so."""

    is_cuda = True


def test_fp32_sums_of_16_bit_numbers_without_a_copy(monkeypatch):
    """Asked for on CUDA only, where it exists, and where nothing will differentiate it."""
    (left, right), _ = operands(torch.bfloat16)
    for wide in (left.float(), left.double()):
        assert torch.equal(products.unrounded(wide, right.to(wide.dtype)), wide @ right.to(wide.dtype))
    assert products.unrounded(left, right) is None
    left, right = (matrix.detach().as_subclass(OnCuda) for matrix in (left, right))
    with pytest.raises(NotImplementedError, match=r"aten::mm\.dtype"):
        products.unrounded(left, right)
    with pytest.raises(NotImplementedError), torch.no_grad():
        products.unrounded(left.clone().requires_grad_(), right)
    with torch.autograd.forward_ad.dual_level():
        assert products.unrounded(left, right) is None
    for needs in ((True, False), (False, True)):
        pair = (m.clone().requires_grad_(need) for m, need in zip((left, right), needs, strict=True))
        assert products.unrounded(*pair) is None
    seen = []
    torch.func.grad(lambda x: seen.append(products.unrounded(left, right)) or x)(torch.ones(()))
    monkeypatch.setattr(products, "HAS_WIDE_SUMS", False)
    assert seen == [None] == [products.unrounded(left, right)]


@in_half
@pytest.mark.parametrize("chunk", [64, 2**22])
def test_the_sum_is_rounded_once(monkeypatch, dtype, chunk):
    """Two products that nearly cancel: rounded apart they would leave nothing but their rounding."""
    has_instructions(False, monkeypatch)
    monkeypatch.setattr(products, "CHUNK", chunk)
    (left, right), _ = operands(dtype)
    bias = torch.randn(29).to(dtype)
    pairs = [(left, right), (-left, right)]
    result = products.addmm(bias, *pairs)
    assert error(result, exact(bias, pairs)) <= RELATIVE[torch.float32]
    has_instructions(True, monkeypatch)
    assert error(products.addmm(bias, *pairs), exact(bias, pairs)) > RELATIVE[torch.float32]


@pytest.mark.parametrize("transposed", [True, False])
def test_copies_are_bounded(monkeypatch, transposed):
    has_instructions(False, monkeypatch)
    monkeypatch.setattr(products, "CHUNK", 2**13)
    pairs = operands(torch.bfloat16, 700, (100, 16), 900, transposed)
    with Seen() as seen:
        result = products.addmm(None, *pairs)
    assert seen.largest(torch.float32) <= 2**13
    assert error(result, exact(None, pairs)) <= RELATIVE[torch.bfloat16]


@in_half
def test_few_rows_are_left_to_pytorch_where_its_loop_is_quick(monkeypatch, dtype):
    has_instructions(False, monkeypatch)
    for extra in (0, 1):
        (pair, _) = operands(dtype, rows=products.FEW_ROWS + extra)
        with Seen() as seen:
            result = products.addmm(None, pair)
        assert (seen.largest(torch.float32) > 0) == (extra > 0)  # copies
        assert extra or torch.equal(result, pair[0] @ pair[1])


@in_half
def test_few_rows_are_multiplied_by_fp32_factors_as_they_are(monkeypatch, dtype):
    few, more = (torch.zeros(products.FEW_TO_ROUND + extra, 4, dtype=dtype) for extra in (0, 1))
    wide, narrow = torch.zeros(2, 4), torch.zeros(2, 4, dtype=dtype)
    has_instructions(True, monkeypatch)
    assert products.product_dtype(few, (wide, wide), dtype) == torch.float32
    assert products.product_dtype(few, (wide, wide), torch.float64) == torch.float64
    assert products.product_dtype(more, (wide, wide), dtype) == dtype
    assert products.product_dtype(few, (wide, narrow), dtype) == dtype
    # a device with its own products
    assert products.product_dtype(few.to("meta"), (wide, wide), dtype) == dtype
    has_instructions(False, monkeypatch)
    assert products.product_dtype(few, (wide, wide), dtype) == torch.float32


@in_each_way
@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_and_transforms_follow(dtype):
    first, (left, right) = operands(dtype)
    bias, grad_output = torch.randn(29).to(dtype), torch.randn(37, 29).to(dtype)
    leaf = left.detach().requires_grad_()
    products.addmm(bias, (leaf, right)).backward(grad_output)
    assert error(leaf.grad, grad_output.double() @ right.double().t()) <= RELATIVE[dtype]
    for addend, others in ((bias, []), (None, [first])):  # mapped is what a later product alone has, too
        both = torch.func.vmap(lambda r, a=addend, o=others: products.addmm(a, *o, (left, r)))(
            torch.stack([right, -right])
        )
        assert error(both[1], exact(addend, [*others, (left, -right)])) <= RELATIVE[dtype]


def compiled_agrees(dtype):
    torch.compiler.reset()
    (left, right), _ = operands(dtype)
    compiled = torch.compile(lambda a, b: products.addmm(None, (a, b)), fullgraph=True, backend="aot_eager")
    return error(compiled(left, right), exact(None, [(left, right)])) <= RELATIVE[dtype]


@in_each_way
def test_compiles_into_one_graph():
    assert compiled_agrees(torch.bfloat16)


@in_half
def test_support_is_known_while_a_graph_is_traced(dtype):
    assert compiled_agrees(dtype)


def test_what_pytorch_asks_of_the_processor_decides():
    assert products.has_native(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert products.has_native(torch.float16) == torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert products.has_native(torch.float32)


def test_without_an_answer_there_are_none(monkeypatch):
    monkeypatch.setattr(products, "QUERIES", {torch.bfloat16: "not there"})
    assert products.query(torch.bfloat16) is False


def test_a_process_without_16_bit_instructions():
    """oneDNN's own switch makes any x86 processor such a one; elsewhere it does nothing."""
    code = "import torch; from mica.paths import products; print(products.has_native(torch.bfloat16))"
    printed = printed_by(code, ONEDNN_MAX_CPU_ISA="AVX2")
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert printed.strip() == "False"
