"""The smallest eigenpairs of an fp64 Gram matrix, on the host."""

import scipy.linalg
import torch

# LAPACK's partial solver pays per vector, the full divide-and-conquer one does not. Measured with
# 2 threads, partial against full: n = 64, 8 vectors 0.3 : 0.2 ms; n = 576, 16 / 64 / 144 vectors
# 10 / 19 / 37 : 24 ms; n = 2048, 16 / 512 vectors 281 / 885 : 899 ms.
FULL_BELOW = 128
FULL_FROM_SHARE = 6


def smallest_eigenpairs(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` smallest eigenvalues (ascending) of a symmetric fp64 matrix and their eigenvectors.

    Returns (count,) and (n, count), fp64, on matrix.device; the vectors are orthonormal to rounding.
    """
    n = matrix.shape[0]
    host = matrix.cpu()
    pairs = None
    if n > FULL_BELOW and FULL_FROM_SHARE * count < n:
        pairs = _partial(host, count)
    if pairs is None:
        values, vectors = torch.linalg.eigh(host)
        pairs = values[:count], vectors[:, :count]
    values, vectors = pairs
    # The partial solver works by inverse iteration and leaves vectors of a tight cluster less than
    # orthonormal; QR changes neither their span nor their order.
    vectors = torch.linalg.qr(vectors).Q
    return values.to(matrix.device), vectors.to(matrix.device)


def _partial(host: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """LAPACK's dsyevr for ``count`` eigenpairs; None where its inverse iteration did not converge."""
    try:
        values, vectors = scipy.linalg.eigh(
            host.numpy(), subset_by_index=[0, count - 1], driver="evr", check_finite=False
        )
    except scipy.linalg.LinAlgError:
        return None
    if vectors.shape[1] != count:
        return None
    return torch.from_numpy(values), torch.from_numpy(vectors)
