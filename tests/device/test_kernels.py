"""Each kernel on this device: its numbers against fp64, what lies around its buffers, and reruns bit by bit.

The first stage of a run on a GPU, which shows within seconds whether the rest is worth its time. Then, once
each, the masks of dropout and the operators that consist of these kernels.
"""

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.machine import DEVICE
from mica.ops import call_counts
from mica.paths import dropout
from tests.support.guarding import run_guarded
from tests.support.linear_calls import run
from tests.support.oracle import solve
from tests.support.tolerances import RELATIVE, error

pytest.importorskip("triton")

from mica.kernels.down_projection import down_projection
from mica.kernels.grad_a import grad_a
from mica.kernels.up_projection import up_projection_
from tests.support.kernel_calls import KERNELS, SHAPES, operands

RERUNS = 3


@pytest.fixture(autouse=True)
def any_cublas():
    """`torch.empty` holds NaN, so that what a kernel has not written is seen. cuBLAS may do as always."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def close(what: str, value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    wrong, limit = error(value, expected), RELATIVE[dtype]
    assert wrong <= limit, f"the relative error of {what} is {wrong:.2e}, above {limit:.1e}"


def same_bits(run: Callable[[], Iterable[Tensor]], first: Iterable[Tensor]) -> None:
    different = sum(not all(map(torch.equal, run(), first)) for _ in range(RERUNS))
    assert not different, f"{different} of {RERUNS} reruns gave other bits"


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, (_, shapes) in KERNELS.items() for shape in shapes]
)
def test_kernel(name, shape):
    make, _ = KERNELS[name]
    work = make(operands(shape))
    result = run_guarded(*work.plan().bind())
    close(name, result, work.expected, work.dtype)
    same_bits(lambda: [work.call()], [result])


def test_masks_of_dropout_are_those_of_pytorchs_form():
    """Rows and columns of the identity show the forward's and dA's mask, bit for bit, and ones dx's."""
    tokens, inner, _, rank, dtype = SHAPES["aligned"]
    seed, p = torch.tensor([-5], device=DEVICE), 0.4
    keep, dropped = dropout.dropout_keep(seed, tokens, inner, p), {"dropout_p": p}

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=DEVICE)

    def picked(size: int) -> tuple[Tensor, Tensor]:
        places = torch.linspace(0, size - 1, rank).long().to(DEVICE)
        return places, F.one_hot(places, size).to(dtype)

    columns, of_columns = picked(inner)
    h = down_projection(ones(tokens, inner), of_columns, seed, **dropped)
    assert torch.equal(h != 0, keep[:, columns]), "the forward drops other elements"
    rows, of_rows = picked(tokens)
    gradient = grad_a(of_rows.t().contiguous(), ones(tokens, inner), seed, rank=rank, **dropped)
    assert torch.equal(gradient != 0, keep[rows]), "dA drops other elements"
    dx = up_projection_(ones(tokens, inner) * 0, ones(tokens, rank), ones(rank, inner), seed, **dropped)
    assert torch.equal(dx != 0, keep), "dx drops other elements"


@pytest.mark.parametrize("trains_B", [False, True], ids=["MiCA", "LoRA"])
def test_operator(trains_B):
    """y and gradients against the dense oracle; that they came from kernels, and do so again bit by bit."""
    p = operands("aligned")
    p.lora_B.requires_grad_(trains_B)
    call_counts.clear()
    results, exact = run(p), solve(p)
    expected = {"linear_kernels", "linear_backward_kernels", *(["grad_b_kernels"] if trains_B else [])}
    ran = {key for key in call_counts if key.endswith("_kernels")}
    assert ran == expected, f"on kernels ran {ran or 'nothing'}"
    for what, value in results.items():
        close(what, value, exact[what], p.x.dtype)
    same_bits(lambda: run(p).values(), results.values())
