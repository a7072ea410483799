"""A stack of experts on Triton kernels: which base product they are next to."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mica.paths import triton_path as path
from tests.support.expert_cases import problem
from tests.support.kernel_cases import BF16, DEVICE, FP32, LAYER_DTYPES
from tests.support.linear_calls import agree, on_device, run
from tests.support.oracle import solve

pytestmark = pytest.mark.usefixtures("on_kernels")


def stack(*sizes, **options):
    """With ends as `mica.fast` may pass them, which PyTorch's grouped product does not take."""
    p = problem(*sizes, **options)
    return on_device(replace(p, offsets=p.offsets.long()))


@pytest.fixture
def grouped(monkeypatch):
    """Where the base product may be PyTorch's grouped one, or may not; its calls."""
    calls, own = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **how: calls.append(1) or own(*args, **how))

    def may(is_grouped=True, dtype=BF16):
        if is_grouped and not path._is_grouped(torch.device(DEVICE), dtype, 3):
            pytest.skip("no grouped product of this dtype here")
        monkeypatch.setattr(path, "_is_grouped", lambda *arguments: is_grouped)
        return calls

    return may


@pytest.mark.parametrize(("dtype", "lora_dtype", "compute_dtype"), LAYER_DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("is_grouped", [False, True])
def test_both_base_products(grouped, dtype, lora_dtype, compute_dtype, transposed, is_grouped):
    """Aligned operands but for x and dy, whose rows lie apart: those are copied. Rows of no expert are 0."""
    calls = grouped(is_grouped, dtype)
    p = stack("rows of none", 48, 32, 16, dtype, lora_dtype, bias=False, transposed=transposed)
    result = run(p, compute_dtype)
    agree(result, solve(p), dtype)
    assert not result["y"][p.offsets[-1] :].any()
    assert not result["grad_x"][p.offsets[-1] :].any()
    assert len(calls) == (2 if is_grouped else 0)


@pytest.mark.parametrize(("in_features", "out_features"), [(48, 36), (36, 48)])
def test_unaligned_sizes_are_not_grouped(grouped, in_features, out_features):
    """`grouped_mm` refuses such strides, or leaves gaps between the rows of its result."""
    calls, p = grouped(), stack("tiles", in_features, out_features, 5, BF16)
    agree(run(p), solve(p), BF16)
    assert not calls


@pytest.mark.parametrize(("in_features", "out_features"), [(48, 32), (32, 48)])
@pytest.mark.parametrize("beyond", [0, 1])
def test_sizes_at_which_the_grouped_product_faults_are_not_grouped(
    grouped, monkeypatch, in_features, out_features, beyond
):
    """As many elements of x, or of y, as it takes; and one more."""
    calls, p = grouped(), stack("tiles", in_features, out_features, 16, BF16)
    p.x, p.grad_output = p.x.contiguous(), p.grad_output.contiguous()
    monkeypatch.setattr(path, "_MOST_ELEMENTS", len(p.x) * 48 - beyond)
    agree(run(p), solve(p), BF16)
    assert len(calls) == (0 if beyond else 2)


@pytest.mark.parametrize(
    ("device", "capability", "answers"),
    [
        # bf16, fp32
        ("cpu", None, (True, True)),
        ("cuda", (7, 5), (False, False)),
        ("cuda", (8, 0), (True, False)),
        ("meta", None, (False, False)),
    ],
)
def test_where_the_grouped_product_is_taken(monkeypatch, device, capability, answers):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    decide = path._is_grouped.__wrapped__
    assert tuple(decide(torch.device(device), dtype, 128) for dtype in (BF16, FP32)) == answers
    assert not decide(torch.device(device), BF16, 1024)  # its kernel's limit
