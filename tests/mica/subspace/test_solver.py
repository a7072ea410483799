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
from tests.support.judging import columns, judge, sine, truth
from tests.support.spectra import NULL, RANK, SPECTRA, stack, weight
from tests.support.subspaces import quietly_solved, same

# Tall, wide, square; small sides without and (from 128 on: conftest) with room for Krylov subspaces.
SHAPES = [(120, 40), (40, 120), (60, 60), (200, 140), (140, 200), (150, 150)]
METHODS = ["krylov", "gram", "svd"]
by_each_method = pytest.mark.parametrize("method", METHODS)
of_each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def solve(matrix: torch.Tensor, rank: int = RANK, method: str = "auto", **options) -> MinorSubspace:
    return quietly_solved(matrix, rank, method=method, **options)


def certified(matrix: torch.Tensor, *arguments, determined: bool = True, **options) -> MinorSubspace:
    """The result, judged."""
    result = solve(matrix, *arguments, **options)
    judge(matrix, result, determined)
    assert result.certified
    return result


def with_one_warning(message: str, matrix: torch.Tensor, method: str) -> MinorSubspace:
    with pytest.warns(UserWarning, match=message) as caught:
        result = minor_subspace(matrix, RANK, method=method)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    return result


# What is found


@by_each_method
@of_each_shape
@pytest.mark.parametrize("name", SPECTRA)
def test_every_spectrum(name, shape, method):
    """Null directions of a tall weight are completed orthonormally, outside range(W), with one warning."""
    matrix = weight(name, *shape)
    tall = shape[0] > shape[1]
    if tall and name in NULL:
        vectors, squares = truth(matrix)
        kept = squares > 1e-20 * squares[0]
        count = min(RANK, int((~kept).sum()))
        message = f"^{count} of the {RANK} smallest .* a weight of shape .* numerically null"
        result = with_one_warning(message, matrix, method)
        assert result.null_count == count
        completion = result.basis[:, -count:].double()
        assert torch.linalg.matrix_norm(vectors[:, kept].T @ completion, 2) <= 1e-6
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = minor_subspace(matrix, RANK, method=method)
        assert result.null_count == 0
    judge(matrix, result, determined=not result.null_count)
    assert result.certified
    assert result.energy_excess <= 1 + 1e-5
    if method == "svd" or result.null_count:
        assert result.method == "svd"
    elif not tall and method == "gram":
        assert result.method == "gram"
    elif name in ("gaussian", "row scales", "times 1e4", "times 1e-4"):
        assert result.method == (method if krylov.fits(min(shape), RANK) else "gram")


TINY = [(1, 1), (1, 7), (7, 1), (2, 2), (2, 5), (5, 2), (3, 3)]
LARGER = [(60, 40), (40, 60), (50, 50), (200, 140), (140, 200)]


@pytest.mark.parametrize("shape", [*TINY, *LARGER], ids=str)
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_ranks_from_one_to_all(shape, method):
    for name in ("gaussian", "zero", "flat", "times 1e4") if shape in TINY else ("gaussian",):
        for share in (0.0, 0.3, 0.8, 1.0):
            rank = max(1, round(share * min(shape)))
            determined = not (name == "zero" and shape[0] > shape[1])
            certified(weight(name, *shape), rank, method, determined=determined)


