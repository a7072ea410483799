"""All linear weights of SmolLM2-135M and its embedding, against fp64 eigenvectors."""

import warnings

import pytest
import torch

from mica.subspace import krylov, minor_subspace
from tests.support.judging import Truth, judge, resolution
from tests.support.models import smollm2

# What squaring loses of a squared singular value, in resolutions: below, the oracle is the weight's own SVD.
SQUARED_IS_FINE = 1e5


def linears() -> list[tuple[str, torch.Tensor]]:
    model = smollm2()
    named = [
        (name, module.weight.detach())
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    embedding = model.get_input_embeddings().weight.detach()
    return [*named, ("embedding", embedding.T)]


def truth(matrix: torch.Tensor) -> Truth:
    """By PyTorch's eigensolver on the fp64 Gram, where that is exact enough, else by the fp64 SVD."""
    tall = matrix.shape[0] > matrix.shape[1]
    exact = (matrix if tall else matrix.T).double()
    values, vectors = torch.linalg.eigh(exact.T @ exact)
    if values[0] < SQUARED_IS_FINE * resolution(len(values), values[-1].item()):
        long, values, short = torch.linalg.svd(exact, full_matrices=False)
        return Truth(long if tall else short.T, values.square())
    values, vectors = values.flip(0), vectors.flip(1)
    return Truth(exact @ vectors / values.sqrt() if tall else vectors, values)


@pytest.fixture(scope="module")
def weights():
    return [(name, weight, truth(weight)) for name, weight in linears()]


def test_what_there_is(weights):
    assert len(weights) == 211
    assert {tuple(weight.shape) for _, weight, _ in weights} == {
        (576, 576), (192, 576), (1536, 576), (576, 1536), (576, 49152),
    }  # fmt: skip


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("method", ["auto", "krylov"])
def test_every_weight_is_certified_and_right(weights, rank, method, monkeypatch):
    monkeypatch.setattr(krylov, "FIRST_CHECK", 4)  # room for 32 vectors of 576
    count = 0
    for name, weight, exact in weights:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = minor_subspace(weight, rank, method=method)
        assert result.certified, name
        try:
            judge(weight, result, exact=exact)
        except AssertionError as error:
            raise AssertionError(name) from error
        count += result.method == "krylov"
    # 192 is too small for Krylov subspaces, and of 576 they do not always converge.
    assert count == 0 if method == "auto" else count > 0.5 * len(weights)
