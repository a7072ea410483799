"""``BatchGram`` is every matrix's ``HostGram``, and bounds the error of its fp32 products."""

import math

import pytest
import torch

from mica.subspace import batched
from mica.subspace import gram as products
from mica.subspace.batched import BatchGram
from mica.subspace.host import HostGram
from tests.support.spectra import weight
from tests.support.tolerances import error

UNIT = torch.eye(30, dtype=torch.float64)


def talls(dtype=torch.float32) -> torch.Tensor:
    names = ["gaussian", "row scales", "times 1e-4"]
    return torch.stack([weight(name, 70, 30) for name in names]).to(dtype)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.double().mT @ matrices.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_method_is_that_of_the_single_matrices(dtype, transposed):
    tall = talls(dtype).mT.contiguous().mT if transposed else talls(dtype)
    batch, singles, exact = BatchGram(tall), [HostGram(t) for t in tall], dense(tall)
    assert (batch.size, batch.batch_shape, batch.device) == (30, (3,), torch.device("cpu"))
    assert torch.equal(batch.error, torch.zeros(3, dtype=torch.float64))
    values = torch.linalg.eigvalsh(exact)
    vectors = random(3, 30, 4)
    columns = [v.T.contiguous().T for v in vectors]

    def same(actual, expected, tolerance=1e-12):
        for each, single in zip(actual, expected, strict=True):
            assert error(each, single) <= tolerance

    same(batch.apply(UNIT), exact, 1e-14)
    same(batch.apply(vectors), [gram.apply(c) for gram, c in zip(singles, columns, strict=True)])
    shift = values[:, 0] * 0.5
    assert batch.factor(shift).tolist() == [True] * 3
    assert all(gram.factor(s) for gram, s in zip(singles, shift, strict=True))
    same(batch.solve(vectors), [gram.solve(c) for gram, c in zip(singles, columns, strict=True)], 1e-9)
    smallest = batch.smallest(5)
    for basis, single, each in zip(smallest, singles, exact, strict=True):
        assert error(basis @ basis.T, single.smallest(5) @ single.smallest(5).T) <= 1e-9
        assert error(basis.T @ each @ basis, torch.linalg.eigvalsh(each)[:5].diag()) <= 1e-9
    raised = torch.linalg.eigh(exact).eigenvectors[..., :2].contiguous()
    for share, expected in ((0.999, True), (1.001, False)):
        bound = share * values[:, 2]
        assert batch.exceeds(raised, 2 * values[:, -1], bound).tolist() == [expected] * 3
        for index, gram in enumerate(singles):
            minor = raised[index].T.contiguous().T
            assert gram.exceeds(minor, 2 * values[index, -1], bound[index]) == expected
    same(batch.apply(UNIT), exact, 1e-14)

    left, right, coefficients = random(3, 30, 4), random(3, 30, 2, seed=1), random(3, 4, 2, seed=2)
    same(batch.inner(left, right), left.mT @ right)
    same(batch.combine(left, coefficients), left @ coefficients)
    same(batch.subtract(right.clone(), left, coefficients), right - left @ coefficients)
    empty = batch.empty(6)
    assert (empty.shape, empty.dtype) == ((3, 30, 6), torch.float64)


def test_a_factor_and_a_proof_say_which_matrix_failed():
    tall = talls()
    gram, (values, vectors) = BatchGram(tall), torch.linalg.eigh(dense(tall))
    for failing in ([0], [1], [2], [0, 2], [0, 1, 2]):
        good = torch.tensor([index not in failing for index in range(3)])
        share = torch.where(good, 0.9, 1.1)
        assert torch.equal(gram.factor(values[:, 0] * share), good)
        assert torch.equal(gram.exceeds(vectors[..., :3], 2 * values[:, -1], values[:, 3] * share), good)
    assert gram.factor(values[:, 0] * 0.9).all()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", ["independent", "dependent", "zero"])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_orthonormal_vectors_of_all_or_none(kind, count, scale):
    gram = BatchGram(talls())
    vectors = scale * random(3, 30, count)
    if kind == "zero":
        vectors[1, :, -1] = 0
    elif kind == "dependent":
        vectors[1, :, -1] = 1e-9 * vectors[1, :, -1] + vectors[1, :, 0] * (count > 1)
    basis, triangle, safe = gram.orthonormal(vectors)
    assert safe == (kind == "independent" or (kind, count) == ("dependent", 1))
    for each, factor, before in zip(basis, triangle, vectors, strict=True):
        assert error(each.T @ each, torch.eye(count, dtype=torch.float64)) <= 1e-13
        assert error(each @ factor, before) <= 1e-13
        assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300, 600])
