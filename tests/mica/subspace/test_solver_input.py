"""What ``minor_subspace`` refuses, and what it says."""

import pytest
import torch

from mica.dtypes import FLOATING
from mica.subspace import minor_subspace


@pytest.mark.parametrize("rank", [0, -1, 41, 2.0, "4", None, True])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (3, 60, 40)], ids=str)
def test_rank_out_of_range(rank, shape):
    expected = rf"^rank must be between 1 and min\(out_features, in_features\) = 40 .* got {rank!r}\.$"
    with pytest.raises(ValueError, match=expected):
        minor_subspace(torch.ones(shape), rank)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(8, 5), (2, 4, 5)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_non_finite_weights(dtype, bad, shape, transposed):
    matrix = torch.ones(shape, dtype=dtype)
    matrix[..., 2, 3] = matrix[..., 3, 0] = bad
    matrix = matrix.mT if transposed else matrix
    count = 2 if len(shape) == 2 else 4
    with pytest.raises(ValueError, match=rf"^weight must be finite, but got {count} NaN or infinite of 40"):
        minor_subspace(matrix, 2)


@pytest.mark.parametrize(
    ("matrix", "error", "text"),
    [
        ([[1.0]], TypeError, "got list"),
        (torch.ones(4, 4, dtype=torch.int64), TypeError, "dtype .* got torch.int64"),
        (torch.ones(4, 4, dtype=torch.complex64), TypeError, "dtype .* got torch.complex64"),
        (torch.tensor(4.0), ValueError, r"shape \(\.\.\., out_features, in_features\), but got \(\)"),
        (torch.ones(4), ValueError, r"shape \(\.\.\., out_features, in_features\), but got \(4,\)"),
        (torch.ones(4, 4, device="meta"), ValueError, "meta"),
        (torch.ones(4, 0), ValueError, r"empty.* \(4, 0\)"),
        (torch.ones(0, 4), ValueError, r"empty.* \(0, 4\)"),
        (torch.ones(0, 4, 4), ValueError, r"empty.* \(0, 4, 4\)"),
    ],
)
def test_unusable_weights(matrix, error, text):
    with pytest.raises(error, match=f"^weight must .*{text}"):
        minor_subspace(matrix, 1)


def test_unknown_method():
    known = r"^method must be one of 'auto', 'krylov', 'gram', 'svd', but got 'qr'"
    with pytest.raises(ValueError, match=known):
        minor_subspace(torch.ones(4, 4), 1, method="qr")
