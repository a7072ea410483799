"""Sums that programs share: what adds the parts. Each sum itself is tested with its kernel."""

import pytest
import torch

from mica.kernels import configs
from mica.kernels.down_projection import plan_down_projection
from mica.kernels.grad_a import plan_grad_a
from mica.kernels.split_sum import last_arriver_adds, split_evenly
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import operand, seed_of
from tests.support.tolerances import RELATIVE, error

ONE, TWO = "sm_90", "gfx942"


def down(dtype, target, dropout_p=0.0):
    torch.manual_seed(0)
    x, factor = operand(40, 2049, dtype), operand(6, 2049, torch.float32, scale=2049**-0.5)
    options = {"scale": 0.7, "compute_dtype": dtype, "dropout_p": dropout_p, "seed": seed_of(3)}
    return plan_down_projection(x, factor, target=target, **options)


def grad(dtype, target, dropout_p=0.0):
    torch.manual_seed(0)
    g, x = operand(1025, 6, dtype), operand(1025, 77, dtype)
    return plan_grad_a(g, x, 6, out_dtype=dtype, target=target, dropout_p=dropout_p, seed=seed_of(3))


@pytest.mark.parametrize("choose", [down, grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_second_launch_gives_the_bits_of_the_last_arriver(choose, dtype, dropout_p):
    """Where one launch is not enough the parts are added by another one, in the same order."""
    sums = {}
    for target in (ONE, TWO):
        out, launch = choose(dtype, target, dropout_p).bound()
        assert launch.args["num_splits"] == launch.grid[1] > 1
        assert (launch.then is None) == launch.meta["LAST_ADDS"] == last_arriver_adds(target)
        sums[target] = run_guarded(out, launch)
    assert torch.equal(sums[ONE], sums[TWO])


@pytest.mark.parametrize("choose", [down, grad])
def test_the_first_launch_alone_writes_parts_only(choose):
    out, launch = choose(torch.float32, TWO).bound()
    out.fill_(7.0)
    launch.alone()
    assert (out == 7.0).all()
    parts = launch.args["partial_ptr"].view(launch.args["num_splits"], *out.shape)
    launch.then()
    scale = torch.tensor(launch.args["scale"])  # fp32, as kernels get it
    total = torch.zeros_like(out)
    for part in parts:
        total += part
    if choose is down:  # columns beyond the rank are 0
        assert not out[:, 6:].any()
    assert torch.equal(out, total * scale)


def test_a_call_makes_both_launches():
    """And nobody counts arrivals: the counters' place is taken by the parts."""
    choice = down(torch.float32, TWO)
    plan = choice.plan(choice.configs[0])
    out, tensors = choice.operands(plan)
    x, factor, _, parts, counters, _ = tensors
    assert counters is parts
    plan(*tensors)
    assert error(out[:, :6], 0.7 * x.double() @ factor.double().t()) <= RELATIVE[torch.float32]


def test_nothing_follows_where_nothing_is_split():
    x, factor = operand(40, 64, torch.float32), operand(6, 64, torch.float32)
    assert plan_down_projection(x, factor, target=TWO).bound()[1].then is None


def test_the_target_says_who_adds():
    assert [target for target in configs.SHARED_MEMORY if not last_arriver_adds(target)] == ["gfx942"]
    assert not last_arriver_adds("gfx90a")


@pytest.mark.parametrize("length", [1, 300, 4096, 4097, 14336])
@pytest.mark.parametrize(("block", "tiles"), [(64, 1), (128, 128), (32, 3), (64, 1000)])
@pytest.mark.parametrize(("columns", "itemsize"), [(16, 2), (64, 4), (256, 2)])
def test_splits_cover_the_length_once(length, block, tiles, columns, itemsize):
    per_split, splits = split_evenly(length, block, tiles, columns, itemsize)
    assert per_split % block == 0
    assert (splits - 1) * per_split < length <= splits * per_split
    assert splits == 1 or per_split >= 2 * block
    assert splits == 1 or splits * tiles <= configs.PROGRAMS
    share = 1 if tiles <= configs.PROGRAMS / 4 else 4
    assert splits == 1 or 8 * columns * splits <= length * itemsize / share  # bytes of the parts


@pytest.mark.parametrize(
    ("tokens", "rank", "down", "grad"),
    [
        (8192, 16, (128, 2), (32, 8)),
        (8192, 64, (128, 2), (32, 8)),
        (512, 16, (32, 8), (128, 2)),
        (512, 64, (32, 8), (128, 1)),
        (256, 16, (16, 16), (128, 1)),
        (1, 16, (1, 16), (128, 1)),
    ],
)
def test_small_grids_are_filled_where_the_work_allows(tokens, rank, down, grad):
    """Grids for bf16 x (tokens, 4096): about 264 programs, but where their parts would cost too much."""
    x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta")
    factor = torch.empty(rank, 4096, device="meta")
    h = torch.empty(tokens, rank, dtype=torch.bfloat16, device="meta")
    assert plan_down_projection(x, factor).bound()[1].grid == down
    assert plan_grad_a(h, x, rank).bound()[1].grid == grad
