"""The smallest eigenpairs of an fp64 Gram matrix, on the host."""

import scipy.linalg
import torch

# LAPACK's partial solver pays per vector, the full divide-and-conquer one does not. Measured with
# 2 threads, partial against full: n = 64, 8 vectors 0.3 : 0.2 ms; n = 576, 16 / 64 / 144 vectors
# 10 / 19 / 37 : 24 ms; n = 2048, 16 / 512 vectors 281 / 885 : 899 ms. Below 256 the partial one loses
# although it is alone the faster (n = 192, 16 vectors 1.6 : 2.0 ms): SciPy's BLAS has its own threads,
# which go on spinning and slow what PyTorch does next (whole solver 7.0 : 3.8 ms).
FULL_BELOW = 256
FULL_FROM_SHARE = 6


def smallest_eigenpairs(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` smallest eigenvalues (ascending) of a symmetric fp64 matrix and their eigenvectors.

    Returns (count,) and (n, count), fp64, on matrix.device; the vectors are orthonormal to rounding (the
    partial solver's too: within 3e-15 on clusters of hundreds, n up to 800).
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
