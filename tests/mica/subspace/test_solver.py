"""The minor subspace against the fp64 SVD, on every spectrum of ``spectra``."""

import warnings

import pytest
import torch
from spectra import NULL, RANK, SPECTRA, weight

from mica.subspace import MinorSubspace, minor_subspace, solver
from mica.subspace.certificate import Certificate

# Tall, wide, square; small sides below and above 128, where (in conftest) the eigensolver changes.
SHAPES = [(120, 40), (40, 120), (60, 60), (200, 140), (140, 200), (150, 150)]
METHODS = ["krylov", "gram", "svd"]


def resolution(matrix: torch.Tensor) -> float:
    """What fp64 resolves of a squared singular value."""
    norm = torch.linalg.matrix_norm(matrix.double(), 2).item()
    return 4 * min(matrix.shape) ** 0.5 * torch.finfo(torch.float64).eps * norm**2


def true_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors and values of the reduced fp64 SVD."""
    return torch.linalg.svd(matrix.double(), full_matrices=False)[:2]


def energy(matrix: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """‖Wᵀb‖² of each column b."""
    return (matrix.double().T @ basis.double()).square().sum(0)


def sine(vectors: torch.Tensor, basis: torch.Tensor) -> float:
    """Largest sine between the columns' span of ``basis`` and that of the orthonormal ``vectors``."""
    basis = basis.double()
    return torch.linalg.matrix_norm(basis - vectors @ (vectors.T @ basis), 2).item()


def solve(matrix: torch.Tensor, rank: int, method: str = "auto") -> MinorSubspace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return minor_subspace(matrix, rank, method=method)


def judge(matrix: torch.Tensor, result: MinorSubspace, determined: bool = True) -> None:
    """Individual vectors mean nothing inside a cluster: judge orthonormality, energy and containment.

    ``determined``: the weight fixes the subspace's null vectors too (it does not, of a tall weight).
    """
    basis, rank = result.basis, result.basis.shape[1]
    vectors, values = true_svd(matrix)
    floor = resolution(matrix)
    squares = values.square()
    wanted = squares[-rank:].sum().item()

    assert basis.shape == (matrix.shape[0], rank)
    assert basis.is_contiguous()
    assert not basis.requires_grad
    identity = torch.eye(rank, dtype=torch.float64)
    assert (basis.double().T @ basis.double() - identity).abs().max() <= 1e-6

    excess = energy(matrix, basis).sum().item() - wanted
    assert excess <= 1e-5 * wanted + rank * floor
    # The reported figure bounds the true one, up to the rounding of this very comparison.
    assert excess <= result.energy_excess * max(wanted, rank * floor) + 0.05 * rank * floor

    count = min(rank + 16, len(squares))
    allowed = squares <= squares[-count] * (1 + 1e-4) + floor
    # Never a direction that carries more energy; and, where the weight determines all, none outside it.
    assert torch.linalg.matrix_norm(vectors[:, ~allowed].T @ basis.double(), 2) <= 1e-3
    if determined:
        assert sine(vectors[:, allowed], basis) <= 1e-3

    if determined and rank < len(squares):
        gap = squares[-rank - 1] - squares[-rank]
        if gap > 1e-4 * squares[-rank] + floor:
            single = torch.linalg.svd(matrix.float(), full_matrices=False).U[:, -rank:]
            allowed_sine = max(1e-4, sine(vectors[:, -rank:], single))
            assert sine(vectors[:, -rank:], basis) <= allowed_sine

    # Columns in order, each with the singular value reported for it.
    assert result.singular_values.shape == (rank,)
    assert result.singular_values.dtype == basis.dtype
    assert (result.singular_values.diff() <= 0).all()
    reported = result.singular_values.double().square()
    tolerance = 1e-5 * squares[-rank:] + floor
    assert ((reported - squares[-rank:]).abs() <= tolerance).all()
    assert ((energy(matrix, basis) - squares[-rank:]).abs() <= tolerance).all()

    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_every_spectrum(name, shape, method):
    matrix = weight(name, *shape)
    result = solve(matrix, RANK, method)
    tall = shape[0] > shape[1]
    judge(matrix, result, determined=not (tall and name in NULL))
    assert result.certified
    assert result.energy_excess <= 1 + 1e-5
    if method == "svd" or (tall and name in NULL):
        assert result.method == "svd"
    elif not tall and method == "gram":
        assert result.method == "gram"


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50), (200, 140)], ids=str)
@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_ranks_from_one_to_all(shape, method, share):
    matrix = weight("gaussian", *shape)
    result = solve(matrix, max(1, round(share * min(shape))), method)
    judge(matrix, result)
    assert result.certified


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2), (2, 5), (5, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "zero", "flat", "times 1e4"])
@pytest.mark.parametrize("method", METHODS)
def test_tiny_weights(shape, name, method):
    matrix = weight(name, *shape)
    for rank in range(1, min(shape) + 1):
        result = solve(matrix, rank, method)
        judge(matrix, result, determined=not (name == "zero" and shape[0] > shape[1]))
        assert result.certified