@pytest.mark.parametrize("shape", [(120, 40), (40, 120), (60, 60), (140, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@by_each_method
def test_input_dtypes(shape, dtype, method):
    matrix = weight("gaussian", *shape).to(dtype)
    result = certified(matrix, RANK, method)
    assert result.basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype != torch.float64:  # the same numbers in fp32 give the same bits
        assert same(result, solve(matrix.float(), RANK, method))
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
    assert solve(0 * matrix).resolution == 0  # a zero weight resolves everything


@pytest.mark.parametrize("shape", [(120, 40), (40, 120), (60, 60), (200, 140), (140, 200)], ids=str)
@by_each_method
@pytest.mark.parametrize("sign", [1, -1])
def test_columns_and_signs_are_those_of_the_definition(shape, method, sign):
    """Of a smaller rank the last ones."""
    matrix = weight("hard edge", *shape)
    for rank in (1, 5, RANK, 12, 16):
        expected = truth(matrix).vectors[:, -rank:]
        expected = expected * expected.gather(0, expected.abs().argmax(0, keepdim=True)).sign()
        basis = solve(sign * matrix, rank, method).basis
        torch.testing.assert_close(basis.double(), expected, rtol=0, atol=2e-6)


# The same again


@of_each_shape
@by_each_method
@pytest.mark.parametrize("name", ["gaussian", "rank 5"])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_call_same_bits(shape, method, name, threads):
    torch.set_num_threads(threads)
    matrix = weight(name, *shape)
    state = torch.get_rng_state()
    assert same(solve(matrix, RANK, method), solve(matrix.clone(), RANK, method))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("shape", "dtype"), [((200, 140), torch.float32), ((150, 150), torch.float64)])
def test_seeds_start_elsewhere_and_end_at_the_same_subspace(shape, dtype):
    matrix = weight("gaussian", *shape).to(dtype)
    first, again, other = (solve(matrix, RANK, "krylov", seed=seed) for seed in (1, 1, 2))
    assert (first.method, other.method) == ("krylov", "krylov")
    assert same(first, again)
    assert not torch.equal(first.basis, other.basis)
    torch.testing.assert_close(first.basis, other.basis, rtol=0, atol=1e-6)


@by_each_method
@pytest.mark.parametrize("shape", [(60, 40), (140, 200)], ids=str)
def test_any_tensor_of_the_same_numbers(method, shape):
    matrix = weight("gaussian", *shape)
    untouched = matrix.clone()
    expected = solve(matrix, RANK, method).basis
    padded = torch.full((2 * shape[0], 2 * shape[1]), math.nan)
    padded[::2, ::2] = matrix
    trained = matrix.clone().requires_grad_() * 1
    for variant in (torch.nn.Parameter(matrix), trained, columns(matrix), padded[::2, ::2]):
        basis = solve(variant, RANK, method).basis
        torch.testing.assert_close(basis, expected, rtol=0, atol=1e-6)
        assert not basis.requires_grad
    assert torch.equal(matrix, untouched)


@pytest.mark.parametrize("count", [1, 2])
@by_each_method
def test_thread_counts_are_the_caller_s_again(count, method, monkeypatch):
    def threads() -> list[int]:
        return [torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())]

    def broken(*arguments):
        raise RuntimeError("broken")

    torch.set_num_threads(count)
    before = threads()
    solve(weight("gaussian", 140, 200), RANK, method)
    assert threads() == before
    for name in ("mica.subspace.candidate.certify", "mica.subspace.host.HostGram.apply"):
        monkeypatch.setattr(name, broken)
        with pytest.raises(RuntimeError, match="broken"):
            solve(weight("gaussian", 140, 200), RANK, method)
        assert threads() == before


# What is not proven


@of_each_shape
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_what_cannot_be_proven_is_the_svd_s_with_a_warning(shape, method, monkeypatch):
    infinite = torch.tensor(math.inf, dtype=torch.float64)
    refused = Certificate(torch.tensor(False), infinite, torch.zeros((), dtype=torch.float64))
    monkeypatch.setattr("mica.subspace.candidate.certify", lambda *arguments: refused)
    matrix = weight("gaussian", *shape)
    message = r"^the minor subspace of a weight of shape .* is not proven .*'svd'"
    result = with_one_warning(message, matrix, method)
    assert result.method == "svd"
    assert not result.certified
    judge(matrix, dataclasses.replace(result, energy_excess=math.inf))


KRYLOV_FAULTS = {
    "no factor": lambda right: None,
    "wrong vectors": lambda right: krylov.Ritz(right[:, 1:], True),
    "not converged": lambda right: krylov.Ritz(right[:, :-1], False),
}


@of_each_shape
def test_falls_back_to_the_svd_from_wrong_eigenvectors(shape, monkeypatch):
    monkeypatch.setattr(
        "mica.subspace.host.partial_eigenvectors",
        lambda matrix, count: np.linalg.eigh(matrix, UPLO="L").eigenvectors[:, -count:],
    )
    assert certified(weight("gaussian", *shape), RANK, "gram").method == "svd"


@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
@pytest.mark.parametrize("fault", KRYLOV_FAULTS)
def test_falls_back_to_the_gram_from_krylov(shape, fault, monkeypatch):
    def faulty(gram, rank, *rest):
        return KRYLOV_FAULTS[fault](smallest_eigenvectors(gram, rank + 1, *rest).vectors)

    smallest_eigenvectors = krylov.smallest_eigenvectors
    monkeypatch.setattr(krylov, "smallest_eigenvectors", faulty)
    assert certified(weight("gaussian", *shape), RANK, "krylov").method == "gram"


@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "hard edge", "cluster inside", "row scales", "zero"])
def test_a_start_orthogonal_to_the_answer(name, shape, monkeypatch):
    """Rounding and further steps bring the answer in, or it is not proven and another method finds it."""
    matrix = weight(name, *shape)
    exact = truth(matrix if shape[0] < shape[1] else matrix.T).vectors[:, -RANK:]
    starts = []

    def orthogonal(gram, count, seed):
        block = random(gram, count, seed)
        for _ in range(2):
            block = gram.orthonormal(block - exact @ (exact.T @ block))[0]
        starts.append(torch.linalg.matrix_norm(exact.T @ block).item())
        return block

    random = krylov.random_block
    monkeypatch.setattr(krylov, "random_block", orthogonal)
    certified(matrix, RANK, "krylov", determined=not (name in NULL and shape[0] > shape[1]))
    assert starts
    assert max(starts) <= 1e-12


