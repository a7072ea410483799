"""The minor subspace against the fp64 SVD, on every spectrum of ``spectra``; what is refused."""

import dataclasses
import math
import re

import pytest
import torch

from mica.dtypes import FLOATING
from mica.subspace import MinorSubspace, krylov, methods, minor_subspace
from mica.subspace.certificate import Certificate
from mica.subspace.content_hash import content_hash
from tests.mica.subspace.subspaces import SHAPES, beginning_with, quietly_solved, same, solved_by
from tests.support.judging import columns, judge, sine, truth
from tests.support.spectra import NULL, RANK, SPECTRA, weight

pytestmark = pytest.mark.filterwarnings("error")

METHODS = ["krylov", "gram", "svd"]
by_each_method = pytest.mark.parametrize("method", METHODS)
of_each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
of_each_large_shape = pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
of_three_shapes = pytest.mark.parametrize("shape", [(60, 40), (40, 60), (140, 200)], ids=str)
in_each_dtype = pytest.mark.parametrize("dtype", FLOATING)
of_each_sign = pytest.mark.parametrize("sign", [1, -1])
by_auto_and_each_method = pytest.mark.parametrize("method", ["auto", *METHODS])


def certified(matrix, rank=RANK, method="auto", determined=True) -> MinorSubspace:
    """The result, judged."""
    result = quietly_solved(matrix, rank, method=method)
    judge(matrix, result, determined)
    assert result.certified
    return result


def with_one_warning(message: str, matrix: torch.Tensor, method: str) -> MinorSubspace:
    with pytest.warns(UserWarning, match=message) as caught, beginning_with(method):
        result = minor_subspace(matrix, RANK)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    return result


# What is found


@by_each_method
@of_each_shape
@pytest.mark.parametrize("name", SPECTRA)
def test_every_spectrum(name, shape, method):
    """Null directions of a tall weight are completed orthonormally, outside range(W), with one warning."""
    matrix, tall = weight(name, *shape), shape[0] > shape[1]
    exact = vectors, squares = truth(matrix)
    null = squares <= 1e-20 * squares[0]
    count = min(RANK, int(null.sum())) if tall and name in NULL else 0
    if count:
        message = f"^{count} of the {RANK} smallest .* a weight of shape .* numerically null"
        result = with_one_warning(message, matrix, method)
        completion = result.basis[:, -count:].double()
        assert torch.linalg.matrix_norm(vectors[:, ~null].T @ completion, 2) <= 1e-6
    else:
        result = solved_by(method, matrix, RANK)
    judge(matrix, result, not count, exact)
    assert result.null_count == count
    assert result.certified
    assert result.energy_excess <= 1 + 1e-5
    if method == "svd" or count:
        assert result.method == "svd"
    elif not tall and method == "gram":
        assert result.method == "gram"
    elif name in ("gaussian", "row scales", "times 1e4", "times 1e-4"):
        assert result.method == (method if krylov.fits(min(shape), RANK) else "gram")


TINY = [(1, 1), (1, 7), (7, 1), (2, 2), (2, 5), (5, 2), (3, 3)]
LARGER = [(60, 40), (40, 60), (50, 50), (200, 140), (140, 200)]


@pytest.mark.parametrize("shape", [*TINY, *LARGER], ids=str)
@by_auto_and_each_method
def test_ranks_from_one_to_all(shape, method):
    for name in ("gaussian", "zero", "flat", "times 1e4") if shape in TINY else ("gaussian",):
        for share in (0.0, 0.3, 0.8, 1.0):
            rank = max(1, round(share * min(shape)))
            certified(weight(name, *shape), rank, method, name != "zero" or shape[0] <= shape[1])


@pytest.mark.parametrize("shape", [(120, 40), (40, 120), (60, 60), (140, 200)], ids=str)
@in_each_dtype
@by_each_method
def test_any_tensor_of_the_same_numbers(shape, dtype, method):
    matrix = weight("gaussian", *shape).to(dtype)
    untouched, result = matrix.clone(), certified(matrix, RANK, method)
    if dtype == torch.float64:
        assert result.basis.dtype == torch.float64
        assert sine(truth(matrix).vectors[:, -RANK:], result.basis) <= 1e-9
    else:  # the same numbers in fp32 give the same bits
        assert result.basis.dtype == torch.float32
        assert same(result, solved_by(method, matrix.float(), RANK))
    padded = torch.full((2 * shape[0], 2 * shape[1]), math.nan, dtype=dtype)
    padded[::2, ::2] = matrix
    trained = matrix.clone().requires_grad_() * 1
    for variant in (torch.nn.Parameter(matrix), trained, columns(matrix), padded[::2, ::2]):
        basis = solved_by(method, variant, RANK).basis
        torch.testing.assert_close(basis, result.basis, rtol=0, atol=1e-6)
        assert not basis.requires_grad
    assert torch.equal(matrix, untouched)


