"""Routes and operands of stacks of experts, and the results of kernels, expert by expert or dense."""

from itertools import accumulate, pairwise

import torch

from tests.support.guarding import guarded
from tests.support.kernel_cases import DEVICE
from tests.support.oracle import Problem, dropped, padded

# number of rows, ends: without rows at the start, in the middle and at the end, all rows to one expert, rows
# that belong to none, one row each, more than one tile of 64, and more than one of rows that belong to none
ROUTES = {
    "first and last idle": (12, [0, 3, 3, 9, 12, 12]),
    "one expert": (7, [7]),
    "all to the second": (20, [0, 20, 20]),
    "rows of none": (15, [4, 4, 10]),
    "none at all": (5, [0, 0]),
    "one each": (4, [1, 2, 3, 4]),
    "tiles": (261, [70, 70, 71, 199]),
}
EVERY_ROUTE = {**ROUTES, "no rows": (0, [0, 0, 0])}  # the last is launched nowhere


def problem(
    route,
    in_features,
    out_features,
    rank,
    dtype,
    adapter_dtype=None,
    bias=True,
    transposed=False,
    trains_B=False,
) -> Problem:
    """One projection of a layer of experts; B is a view of what PEFT stores, (out_features, rank·experts)."""
    (rows, ends), adapter_dtype = EVERY_ROUTE[route], adapter_dtype or dtype
    experts = len(ends)
    shape = (experts, in_features, out_features) if transposed else (experts, out_features, in_features)
    weight = (torch.randn(shape) * in_features**-0.5).to(dtype)
    stored_B = (torch.randn(out_features, rank * experts) * rank**-0.5).to(adapter_dtype)
    return Problem(
        x=padded(rows, in_features, dtype=dtype),
        weight=weight.transpose(1, 2) if transposed else weight,
        lora_A=(torch.randn(experts, rank, in_features) * in_features**-0.5).to(adapter_dtype),
        lora_B=stored_B.view(out_features, rank, experts).permute(2, 0, 1).requires_grad_(trains_B),
        bias=torch.randn(experts, out_features).to(dtype) if bias else None,
        grad_output=padded(rows, out_features, dtype=dtype),
        scaling=0.75,
        offsets=torch.tensor(ends, dtype=torch.int32),
    )


def offsets_of(ends: list[int], dtype=torch.int32) -> torch.Tensor:
    return guarded(torch.tensor(ends, dtype=dtype), DEVICE)


def slices(ends: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def idle(ends: list[int]) -> list[int]:
    """The experts without rows."""
    return [expert for expert, rows in enumerate(slices(ends)) if rows.start == rows.stop]


def stack(experts, rows, columns, dtype, layout="contiguous", scale=1.0):
    """Random matrices on the tested device.

    layout: "contiguous"; "gaps", rows apart in a buffer of NaN; "peft", as PEFT stores B: (rows, columns,
    experts) in memory.
    """
    matrices = padded(experts, rows, columns, dtype=dtype, scale=scale)
    if layout == "peft":
        matrices = matrices.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return guarded(matrices if layout != "contiguous" else matrices.contiguous(), DEVICE)


def by_expert(left, ends, stacked):
    """left_e stacked_e in fp64, (num_rows, columns); rows of no expert are 0."""
    out = left.new_zeros(left.shape[0], stacked.shape[2], dtype=torch.float64)
    rank = min(left.shape[1], stacked.shape[1])  # either may be padded
    for expert, rows in enumerate(slices(ends)):
        out[rows] = left[rows, :rank].double() @ stacked[expert, :rank].double()
    return out


# The kernels' results in fp64. ``ends``: where the rows of each expert end; without, a factor is a matrix


def exact_down(x, factor, ends=None, scale=1.0, dropout_p=0.0, seed=None):
    x = dropped(x, dropout_p, seed)
    return scale * (by_expert(x, ends, factor.transpose(1, 2)) if ends else x @ factor.double().t())


def _low_rank(h, factor):
    """Their product; either may be padded."""
    rank = min(h.shape[1], factor.shape[0])
    return h[:, :rank].double() @ factor[:rank].double()


def exact_up(base, h, factor, ends=None, bias=None, scale=1.0, dropout_p=0.0, seed=None):
    """Rows of no expert are 0."""
    update = scale * (by_expert(h, ends, factor) if ends else _low_rank(h, factor))
    y = base.double() + dropped(update, dropout_p, seed)
    for expert, rows in enumerate(slices(ends or [])):
        y[rows] += 0 if bias is None else bias[expert].double()
    y[ends[-1] if ends else len(base) :] = 0
    return y


def exact_grad(g, x, rank, ends=None, dropout_p=0.0, seed=None):
    g, x = g[:, :rank].double(), dropped(x, dropout_p, seed)
    return torch.stack([g[rows].t() @ x[rows] for rows in slices(ends)]) if ends else g.t() @ x


def exact_fused(x, w, h, factor, bias=None, dropout_p=0.0, seed=None):
    update = dropped(_low_rank(h, factor), dropout_p, seed)
    return x.double() @ w.double() + update + (0 if bias is None else bias.double())


def route(counts: list[int], leftover: int) -> tuple[int, list[int]]:
    """(number of rows, ends)."""
    ends = list(accumulate(counts))
    return ends[-1] + leftover, ends
