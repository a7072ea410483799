"""One call of a kernel against fp64, each returning its largest error in units of what is allowed.

``dtypes``: of x and y, of lora_A, of the product. ``route``: the name of one of `expert_cases.ROUTES`, whose
rows are sorted by expert, or such a pair; without it the kernel is dense, which is to say that there is one
expert.
"""

from __future__ import annotations

import torch

from mica.kernels.down_projection import down_projection
from mica.kernels.fused_linear import fused_linear
from mica.kernels.grad_a import grad_a as grad_a_
from mica.kernels.grad_magnitude import grad_magnitude as grad_magnitude_
from mica.kernels.limits import padded_columns
from mica.kernels.prepared_b import padded as prepared
from mica.kernels.up_projection import up_projection_
from tests.emulator.judging import F32, WrongError, in_all_orders, judged, matrix, stack
from tests.support.expert_cases import ROUTES, exact_down, exact_fused, exact_grad, exact_up, idle, offsets_of
from tests.support.guarding import guarded

SEED = 12345678901


def _rows(route, tokens):
    """(number of rows, ends of the experts' rows, the same on the device or None)."""
    if route is None:
        return tokens, [tokens], None
    rows, ends = ROUTES.get(route, route)
    dtype = torch.int64 if rows % 2 else torch.int32
    return rows, list(ends), offsets_of(list(ends), dtype)


def _factor(side, experts, rank, width, dtypes, layout, scale, is_dense):
    """(experts, rows, width): "A", or "B" transposed as it is prepared for the kernels."""
    if side == "B":
        b = torch.randn(width, rank).mul(scale).to(dtypes[1])
        return guarded(prepared(b, dtypes[2])).t()[None]
    if is_dense:
        return matrix(rank, width, dtypes[1], layout, scale)[None]
    return stack(experts, rank, width, dtypes[1], layout, scale)


def _dropout(p):
    """A seed; the same for the kernel, which has one only if it drops something; its keywords."""
    seed = torch.tensor([SEED], dtype=torch.int64)
    return (seed, seed, {"dropout_p": p}) if p else (seed, None, {})


def _narrow(layout):
    """h and g come from a kernel: their rows lie as it wrote them, but their address may be any."""
    return layout if layout in ("odd", "shifted") else "contiguous"


def of_numbers_and_sizes(function):
    """What it gives of the operands, and of their absolute values: the sums of the terms' sizes."""
    return function(lambda tensor: tensor), function(torch.abs)


def down(dtypes, rank, width, tokens=70, layout="contiguous", dropout=0.0, config=None, side="A", route=None):
    scale, (x_dtype, _, dtype) = 0.75, dtypes
    rows, ends, offsets = _rows(route, tokens)
    x = matrix(rows, width, x_dtype, layout)
    factor = _factor(side, len(ends), rank, width, dtypes, layout, width**-0.5, route is None)
    if route:
        factor[idle(ends)] = float("nan")  # not to be read
    seed, own, dropped = _dropout(dropout)
    options = {"scale": scale, "compute_dtype": dtype, "config": config, **dropped}
    given = factor if route else factor[0]
    h = in_all_orders(lambda: down_projection(x, given, own, offsets, **options))[: ends[-1]]
    rank = factor.shape[1]
    if h[:, rank:].any():
        raise WrongError("padding is not 0")
    right = factor.nan_to_num().to(dtype)
    expected, size = of_numbers_and_sizes(
        lambda sized: exact_down(sized(x.to(dtype)), sized(right), ends, scale, dropout, seed)[: ends[-1]]
    )
    return judged(h[:, :rank], expected, size, dtype, dtype)