@of_three_shapes
@pytest.mark.parametrize("exponent", [-1074, -1000, -210, 201, 700, 1000])
@of_each_sign
def test_fp64_weights_whose_squares_leave_the_range_are_refused(exponent, sign, shape):
    matrix = weight("flat", *shape).double()
    beyond = matrix * (sign * 2.0**exponent / matrix.max())
    with pytest.raises(ValueError, match=r"largest entry of weight must be between 2\*\*-200 and"):
        minor_subspace(beyond, RANK)
    assert quietly_solved(0 * matrix, RANK).resolution == 0  # a zero weight resolves everything


@of_three_shapes
@pytest.mark.parametrize("exponent", [-200, -150, 150, 200])
def test_fp64_weights_within_the_range(exponent, shape):
    matrix = weight("gaussian", *shape).double()
    matrix = matrix * (2.0 ** -math.ceil(math.log2(matrix.abs().max())))  # its largest entry is in (1/2, 1]
    if exponent < 0:
        matrix = 2 * matrix
    scaled, plain = (solved_by("krylov", m, RANK) for m in (matrix * 2.0**exponent, matrix))
    assert scaled.certified
    assert scaled.method == plain.method
    torch.testing.assert_close(scaled.basis, plain.basis, rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled.singular_values * 2.0**-exponent, plain.singular_values)
    assert scaled.energy_excess == pytest.approx(plain.energy_excess, rel=1e-6, abs=1e-12)
    assert scaled.resolution == pytest.approx(plain.resolution * 4.0**exponent, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
@by_each_method
@of_each_sign
def test_columns_and_signs_are_those_of_the_definition(shape, method, sign):
    """A smaller rank has the last of a larger one's columns."""
    matrix = weight("hard edge", *shape)
    for rank in (1, 5, RANK, 12, 16):
        expected = truth(matrix).vectors[:, -rank:]
        expected = expected * expected.gather(0, expected.abs().argmax(0, keepdim=True)).sign()
        basis = solved_by(method, sign * matrix, rank).basis
        torch.testing.assert_close(basis.double(), expected, rtol=0, atol=2e-6)


# What is not proven


@of_each_shape
@by_auto_and_each_method
def test_what_cannot_be_proven_is_the_svd_s_with_a_warning(shape, method, monkeypatch):
    infinite = torch.tensor(math.inf, dtype=torch.float64)
    refused = Certificate(torch.tensor(False), infinite, torch.zeros((), dtype=torch.float64))
    monkeypatch.setattr("mica.subspace.candidate.certify", lambda *them: refused._replace(read=them[3:]))
    matrix = weight("gaussian", *shape)
    message = r"^the minor subspace of a weight of shape .* is not proven .*'svd'"
    result = with_one_warning(message, matrix, method)
    assert result.method == "svd"
    assert not result.certified
    judge(matrix, dataclasses.replace(result, energy_excess=math.inf))


KRYLOV_FAULTS = {
    "no convergence": lambda values, right: None,
    "wrong vectors": lambda values, right: (values[1:], right[:, 1:]),
    "wrong values, too": lambda values, right: (values[:-1], right[:, 1:]),
}


@of_each_large_shape
@pytest.mark.parametrize("fault", KRYLOV_FAULTS)
def test_falls_back_to_the_gram_from_krylov(shape, fault, monkeypatch):
    def faulty(gram, rank, *rest):
        return KRYLOV_FAULTS[fault](*smallest_eigenpairs(gram, rank + 1, *rest))

    smallest_eigenpairs = krylov.smallest_eigenpairs
    monkeypatch.setattr(krylov, "smallest_eigenpairs", faulty)
    assert certified(weight("gaussian", *shape), RANK, "krylov").method == "gram"


@of_each_large_shape
@pytest.mark.parametrize("name", ["gaussian", "hard edge", "cluster inside", "row scales", "zero"])
def test_a_start_orthogonal_to_the_answer(name, shape, monkeypatch):
    """Rounding and further steps bring the answer in, or it is not proven and another method finds it."""
    matrix = weight(name, *shape)
    exact = truth(matrix if shape[0] < shape[1] else matrix.T).vectors[:, -RANK:]
    starts, random = [], krylov.random_block

    def orthogonal(gram, count):
        block = random(gram, count)
        for _ in range(2):
            block = gram.orthonormal(block - exact @ (exact.T @ block))[0]
        starts.append(torch.linalg.matrix_norm(exact.T @ block).item())
        return block

    monkeypatch.setattr(krylov, "random_block", orthogonal)
    certified(matrix, RANK, "krylov", name not in NULL or shape[0] <= shape[1])
    assert starts
    assert max(starts) <= 1e-12


@of_each_large_shape
@pytest.mark.parametrize("method", ["krylov", "gram"])
def test_falls_back_to_the_svd_from_wrong_vectors(shape, method, monkeypatch):
    matrix, candidate = weight("gaussian", *shape), methods.candidate

    def wrong(problem, values, vectors, norm):
        return candidate(problem, values, vectors.flip(0), norm)

    monkeypatch.setattr(methods, "candidate", wrong)
    assert certified(matrix, RANK, method).method == "svd"


@in_each_dtype
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_a_lazily_negated_weight(dtype, shape):
    """The imaginary part of a conjugate, for example."""
    matrix = weight("gaussian", *shape).to(dtype)
    lazy = torch._neg_view(-matrix)
    expected, actual = minor_subspace(matrix, 3), minor_subspace(lazy, 3)
    assert torch.equal(actual.basis, expected.basis)
    assert torch.equal(actual.singular_values, expected.singular_values)
    assert content_hash(lazy) == content_hash(matrix)


# What is refused


@pytest.mark.parametrize("rank", [0, -1, 41])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=str)
def test_rank_out_of_range(rank, shape):
    expected = rf"^rank must be between 1 and min\(out_features, in_features\) = 40 .* got {rank!r}\.$"
    with pytest.raises(ValueError, match=expected):
        minor_subspace(torch.ones(shape), rank)


