import pytest
import torch

from mica.kernels.merge import merge, plan_merge
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import layouts, operand, ranks, sizes
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error

WEIGHTS = [torch.float32, torch.bfloat16, torch.float16]


def check(weight, lora_A, lora_B, **options):
    """Half a unit in the last place for the one rounding, the rest for the fp32 product below it."""
    wanted = weight.double() + 0.75 * (lora_B.double() @ lora_A.double())
    merged = run_guarded(*plan_merge(weight, lora_A, lora_B, scale=0.75, **options).bound())
    assert merged.dtype == weight.dtype
    spacing = torch.finfo(weight.dtype).eps * wanted.abs()
    assert ((merged.double() - wanted).abs() <= 0.5 * spacing + 4e-6).all()


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, 1), (70, 140, 5), (65, 33, 130)])
def test_agrees_with_fp64(dtype, adapter_dtype, rows, columns, rank):
    check(
        operand(rows, columns, dtype),
        operand(rank, columns, adapter_dtype, scale=columns**-0.5),
        operand(rows, rank, adapter_dtype, scale=rank**-0.5),
    )


@given(rows=sizes, columns=sizes, rank=ranks, dtype=st.sampled_from(WEIGHTS), w=layouts, a=layouts, b=layouts)
def test_any_shape_and_layout(rows, columns, rank, dtype, w, a, b):
    check(
        operand(rows, columns, dtype, w),
        operand(rank, columns, torch.float32, a, scale=columns**-0.5),
        operand(rows, rank, torch.float32, b, scale=rank**-0.5),
    )


def test_full_fp32_whatever_the_setting(matmul_precision):
    matmul_precision("high")
    _, launch = plan_merge(torch.randn(4, 4), torch.randn(2, 4), torch.randn(4, 2)).bound()
    assert launch.meta["PRECISION"] == "tf32x3"


def test_in_place_or_anew():
    weight = operand(6, 8, torch.bfloat16)
    lora_A, lora_B = operand(2, 8, torch.float32), operand(6, 2, torch.float32)
    before = weight.clone()
    merged = merge(weight, lora_A, lora_B, scale=2.0)
    assert torch.equal(weight, before)
    expected = before.double() + 2.0 * (lora_B.double() @ lora_A.double())
    assert error(merged, expected) <= RELATIVE[torch.bfloat16]
    assert merge(weight, lora_A, lora_B, scale=2.0, out=weight) is weight
    assert torch.equal(weight, merged)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"lora_A": torch.randn(2, 5)}, ValueError, r"lora_A must be \(rank, in_features\) = \(2, 4\)"),
        ({"lora_B": torch.randn(3, 3)}, ValueError, r"lora_B must be \(out_features, rank\) = \(3, 2\)"),
        ({"lora_A": torch.randn(0, 4), "lora_B": torch.randn(3, 0)}, ValueError, "rank from 1 to 256"),
        ({"weight": torch.ones(3, 4, dtype=torch.int8)}, TypeError, "weight must be of dtype"),
    ],
)
def test_bad_input_is_named(change, kind, message):
    arguments = {
        "weight": torch.randn(3, 4),
        "lora_A": torch.randn(2, 4),
        "lora_B": torch.randn(3, 2),
        **change,
    }
    with pytest.raises(kind, match=message):
        merge(**arguments)
