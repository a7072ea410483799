import pytest
import torch

from mica import reference
from mica.kernels import configs
from mica.kernels.grad_a import grad_a, plan_grad_a
from mica.kernels.limits import padded_columns
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import (
    SHAPES,
    far_apart,
    layouts,
    operand,
    probabilities,
    ranks,
    seed_of,
    sizes,
)
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]


def expected(g, x, rank, dropout_p=0.0, seed=None):
    x = x.double()
    if dropout_p:
        x = x.where(reference.dropout_keep(seed, *x.shape, dropout_p), 0) / (1 - dropout_p)
    return g[:, :rank].double().t() @ x


def check(g, x, rank, **options):
    """Products of 16-bit factors are exact in fp32, so fp32's tolerance holds for all of them."""
    exact = expected(g, x, rank, options.get("dropout_p", 0.0), options.get("seed"))
    grad = run_guarded(*plan_grad_a(g, x, rank, **options).bound())
    assert grad.dtype == torch.float32
    assert error(grad, exact) <= RELATIVE[torch.float32]


@pytest.mark.parametrize(("g_dtype", "x_dtype"), DTYPES)
@pytest.mark.parametrize(("tokens", "in_features", "out_features", "rank"), SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_agrees_with_fp64(g_dtype, x_dtype, tokens, in_features, out_features, rank, dropout_p):
    g, x = operand(tokens, rank, g_dtype), operand(tokens, in_features, x_dtype)
    check(g, x, rank, dropout_p=dropout_p, seed=seed_of(2))


@given(
    tokens=st.integers(1, 300),
    length=sizes,
    rank=ranks,
    kinds=st.sampled_from(DTYPES),
    g=layouts,
    x=layouts,
    drop=probabilities,
)
def test_any_shape_and_layout(tokens, length, rank, kinds, g, x, drop):
    check(
        operand(tokens, rank, kinds[0], g),
        operand(tokens, length, kinds[1], x),
        rank,
        dropout_p=drop,
        seed=seed_of(tokens),
    )


@pytest.mark.parametrize(("g_dtype", "x_dtype"), DTYPES)
@pytest.mark.parametrize("tokens", [600, 1025])
def test_splits_are_summed_in_order(g_dtype, x_dtype, tokens):
    """More than one split, the last of them shorter; the rows of the mask count from the first token."""
    g, x = operand(tokens, 6, g_dtype), operand(tokens, 40, x_dtype)
    _, launch = plan_grad_a(g, x, 6).bound()
    assert launch.meta["SPLIT"]
    check(g, x, 6)
    check(g, x, 6, dropout_p=0.3, seed=seed_of(9))
    assert torch.equal(grad_a(g, x, 6), grad_a(g, x, 6))


@pytest.mark.parametrize("rank", [1, 16, 20])
def test_padded_g(rank):
    g, x = operand(50, rank, torch.bfloat16), operand(50, 33, torch.bfloat16)
    wide = g.new_zeros(50, padded_columns(rank))
    wide[:, :rank] = g
    assert torch.equal(grad_a(wide, x, rank), grad_a(g, x, rank))


def test_out_dtype():
    g, x = operand(50, 3, torch.bfloat16), operand(50, 33, torch.bfloat16)
    exact, rounded = grad_a(g, x, 3), grad_a(g, x, 3, out_dtype=torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())


def test_every_configuration():
    g, x = operand(150, 9, torch.bfloat16), operand(150, 200, torch.bfloat16)
    for target in configs.SHARED_MEMORY:
        for config in configs.grad_a(target, 10_000, 16, 2):
            check(g, x, 9, config=config)


def test_offsets_beyond_32_bit():
    g, x = far_apart(3, 4, torch.float16), far_apart(3, 70, torch.float16)
    assert error(grad_a(g, x, 4), expected(g, x, 4)) <= RELATIVE[torch.float32]


def test_no_tokens():
    empty = operand(0, 8, torch.float32, "contiguous")
    assert torch.equal(grad_a(empty[:, :2], empty, 2).cpu(), torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"g": torch.randn(4, 2)}, ValueError, "dimension 0 of g and dimension 0 of x"),
        ({"g": torch.randn(3, 3)}, ValueError, r"g must have rank = 2 columns, or 16.*\(3, 3\)"),
        ({"rank": 0}, ValueError, "rank from 1 to 256"),
        ({"x": torch.randn(3, 4).double()}, TypeError, "x must be of dtype"),
        ({"x": torch.randn(3, 4).to("meta")}, ValueError, "x on meta"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p must be"),
    ],
)
def test_bad_input_is_named(change, kind, message):
    arguments = {"g": torch.randn(3, 2), "x": torch.randn(3, 4), "rank": 2, **change}
    with pytest.raises(kind, match=message):
        grad_a(**arguments)
