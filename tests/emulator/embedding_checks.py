"""The kernels of an embedding's low-rank term against fp64."""

from __future__ import annotations

import torch
from mica.kernels.embedding import embedding as run_embedding
from mica.kernels.embedding import grad_a_embedding
from mica.kernels.prepared import padded as prepared

from mica.kernels.limits import padded_columns
from tests.emulator.judging import F32, WrongError, in_all_orders, judged, matrix
from tests.support.guarding import guarded


def embedding(dtypes, rank, width, tokens=50, size=90, layout="contiguous", config=None):
    _, a_dtype, dtype = dtypes
    indices, A = torch.randint(0, size, (tokens,)), matrix(rank, size, a_dtype, layout)
    factor = guarded(prepared(torch.randn(width, rank).mul(rank**-0.5).to(a_dtype), dtype)).t()
    options = {"scale": 0.75, "compute_dtype": dtype, "config": config}
    y = in_all_orders(lambda: run_embedding(indices, A, factor, **options))
    left, right = A[:, indices].to(dtype).double().t(), factor[:rank].double()
    indices[1], indices[2] = -1, size
    bad = run_embedding(indices, A, factor, **options)
    if not bad[1:3].isnan().all() or bad[3:].isnan().any():
        raise WrongError("indices out of range are not NaN")
    return judged(y, 0.75 * left @ right, 0.75 * left.abs() @ right.abs(), dtype, dtype)


def scatter(dtypes, rank, tokens, size, padding=None, out_dtype=F32):
    indices = torch.randint(0, size, (tokens,))
    indices[tokens // 2 :] = 1  # many rows of one index: more than one block of them
    g = matrix(tokens, padded_columns(rank), dtypes[2])
    options = {"padding_idx": padding, "out_dtype": out_dtype}
    dA = in_all_orders(lambda: grad_a_embedding(g, indices, rank, size, **options))
    used = indices != (-1 if padding is None else padding)
    exact, magnitude = (torch.zeros(size, rank, dtype=torch.float64) for _ in range(2))
    exact.index_add_(0, indices[used], g[used, :rank].double())
    magnitude.index_add_(0, indices[used], g[used, :rank].double().abs())
    return judged(dA, exact.t(), magnitude.t(), out_dtype)
