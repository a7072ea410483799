"""The minor subspace against the fp64 SVD, on every spectrum of ``spectra``."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from mica.subspace import MinorSubspace, krylov, methods, minor_subspace, solver
from mica.subspace.certificate import Certificate
from tests.support.judging import judge, sine, truth
from tests.support.spectra import NULL, RANK, SPECTRA, weight

# Tall, wide, square; small sides without and (from 128 on: conftest) with room for Krylov subspaces.
SHAPES = [(120, 40), (40, 120), (60, 60), (200, 140), (140, 200), (150, 150)]
METHODS = ["krylov", "gram", "svd"]


def solve(matrix: torch.Tensor, rank: int = RANK, method: str = "auto", **options) -> MinorSubspace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return minor_subspace(matrix, rank, method=method, **options)


def same_bits(first: MinorSubspace, second: MinorSubspace) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(*(vars(result).values() for result in (first, second)), strict=True)
    )


def refuse(monkeypatch) -> None:
    """No certificate from now on."""
    nothing, infinite = torch.tensor(False), torch.tensor(math.inf, dtype=torch.float64)
    refused = Certificate(nothing, infinite, torch.zeros((), dtype=torch.float64))
    monkeypatch.setattr("mica.subspace.candidate.certify", lambda *arguments: refused)


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
    assert (result.null_count > 0) == (tall and name in NULL)
    if method == "svd" or (tall and name in NULL):
        assert result.method == "svd"
    elif not tall and method == "gram":
        assert result.method == "gram"
    elif name in ("gaussian", "row scales", "times 1e4", "times 1e-4"):
        assert result.method == (method if krylov.fits(min(shape), RANK) else "gram")


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50), (200, 140), (140, 200)], ids=str)
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


@pytest.mark.parametrize("shape", [(120, 40), (40, 120), (60, 60), (140, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_input_dtypes(shape, dtype, method):
    matrix = weight("gaussian", *shape).to(dtype)
    result = solve(matrix, RANK, method)
    assert result.basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    judge(matrix, result)
    assert result.certified
    if dtype != torch.float64:  # the same numbers in fp32 give the same bits
        assert same_bits(result, solve(matrix.float(), RANK, method))
    else:
        assert sine(truth(matrix).vectors[:, -RANK:], result.basis) <= 1e-9


@pytest.mark.parametrize("shape", [(60, 40), (140, 200)], ids=str)
@pytest.mark.parametrize("exponent", [-1000, -450, 450, 1000])
def test_fp64_weights_whose_squares_leave_the_range(exponent, shape):
    matrix = weight("gaussian", *shape).double()
    scaled = solve(matrix * 2.0**exponent, RANK, "krylov")
    plain = solve(matrix, RANK, "krylov")
    assert scaled.certified
    assert scaled.method == plain.method
    torch.testing.assert_close(scaled.basis, plain.basis, rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled.singular_values * 2.0**-exponent, plain.singular_values)
    assert scaled.energy_excess == pytest.approx(plain.energy_excess, rel=1e-6, abs=1e-12)
    limits = torch.finfo(torch.float64)
    expected = plain.resolution * 2.0**exponent * 2.0**exponent
    assert scaled.resolution == pytest.approx(min(max(expected, limits.tiny), limits.max), rel=1e-9)


def test_a_zero_weight_resolves_everything():
    assert solve(torch.zeros(40, 60, dtype=torch.float64), RANK).resolution == 0


@pytest.mark.parametrize("shape", [(120, 40), (40, 120), (60, 60), (140, 200)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_smaller_ranks_are_the_last_columns(shape, method):
    matrix = weight("hard edge", *shape)
    largest = solve(matrix, 16, method).basis
    for rank in (1, 5, 12):
        torch.testing.assert_close(solve(matrix, rank, method).basis, largest[:, -rank:], rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(120, 40), (40, 120), (60, 60), (200, 140)], ids=str)
def test_columns_and_signs_are_those_of_the_definition(shape):
    matrix = weight("hard edge", *shape)
    expected = truth(matrix).vectors[:, -RANK:]
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
    assert same_bits(solve(matrix, RANK, method), solve(matrix.clone(), RANK, method))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("shape", "dtype"), [((200, 140), torch.float32), ((150, 150), torch.float64)])
def test_seeds_start_elsewhere_and_end_at_the_same_subspace(shape, dtype):
    matrix = weight("gaussian", *shape).to(dtype)
    first, again, other = (solve(matrix, RANK, "krylov", seed=seed) for seed in (1, 1, 2))
    assert (first.method, other.method) == ("krylov", "krylov")
    assert same_bits(first, again)
    assert not torch.equal(first.basis, other.basis)
    torch.testing.assert_close(first.basis, other.basis, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(60, 40), (140, 200)], ids=str)
def test_any_tensor_of_the_same_numbers(method, shape):
    matrix = weight("gaussian", *shape)
    untouched = matrix.clone()
    expected = solve(matrix, RANK, method).basis
    padded = torch.full((2 * shape[0], 2 * shape[1]), math.nan)
    padded[::2, ::2] = matrix
    same = [
        torch.nn.Parameter(matrix),
        matrix.clone().requires_grad_() * 1,
        matrix.T.contiguous().T,
        padded[::2, ::2],
    ]
    for variant in same:
        basis = solve(variant, RANK, method).basis
        torch.testing.assert_close(basis, expected, rtol=0, atol=1e-6)
        assert not basis.requires_grad
    assert torch.equal(matrix, untouched)


def threads() -> list[int]:
    return [torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_thread_counts_are_the_caller_s_again(count, method, monkeypatch):
    torch.set_num_threads(count)
    before = threads()
    solve(weight("gaussian", 140, 200), RANK, method)
    assert threads() == before

    def broken(*arguments):
        raise RuntimeError("broken")

    for name in ("mica.subspace.candidate.certify", "mica.subspace.host.HostGram.apply"):
        monkeypatch.setattr(name, broken)
        with pytest.raises(RuntimeError, match="broken"):
            solve(weight("gaussian", 140, 200), RANK, method)
        assert threads() == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(120, 40), (200, 140)], ids=str)
@pytest.mark.parametrize("name", sorted(NULL))
def test_null_directions_of_a_tall_weight(name, shape, method):
    """Completed orthonormally, outside range(W), with one warning that counts them."""
    matrix = weight(name, *shape)
    vectors, squares = truth(matrix)
    kept = squares > 1e-20 * squares[0]
    null_count = min(RANK, int((~kept).sum()))
    message = f"^{null_count} of the {RANK} smallest .* a weight of shape .* numerically null"
    with pytest.warns(UserWarning, match=message) as caught:
        result = minor_subspace(matrix, RANK, method=method)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert result.null_count == null_count
    completion = result.basis[:, -null_count:].double()
    assert torch.linalg.matrix_norm(vectors[:, kept].T @ completion, 2) <= 1e-6
    assert result.certified


@pytest.mark.parametrize("shape", [(40, 120), (60, 60), (140, 200)], ids=str)
def test_null_directions_of_other_weights_need_no_warning(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in sorted(NULL):
            assert minor_subspace(weight(name, *shape), RANK).null_count == 0
        minor_subspace(weight("gaussian", 120, 40), RANK)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_what_cannot_be_proven_is_the_svd_s_with_a_warning(shape, method, monkeypatch):
    matrix = weight("gaussian", *shape)
    refuse(monkeypatch)
    message = r"^the minor subspace of a weight of shape .* is not proven .*'svd'"
    with pytest.warns(UserWarning, match=message) as caught:
        result = minor_subspace(matrix, RANK, method=method)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert result.method == "svd"
    assert not result.certified
    judge(matrix, dataclasses.replace(result, energy_excess=math.inf))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_falls_back_to_the_svd_from_wrong_eigenvectors(shape, monkeypatch):
    monkeypatch.setattr(
        "mica.subspace.host.partial_eigenvectors",
        lambda matrix, count: np.linalg.eigh(matrix, UPLO="L").eigenvectors[:, -count:],
    )
    matrix = weight("gaussian", *shape)
    result = solve(matrix, RANK, "gram")
    assert result.method == "svd"
    assert result.certified
    judge(matrix, result)


@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
@pytest.mark.parametrize("fault", ["wrong vectors", "no factor", "not converged"])
def test_falls_back_to_the_gram_from_krylov(shape, fault, monkeypatch):
    def faulty(gram, rank, limits, eps, seed):
        if fault == "no factor":
            return None
        right = smallest_eigenvectors(gram, rank + 1, limits, eps, seed).vectors
        if fault == "wrong vectors":
            return krylov.Ritz(right[:, 1:], True)
        return krylov.Ritz(right[:, :-1], False)

    smallest_eigenvectors = krylov.smallest_eigenvectors
    monkeypatch.setattr(krylov, "smallest_eigenvectors", faulty)
    matrix = weight("gaussian", *shape)
    result = solve(matrix, RANK, "krylov")
    assert result.method == "gram"
    assert result.certified
    judge(matrix, result)


@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "hard edge", "cluster inside", "row scales", "zero"])
def test_a_start_orthogonal_to_the_answer(name, shape, monkeypatch):
    """Rounding and further steps bring the answer in, or it is not proven and another method finds it."""
    matrix = weight(name, *shape)
    exact_vectors = torch.linalg.svd(matrix.double() if shape[0] < shape[1] else matrix.double().T).U[
        :, -RANK:
    ]
    starts = []

    def orthogonal(gram, count, seed):
        block = random(gram, count, seed)
        for _ in range(2):
            block = gram.orthonormal(block - exact_vectors @ (exact_vectors.T @ block))[0]
        starts.append(torch.linalg.matrix_norm(exact_vectors.T @ block).item())
        return block

    random = krylov.random_block
    monkeypatch.setattr(krylov, "random_block", orthogonal)
    result = solve(matrix, RANK, "krylov")
    judge(matrix, result, determined=not (name in NULL and shape[0] > shape[1]))
    assert result.certified
    assert starts
    assert max(starts) <= 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(SPECTRA.keys() - NULL))
def test_without_strict_right_but_not_proven(name, shape, method, monkeypatch):
    matrix = weight(name, *shape)
    monkeypatch.setattr("mica.subspace.host.HostGram.exceeds", None)  # no factorisation for a proof
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = minor_subspace(matrix, RANK, method=method, strict=False)
    assert not result.certified
    # The estimate is no better than what strict would have proven, and a bound on these right results.
    judge(matrix, result)
    assert 0 <= result.energy_excess <= 1 + 1e-5


def test_without_strict_nothing_falls_back(monkeypatch):
    matrix = weight("gaussian", 150, 150)
    candidate = methods.candidate
    monkeypatch.setattr(methods, "candidate", lambda problem, vectors: candidate(problem, vectors.flip(0)))
    for method in ("krylov", "gram"):
        assert solve(matrix, RANK, method, strict=False).method == method
        assert solve(matrix, RANK, method).method == "svd"


@pytest.mark.parametrize("shape", [(50, 40), (40, 50), (140, 150)], ids=str)
@pytest.mark.parametrize("leading", [(1,), (3,), (2, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("method", ["krylov", "gram"])
def test_a_batch_is_its_matrices_one_by_one(shape, leading, method):
    names = ["gaussian", "hard edge", "times 1e-4", "row scales", "times 1e4", "flat"]
    count = math.prod(leading)
    singles = [weight(name, *shape) for name in names[:count]]
    matrices = torch.stack(singles).reshape(*leading, *shape)
    strided = torch.full((*leading, shape[1], 2 * shape[0]), math.nan).mT
    strided[..., ::2, :] = matrices
    expected = [solve(single, RANK, method) for single in singles]
    strided_expected = [solve(s, RANK, method) for s in strided[..., ::2, :].reshape(-1, *shape)]
    for batch, each in ((matrices, expected), (strided[..., ::2, :], strided_expected)):
        result = solve(batch, RANK, method)
        assert result.basis.shape == (*leading, shape[0], RANK)
        assert result.basis.is_contiguous()
        assert result.singular_values.shape == (*leading, RANK)
        for index in range(count):
            judge(singles[index], each[index])
            assert torch.equal(result.basis.reshape(-1, shape[0], RANK)[index], each[index].basis)
            values = result.singular_values.reshape(-1, RANK)[index]
            assert torch.equal(values, each[index].singular_values)
        assert result.certified
        for field in ("energy_excess", "resolution", "null_count"):
            assert getattr(result, field) == max(getattr(single, field) for single in each)


@pytest.mark.parametrize("shape", [(40, 60), (140, 150)], ids=str)
@pytest.mark.parametrize("exponent", [-700, -300, 300, 700])
def test_each_matrix_of_a_batch_has_its_own_scale(shape, exponent):
    """Scaled alike, the squares of the smaller ones would underflow: a zero Gram, and everything is minor."""
    matrix = weight("gaussian", *shape).double()
    result = solve(torch.stack([matrix, matrix * 2.0**exponent]), RANK)
    assert result.certified
    for basis in result.basis:
        torch.testing.assert_close(basis, solve(matrix, RANK).basis, rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_figures_of_a_batch_are_the_worst_ones(position, monkeypatch):
    names = ["gaussian", "hard edge"]
    names.insert(position, "rank deficient by 3")
    matrices = torch.stack([weight(name, 200, 140) for name in names])
    with pytest.warns(UserWarning, match=r"^3 of the 8 smallest .* shape \(3, 200, 140\)") as caught:
        result = minor_subspace(matrices, RANK, method="krylov")
    assert len(caught) == 1
    assert result.method == "svd"
    assert result.null_count == 3
    assert result.certified

    refused = iter(index == position for index in range(3))
    judged = solver.judged

    def one_refused(problem, triplets, strict):
        judgement = judged(problem, triplets, strict)
        return judgement._replace(certified=judgement.certified & (not next(refused)))

    monkeypatch.setattr(solver, "judged", one_refused)
    with pytest.warns(UserWarning, match="not proven"):
        assert not minor_subspace(matrices.mT.contiguous(), RANK, method="svd").certified
