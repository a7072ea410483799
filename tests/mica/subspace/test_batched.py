"""Gram matrices of a batch: which one failed, and the SVD of thin matrices."""

import math

import pytest
import torch

from mica.subspace.batched import BatchGram
from tests.support.judging import assert_orthonormal, gram_of, random
from tests.support.spectra import stack
from tests.support.tolerances import error


def talls() -> torch.Tensor:
    return stack(["gaussian", "row scales", "times 1e-4"], (70, 30))


def test_a_gram_of_several_panels():
    tall, vectors = random(2, 310, 300), random(2, 300, 3)
    assert error(BatchGram(tall).apply(vectors), gram_of(tall) @ vectors) <= 1e-14


def test_a_factor_and_a_proof_say_which_matrix_failed():
    tall = talls()
    gram, (values, vectors) = BatchGram(tall), torch.linalg.eigh(gram_of(tall))
    for failing in ([0], [1], [2], [0, 2], [0, 1, 2]):
        good = torch.tensor([index not in failing for index in range(3)])
        share = torch.where(good, 0.9, 1.1)
        assert torch.equal(gram.factor(values[:, 0] * share), good)
        assert torch.equal(gram.exceeds(vectors[..., :3], 2 * values[:, -1], values[:, 3] * share), good)
    assert gram.factor(values[:, 0] * 0.9).all()


@pytest.mark.parametrize("least", [1, 1e-5, 1e-9, 0])
def test_the_svd_of_thin_matrices(least):
    left, right = torch.linalg.qr(random(3, 70, 5)).Q, torch.linalg.qr(random(3, 5, 5)).Q
    values = torch.logspace(0, math.log10(least) if least else -3, 5, dtype=torch.float64)
    values[-1] *= least > 0
    basis, found, rotation = BatchGram(talls()).svd(left * values @ right)
    assert error(found, values.expand(3, 5)) <= 1e-14
    assert_orthonormal(basis)
    assert error(basis * found[:, None] @ rotation, left * values @ right) <= 1e-14