@pytest.mark.parametrize("rank", [2.0, "4", None, True, torch.tensor(2)], ids=str)
def test_rank_of_another_type(rank):
    expected = rf"^rank must be an int, but got {re.escape(repr(rank))} of type {type(rank).__name__}\.$"
    with pytest.raises(TypeError, match=expected):
        minor_subspace(torch.ones(40, 60), rank)


@in_each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("transposed", [False, True])
def test_non_finite_weights(dtype, bad, transposed):
    matrix = torch.ones(8, 5, dtype=dtype)
    matrix[2, 3] = matrix[3, 0] = bad
    message = r"^weight must be finite, but got 2 NaN or infinite of 40 entries\.$"
    with pytest.raises(ValueError, match=message):
        minor_subspace(matrix.mT if transposed else matrix, 2)


@pytest.mark.parametrize(
    ("matrix", "error", "text"),
    [
        ([[1.0]], TypeError, "got list"),
        (torch.ones(4, 4, dtype=torch.int64), TypeError, "dtype .* got torch.int64"),
        (torch.ones(4, 4, dtype=torch.complex64), TypeError, "dtype .* got torch.complex64"),
        (torch.eye(4).to_sparse(), TypeError, r"be a dense tensor, but got layout torch.sparse_coo"),
        (torch.eye(4).to_sparse_csr(), TypeError, r"be a dense tensor, but got layout torch.sparse_csr"),
        (torch.nested.nested_tensor([torch.eye(4)]), TypeError, r"be a dense tensor, but got a nested one"),
        (torch.ones(4), ValueError, r"shape \(out_features, in_features\), but got \(4,\)"),
        (torch.ones(2, 4, 4), ValueError, r"shape \(out_features, in_features\), but got \(2, 4, 4\)"),
        (torch.ones(4, 4, device="meta"), ValueError, "meta"),
        *((torch.ones(s), ValueError, f"empty.* {re.escape(str(s))}") for s in ((4, 0), (0, 4))),
    ],
)
def test_unusable_weights(matrix, error, text):
    with pytest.raises(error, match=f"^weight must .*{text}"):
        minor_subspace(matrix, 1)


def test_a_result_is_printed_in_one_line():
    matrix = torch.diag(torch.arange(1.0, 65.0))
    printed = repr(minor_subspace(matrix, 4))
    start = r"MinorSubspace\(basis \(64, 4\) torch\.float32 on cpu, method='\w+', certified=True, "
    assert re.fullmatch(start + r"energy_excess=\d\.\de[+-]\d\d, null_count=0\)", printed)