@pytest.mark.parametrize("shape", [(120, 40), (40, 120), (60, 60)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_input_dtypes(shape, dtype, method):
    matrix = weight("gaussian", *shape).to(dtype)
    result = solve(matrix, RANK, method)
    assert result.basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    judge(matrix, result)
    assert result.certified
    if dtype != torch.float64:  # the same numbers in fp32 give the same bits
        torch.testing.assert_close(result.basis, solve(matrix.float(), RANK, method).basis, rtol=0, atol=0)
    else:
        vectors, _ = true_svd(matrix)
        assert sine(vectors[:, -RANK:], result.basis) <= 1e-9


@pytest.mark.parametrize("exponent", [-300, -150, 150, 300])
def test_fp64_weights_whose_squares_leave_the_range(exponent):
    matrix = weight("gaussian", 60, 40).double()
    scaled = solve(matrix * 2.0 ** (3 * exponent), RANK)
    plain = solve(matrix, RANK)
    assert scaled.certified
    torch.testing.assert_close(scaled.basis, plain.basis, rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled.singular_values * 2.0 ** (-3 * exponent), plain.singular_values)


@pytest.mark.parametrize("shape", [(120, 40), (40, 120), (60, 60), (140, 200)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_smaller_ranks_are_the_last_columns(shape, method):
    matrix = weight("hard edge", *shape)
    largest = solve(matrix, 16, method).basis
    for rank in (1, 5, 12):
        torch.testing.assert_close(solve(matrix, rank, method).basis, largest[:, -rank:], rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(120, 40), (40, 120), (60, 60)], ids=str)
def test_columns_and_signs_are_those_of_the_definition(shape):
    matrix = weight("hard edge", *shape)
    expected = true_svd(matrix)[0][:, -RANK:]
    expected = expected * expected.gather(0, expected.abs().argmax(0, keepdim=True)).sign()
    for method in METHODS:
        for sign in (1, -1):
            basis = solve(sign * matrix, RANK, method).basis
            torch.testing.assert_close(basis.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gaussian", "rank 5"])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_call_same_bits(shape, method, name, threads):
    torch.set_num_threads(threads)
    matrix = weight(name, *shape)
    state = torch.get_rng_state()
    first, second = solve(matrix, RANK, method), solve(matrix.clone(), RANK, method)
    assert torch.equal(first.basis, second.basis)
    assert torch.equal(first.singular_values, second.singular_values)
    assert first.energy_excess == second.energy_excess
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_any_tensor_of_the_same_numbers(method):
    matrix = weight("gaussian", 60, 40)
    untouched = matrix.clone()
    expected = solve(matrix, RANK, method).basis
    padded = torch.zeros(120, 80)
    padded[::2, ::2] = matrix
    same = [
        torch.nn.Parameter(matrix),
        matrix.clone().requires_grad_() * 1,
        matrix.T.contiguous().T,
        padded[::2, ::2],
    ]
    threads = torch.get_num_threads()
    for variant in same:
        basis = solve(variant, RANK, method).basis
        torch.testing.assert_close(basis, expected, rtol=0, atol=1e-6)
        assert not basis.requires_grad
    assert torch.equal(matrix, untouched)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(120, 40), (200, 140)], ids=str)
@pytest.mark.parametrize("name", sorted(NULL))
def test_null_directions_of_a_tall_weight(name, shape, method):
    """Completed orthonormally, outside range(W), with one warning that counts them."""
    matrix = weight(name, *shape)
    vectors, values = true_svd(matrix)
    kept = values > 1e-10 * values[0]
    null_count = min(RANK, int((~kept).sum()))
    with pytest.warns(
        UserWarning, match=f"^{null_count} of the {RANK} smallest .* numerically null"
    ) as caught:
        result = minor_subspace(matrix, RANK, method=method)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    completion = result.basis[:, -null_count:].double()
    assert torch.linalg.matrix_norm(vectors[:, kept].T @ completion, 2) <= 1e-6
    assert result.certified


@pytest.mark.parametrize("shape", [(40, 120), (60, 60)], ids=str)
def test_null_directions_of_other_weights_need_no_warning(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in sorted(NULL):
            minor_subspace(weight(name, *shape), RANK)
        minor_subspace(weight("gaussian", 120, 40), RANK)


@pytest.mark.parametrize("shape", [(120, 40), (40, 120), (60, 60)], ids=str)
def test_falls_back_when_the_certificate_refuses(shape, monkeypatch):
    matrix = weight("gaussian", *shape)
    refused = Certificate(False, float("inf"), 0.0, 0.0)
    monkeypatch.setattr(solver, "certify", lambda *arguments: refused)
    for method in ("auto", "gram"):
        result = solve(matrix, RANK, method)
        assert result.method == "svd"
        assert not result.certified
        judge(matrix, result)


def test_falls_back_when_the_eigenvectors_are_wrong(monkeypatch):
    def wrong_end(matrix, count):
        values, vectors = torch.linalg.eigh(matrix)
        return values[-count:], vectors[:, -count:]

    monkeypatch.setattr(solver, "smallest_eigenpairs", wrong_end)
    for shape in SHAPES[:3]:
        matrix = weight("gaussian", *shape)
        result = solve(matrix, RANK, "gram")
        assert result.method == "svd"
        assert result.certified
        judge(matrix, result)


def test_auto_takes_the_gram_unless_nearly_all_is_wanted():
    matrix = weight("gaussian", 60, 40)
    assert solve(matrix, 30).method == "gram"
    assert solve(matrix, 31).method == "svd"


@pytest.mark.parametrize("rank", [0, -1, 41, 2.0, "4", None, True])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=str)
def test_rank_out_of_range(rank, shape):
    expected = r"^rank must be between 1 and min\(out_features, in_features\) = 40 .* got "
    with pytest.raises(ValueError, match=expected):
        minor_subspace(torch.ones(shape), rank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights(dtype, bad):
    matrix = torch.ones(8, 5, dtype=dtype)
    matrix[2, 3] = matrix[7, 0] = bad
    with pytest.raises(ValueError, match=r"^weight must be finite, but got 2 NaN or infinite of 40"):
        minor_subspace(matrix, 2)


@pytest.mark.parametrize(
    ("matrix", "error", "text"),
    [
        ([[1.0]], TypeError, "got list"),
        (torch.ones(4, 4, dtype=torch.int64), TypeError, "dtype .* got torch.int64"),
        (torch.ones(4, 4, dtype=torch.complex64), TypeError, "dtype .* got torch.complex64"),
        (torch.ones(4), ValueError, r"2-D .* \(4,\)"),
        (torch.ones(2, 4, 4), ValueError, r"2-D .* \(2, 4, 4\)"),
        (torch.ones(4, 4, device="meta"), ValueError, "meta"),
        (torch.ones(4, 0), ValueError, r"empty.* \(4, 0\)"),
        (torch.ones(0, 4), ValueError, r"empty.* \(0, 4\)"),
    ],
)
def test_unusable_weights(matrix, error, text):
    with pytest.raises(error, match=f"^weight must .*{text}"):
        minor_subspace(matrix, 1)


def test_unknown_method():
    with pytest.raises(ValueError, match=r"^method must be one of 'auto', 'gram', 'svd', but got 'qr'"):
        minor_subspace(torch.ones(4, 4), 1, method="qr")