def up(
    dtypes, rank, width, tokens=70, layout="contiguous", dropout=0.0, config=None, side="B", route=None,
    out=False, bias=False,
):  # fmt: skip
    y_dtype, _, dtype = dtypes
    rows, ends, offsets = _rows(route, tokens)
    base = matrix(rows, width, y_dtype, layout)
    kept = base.clone()
    h = matrix(rows, padded_columns(rank), dtype, _narrow(layout))
    side = "A" if route else side
    if side == "A":  # of B the padding is 0
        h[:, rank:] = 0
    factor = _factor(side, len(ends), rank, width, dtypes, layout, rank**-0.5, route is None)
    seed, own, dropped = _dropout(dropout)
    options, other, added = {"compute_dtype": dtype, "config": config, **dropped}, None, None
    if route:
        added = stack(1, len(ends), width, y_dtype)[0] if bias else None
    else:
        options["scale"] = 0.75
        other = torch.full((rows, width), float("nan"), dtype=y_dtype) if out else None
    tensors = base, h, factor if route else factor[0], own, other, added, offsets
    y = in_all_orders(lambda: up_projection_(*tensors, **options), lambda: base.copy_(kept))
    if y[ends[-1] :].any():
        raise WrongError("rows of no expert are not 0")
    expected, size = of_numbers_and_sizes(
        lambda sized: exact_up(
            *(sized(tensor) for tensor in (kept, h, factor.to(dtype))),
            ends,
            None if added is None else sized(added),
            options.get("scale", 1.0),
            dropout,
            seed,
        )
    )
    return judged(y, expected, size, y_dtype, dtype)


def grad_a(
    dtypes, rank, width, tokens=70, layout="contiguous", dropout=0.0, config=None, route=None, out_dtype=F32,
    side="A",
):  # fmt: skip
    """side: "A", or "B": the gradient of lora_B, transposed: g is an h without padding, and x is dy."""
    rows, ends, offsets = _rows(route, tokens)
    g = matrix(rows, padded_columns(rank) if side == "A" else rank, dtypes[2], _narrow(layout))
    x = matrix(rows, width, dtypes[0], layout)
    seed, own, dropped = _dropout(dropout)
    options = {"config": config, "out_dtype": out_dtype, **dropped}
    dA = in_all_orders(lambda: grad_a_(g, x, own, offsets, rank=rank, **options))
    expected, size = of_numbers_and_sizes(
        lambda sized: exact_grad(sized(g), sized(x), rank, ends, dropout, seed)
    )
    products = torch.promote_types(g.dtype, x.dtype)
    return judged(dA if route else dA[None], expected, size, out_dtype, products)


def fused(
    dtypes, rank, width, out_features, tokens=70, layout="contiguous", dropout=0.0, config=None,
    side="forward",
):  # fmt: skip
    """side: "forward", or "backward", where the weight lies the other way round."""
    x_dtype, _, dtype = dtypes
    is_forward = side == "forward"
    x = matrix(tokens, width, x_dtype, layout)
    h = matrix(tokens, padded_columns(rank), dtype, _narrow(layout))
    if not is_forward:
        h[:, rank:] = 0
    shape = (out_features, width) if is_forward else (width, out_features)
    w = matrix(*shape, x_dtype, layout, width**-0.5)
    w = w.t() if is_forward else w
    factor = _factor("BA"[not is_forward], 1, rank, out_features, dtypes, layout, rank**-0.5, True)[0]
    bias = matrix(1, out_features, x_dtype, _narrow(layout))[0] if is_forward else None
    seed, own, dropped = _dropout(dropout)
    y = in_all_orders(lambda: fused_linear(x, w, h, factor, bias, own, config=config, **dropped))
    tensors = x, w, h, factor.to(dtype)
    expected, size = of_numbers_and_sizes(
        lambda sized: exact_fused(*map(sized, tensors), sized(bias) if is_forward else None, dropout, seed)
    )
    return judged(y, expected, size, x_dtype, torch.promote_types(x_dtype, dtype))


def grad_magnitude(dtypes, width, tokens, layout):
    y_dtype, factor_dtype, z_dtype = dtypes
    dy, z = matrix(tokens, width, y_dtype, layout), matrix(tokens, width, z_dtype, layout)
    factor, dz = matrix(1, width, factor_dtype)[0], torch.full_like(dy, float("nan"))
    sums = in_all_orders(lambda: grad_magnitude_(dy, z, factor, dz))
    expected, size = of_numbers_and_sizes(lambda sized: sized(dy.double()) * sized(z.double()))
    of_sums = judged(sums.double().sum(0).float(), expected.sum(0), size.sum(0), F32)
    scaled = dy.double() * factor.double()
    return max(of_sums, judged(dz, scaled, scaled.abs(), y_dtype))
