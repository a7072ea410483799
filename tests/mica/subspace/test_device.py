"""Matrices as an accelerator solves them, here on the CPU: certified there, or left to the host."""

import math
from dataclasses import replace

import pytest
import torch

from mica.subspace import device, krylov, minor_subspace
from mica.subspace.device import DeviceGram, solve_on_device
from tests.mica.subspace.subspaces import quietly_solved
from tests.support.judging import assert_orthonormal, gram_of, judge, random
from tests.support.spectra import NULL, RANK, SPECTRA, weight
from tests.support.tolerances import error

SHAPES = [(200, 140), (140, 200), (150, 150), (60, 40), (40, 60)]
EASY = ["gaussian", "hard edge", "times 1e4", "row scales"]


def solved(matrix: torch.Tensor, method: str = "auto", rank: int = RANK):
    """The certified result, judged, or None."""
    result = solve_on_device(matrix, rank, method)
    if result is not None:
        judge(matrix, result)
        assert result.certified
        assert result.null_count == 0
    return result


@pytest.mark.parametrize("method", ["krylov", "gram"])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 140)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_every_spectrum(name, shape, method):
    result = solved(weight(name, *shape), method)
    tall, room = shape[0] > shape[1], krylov.fits(min(shape), RANK)
    if method == "krylov" and not room:
        assert result is None
        return
    if result is not None:
        assert result.method == method
    if name in ("gaussian", "row scales"):
        assert result is not None
    if tall and name in NULL:
        assert result is None
    if method == "gram" and not (tall and (name in NULL or name.startswith("graded"))):
        assert result is not None


@pytest.mark.parametrize("shape", [(200, 140), (140, 200)], ids=str)
def test_what_is_not_certified_is_the_host_s(shape, monkeypatch, accelerated):
    judged = device.judge
    monkeypatch.setattr(device, "judge", lambda *them: replace(judged(*them), certified=False))
    matrix = weight("gaussian", *shape)
    assert solve_on_device(matrix, RANK, "auto") is None
    assert minor_subspace(matrix, RANK).certified


@pytest.mark.parametrize("shape", [(60, 40), (140, 200)], ids=str)
def test_what_is_the_host_s_from_the_start(shape, calls_of):
    made, size = calls_of(device, "DeviceGram"), min(shape)
    for name in EASY:
        matrix = weight(name, *shape)
        for method, rank in (("svd", RANK), ("auto", 3 * size // 4 + 1), ("krylov", 3 * size // 4)):
            assert solved(matrix, method, rank) is None
        assert not made
        assert solved(matrix, "auto", 3 * size // 4) is not None
        made.clear()


@pytest.mark.parametrize("shape", [(200, 140), (40, 60)], ids=str)
def test_minor_subspace_on_an_accelerator(shape, accelerated):
    """With what that leaves out from the host."""
    for name in ("gaussian", "rank 5", "row scales", "times 1e4", "zero", "times 1e-4"):
        matrix = weight(name, *shape)
        result = quietly_solved(matrix, RANK)
        judge(matrix, result, name not in NULL)
        assert result.certified
        on_device = "krylov" if krylov.fits(min(shape), RANK) else "gram"
        assert result.method == ("svd" if shape[0] > shape[1] and name in NULL else on_device)


# The Gram matrix


def test_a_factor_and_a_proof_say_whether_there_is_one():
    tall = weight("gaussian", 70, 30)
    gram, (values, vectors) = DeviceGram(tall), torch.linalg.eigh(gram_of(tall))
    for share, is_there in ((0.9, True), (1.1, False), (0.9, True)):
        assert gram.factor(values[0] * share) == is_there
        assert gram.exceeds(vectors[:, :3], 2 * values[-1], values[3] * share) == is_there


@pytest.mark.parametrize("least", [1, 1e-5, 1e-9, 0])
def test_the_svd_of_thin_matrices(least):
    left, right = torch.linalg.qr(random(70, 5)).Q, torch.linalg.qr(random(5, 5)).Q
    values = torch.logspace(0, math.log10(least) if least else -3, 5, dtype=torch.float64)
    values[-1] *= least > 0
    basis, found, rotation = DeviceGram(weight("gaussian", 70, 30)).svd(left * values @ right)
    assert error(found, values) <= 1e-14
    assert_orthonormal(basis)
    assert error(basis * found @ rotation, left * values @ right) <= 1e-14


def test_the_gram_in_panels():
    """Of 300 columns there are three, of which the last is narrower."""
    tall = random(320, 300)
    assert error(DeviceGram(tall).apply(torch.eye(300, dtype=torch.float64)), gram_of(tall)) <= 1e-13