@by_each_method
@of_each_shape
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


@pytest.mark.parametrize("method", ["krylov", "gram"])
def test_without_strict_nothing_falls_back(method, monkeypatch):
    matrix = weight("gaussian", 150, 150)
    candidate = methods.candidate
    monkeypatch.setattr(methods, "candidate", lambda problem, vectors: candidate(problem, vectors.flip(0)))
    assert solve(matrix, RANK, method, strict=False).method == method
    assert solve(matrix, RANK, method).method == "svd"


# Batches


@pytest.mark.parametrize("shape", [(50, 40), (40, 50), (140, 150)], ids=str)
@pytest.mark.parametrize("leading", [(1,), (3,), (2, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("method", ["krylov", "gram"])
def test_a_batch_is_its_matrices_one_by_one(shape, leading, method):
    names = ["gaussian", "hard edge", "times 1e-4", "row scales", "times 1e4", "flat"]
    matrices = stack(names[: math.prod(leading)], shape).reshape(*leading, *shape)
    strided = torch.full((*leading, shape[1], 2 * shape[0]), math.nan).mT
    strided[..., ::2, :] = matrices
    for batch in (matrices, strided[..., ::2, :]):
        result = solve(batch, RANK, method)
        each = [solve(single, RANK, method) for single in batch.reshape(-1, *shape)]
        assert result.basis.shape == (*leading, shape[0], RANK)
        assert result.basis.is_contiguous()
        assert result.singular_values.shape == (*leading, RANK)
        for index, single in enumerate(matrices.reshape(-1, *shape)):
            judge(single, each[index])
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
    matrices = stack(names, (200, 140))
    result = with_one_warning(r"^3 of the 8 smallest .* shape \(3, 200, 140\)", matrices, "krylov")
    assert (result.method, result.null_count, result.certified) == ("svd", 3, True)

    refused = iter(index == position for index in range(3))
    judged = solver.judged

    def one_refused(problem, triplets, strict):
        judgement = judged(problem, triplets, strict)
        return judgement._replace(certified=judgement.certified & (not next(refused)))

    monkeypatch.setattr(solver, "judged", one_refused)
    with pytest.warns(UserWarning, match="not proven"):
        assert not minor_subspace(matrices.mT.contiguous(), RANK, method="svd").certified
