import pytest
import torch

from mica.kernels.embedding import embedding, grad_a_embedding, plan_embedding, plan_grad_a_embedding
from mica.kernels.limits import padded_columns
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import DEVICE, layouts, operand, ranks, sizes
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def some_indices(tokens, size, dtype=torch.int64):
    return torch.randint(0, size, (tokens,), dtype=dtype, device=DEVICE)


def check(indices, lora_A, factor, dtype):
    expected = 0.75 * lora_A.double()[:, indices.long()].t() @ factor[: lora_A.shape[0]].double()
    out = run_guarded(*plan_embedding(indices, lora_A, factor, scale=0.75, compute_dtype=dtype).bound())
    assert out.dtype == dtype
    assert error(out, expected) <= RELATIVE[dtype]


def check_gradient(g, indices, rank, size, **options):
    expected = torch.zeros(rank, size, dtype=torch.float64, device=DEVICE)
    expected.index_add_(1, indices.long(), g[:, :rank].double().t())
    if options.get("padding_idx") is not None:
        expected[:, options["padding_idx"]] = 0
    grad = run_guarded(*plan_grad_a_embedding(g, indices, rank, size, **options).bound())
    assert error(grad, expected) <= RELATIVE[torch.float32]
    untouched = torch.ones(size, dtype=torch.bool, device=DEVICE)
    untouched[indices.long()] = False
    assert not grad[:, untouched].any()


@pytest.mark.parametrize(("dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "size", "width", "rank"), [(1, 1, 1, 1), (70, 29, 150, 5), (33, 64, 128, 100)]
)
def test_agrees_with_fp64(dtype, compute_dtype, index_dtype, tokens, size, width, rank):
    indices = some_indices(tokens, size, index_dtype)
    lora_A, factor = operand(rank, size, dtype), operand(rank, width, dtype, scale=rank**-0.5)
    check(indices, lora_A, factor, compute_dtype)


@given(tokens=sizes, size=sizes, width=sizes, rank=ranks, kinds=st.sampled_from(DTYPES), a=layouts, p=layouts)
def test_any_shape_and_layout(tokens, size, width, rank, kinds, a, p):
    lora_A, factor = operand(rank, size, kinds[0], a), operand(rank, width, kinds[0], p, scale=rank**-0.5)
    check(some_indices(tokens, size), lora_A, factor, kinds[1])


def test_padded_factor():
    indices, lora_A, factor = (
        some_indices(9, 20),
        operand(5, 20, torch.float32),
        operand(5, 12, torch.float32),
    )
    wide = torch.full((padded_columns(5), 12), 0.0, device=DEVICE)
    wide[:5] = factor
    assert torch.equal(embedding(indices, lora_A, wide), embedding(indices, lora_A, factor))


def test_strided_indices():
    indices = some_indices(18, 20)
    lora_A, factor = operand(5, 20, torch.float32), operand(5, 12, torch.float32)
    assert torch.equal(
        embedding(indices[::2], lora_A, factor), embedding(indices[::2].clone(), lora_A, factor)
    )


@pytest.mark.parametrize("wrong", [-1, 20, 2**31, -(2**40)])
def test_an_index_out_of_range_is_seen_and_reads_nothing_foreign(wrong):
    indices = torch.tensor([3, wrong, 0], device=DEVICE)
    lora_A, factor = operand(5, 20, torch.float32), operand(5, 12, torch.float32)
    out = embedding(indices, lora_A, factor)
    assert out.isnan().all(dim=1).tolist() == [False, True, False]
    grad = grad_a_embedding(operand(3, 5, torch.float32), indices, 5, 20)
    assert grad.any(dim=0).nonzero().flatten().tolist() == [0, 3]


@pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding_idx", [None, 0, 7])
@pytest.mark.parametrize(("tokens", "size", "rank"), [(1, 8, 1), (300, 8, 5), (200, 1000, 20), (257, 9, 200)])
def test_gradient(g_dtype, padding_idx, tokens, size, rank):
    check_gradient(
        operand(tokens, rank, g_dtype), some_indices(tokens, size), rank, size, padding_idx=padding_idx
    )


@given(tokens=st.integers(1, 300), size=sizes, rank=ranks, g=layouts)
def test_gradient_of_any_shape(tokens, size, rank, g):
    check_gradient(operand(tokens, rank, torch.float32, g), some_indices(tokens, size), rank, size)


def test_gradient_of_one_index():
    """One program adds all rows, over many blocks; exactly one block of them is the edge."""
    for tokens in (63, 64, 65, 128, 500):
        indices = torch.full((tokens,), 3, device=DEVICE)
        check_gradient(operand(tokens, 16, torch.float32), indices, 16, 5)


def test_gradient_of_padded_g_and_out_dtype():
    g, indices = operand(50, 3, torch.float32), some_indices(50, 11)
    wide = torch.zeros(50, 16, device=DEVICE)
    wide[:, :3] = g
    grad = grad_a_embedding(g, indices, 3, 11)
    assert torch.equal(grad_a_embedding(wide, indices, 3, 11), grad)
    assert torch.equal(grad_a_embedding(g, indices, 3, 11, out_dtype=torch.bfloat16), grad.bfloat16())
    check_gradient(wide, some_indices(50, 4), 3, 4)  # so few that rows beyond the rank lie in the guard


def test_no_tokens():
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    lora_A, factor = operand(2, 5, torch.float32), operand(2, 4, torch.float32)
    assert embedding(none, lora_A, factor).shape == (0, 4)
    empty = operand(0, 2, torch.float32, "contiguous")
    assert torch.equal(grad_a_embedding(empty, none, 2, 5).cpu(), torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"indices": torch.tensor([1.0])}, TypeError, "indices must be int32 or int64"),
        ({"indices": torch.tensor([[1]])}, ValueError, r"indices must be \(num_tokens,\)"),
        ({"factor": torch.randn(3, 4)}, ValueError, "factor must have rank = 2 rows, or 16"),
        ({"lora_A": torch.randn(2, 5).double()}, TypeError, "lora_A must be of dtype"),
        ({"lora_A": torch.randn(0, 5)}, ValueError, "rank from 1 to 256"),
    ],
)
def test_bad_input_is_named(change, kind, message):
    arguments = {
        "indices": torch.tensor([1]),
        "lora_A": torch.randn(2, 5),
        "factor": torch.randn(2, 4),
        **change,
    }
    with pytest.raises(kind, match=message):
        embedding(**arguments)


def test_bad_gradient_is_named():
    with pytest.raises(ValueError, match="dimension 0 of g and dimension 0 of indices"):
        grad_a_embedding(torch.randn(3, 2), torch.tensor([1]), 2, 5)
    with pytest.raises(ValueError, match="g must have rank = 2 columns, or 16"):
        grad_a_embedding(torch.randn(1, 3), torch.tensor([1]), 2, 5)