@pytest.mark.parametrize("mixed", [False, True])
def test_panels_and_blocks(size, mixed, monkeypatch):
    """One panel, several, and a last one that is narrower; several blocks of rows."""
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(products, "BLOCK_ROWS", 100)
    tall = torch.stack([weight("gaussian", 2 * size + 5, size)] * 2)
    tall[1] *= 3
    gram = BatchGram(tall, mixed).apply(torch.eye(size, dtype=torch.float64))
    assert error(gram, dense(tall)) <= (1e-6 if mixed else 1e-14)
    assert mixed == (error(gram, dense(tall)) > 1e-12) or size == 1
    assert error(gram, gram.mT) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gaussian", "hard edge", "row scales", "graded to 1e-7", "rank 5"])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e12, 1e-30])
def test_the_error_bound_of_mixed_products(name, dtype, scale):
    """Above the exact norm and below 20 times it; with underflow, the norm of the whole matrix."""
    tall = (torch.stack([weight(name, 900, 80), weight("gaussian", 900, 80)]).double() * scale).to(dtype)
    gram = BatchGram(tall, mixed=True)
    differences = dense(tall) - gram.apply(torch.eye(80, dtype=torch.float64))
    norms = torch.linalg.matrix_norm(differences, 2)
    assert gram.error.dtype == torch.float64
    assert (gram.error >= norms).all()
    assert (gram.error <= 20 * norms + 1e-14 * torch.linalg.matrix_norm(dense(tall), 2)).all()


def test_the_error_bound_sees_one_wrong_entry():
    gram = BatchGram(talls(), mixed=True)
    wrong = dense(talls())
    wrong[1, 3, 5] += 1e-3
    wrong[1, 5, 3] += 1e-3
    bounds = batched.error_bound(talls(), wrong)
    assert 1e-3 <= bounds[1] <= 2e-2
    assert bounds[0] <= gram.error[0]


@pytest.mark.parametrize(
    ("capability", "weak"),
    [
        ((6, 0), False), ((6, 1), True), ((7, 0), False), ((7, 5), True), ((8, 0), False), ((8, 6), True),
        ((8, 9), True), ((9, 0), False), ((10, 0), False), ((10, 3), True), ((12, 0), True),
    ],
)  # fmt: skip
def test_cuda_devices_with_weak_fp64(capability, weak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert batched.has_weak_fp64(torch.device("cuda")) == weak
    assert not batched.has_weak_fp64(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not batched.has_weak_fp64(torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mixed_products_where_they_are_precise_and_finite(dtype, monkeypatch):
    wide = torch.ones(2, 10, 20, dtype=dtype)
    assert not batched.may_be_mixed(wide)
    monkeypatch.setattr(batched, "has_weak_fp64", lambda device: True)
    assert batched.may_be_mixed(wide)
    assert batched.may_be_mixed(wide.mT)
    assert not batched.may_be_mixed(torch.ones(2, 11, 20, dtype=dtype))
    for sign in (1, -1):
        wide[1, 2, 3] = sign * 2.0**50
        assert batched.may_be_mixed(wide)
        assert torch.isfinite(BatchGram(wide.mT, mixed=True).error).all()
        wide[1, 2, 3] = sign * 2.0**51
        assert not batched.may_be_mixed(wide)
    assert math.isfinite(wide.double().square().sum())
