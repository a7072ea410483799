"""The largest singular value and the whole spectrum against the fp64 SVD."""

import pytest
import torch

from mica.subspace import gram
from mica.subspace import spectrum as module


@pytest.fixture(params=["host", "batch"])
def kind_of_gram(request, monkeypatch):
    """The Gram matrix of the CPU, and that of accelerators."""
    if request.param == "batch":
        monkeypatch.setattr(module, "is_on_host", lambda device: False)


@pytest.fixture(params=[True, False])
def short_blocks(request, monkeypatch):
    """Weights in one block, and row by row."""
    if request.param:
        monkeypatch.setattr(gram, "BLOCK_ELEMENTS", 1)
        monkeypatch.setattr(gram, "BLOCK_ROWS", 1)


@pytest.mark.parametrize("shape", [(64, 64), (40, 7), (7, 40), (1, 9), (9, 1)])
@pytest.mark.usefixtures("kind_of_gram", "short_blocks")
def test_largest_singular_value(shape):
    for weight in (torch.randn(shape), torch.ones(shape), torch.zeros(shape), torch.randn(shape).bfloat16()):
        expected = torch.linalg.svdvals(weight.double())[0].item()
        assert module.sigma_max(weight) == pytest.approx(expected, rel=1e-7, abs=1e-12)
        squared = weight.double().square().sum().item()
        assert module.squared_norm(weight) == pytest.approx(squared, rel=1e-12)


def graded(out_features, in_features, smallest):
    count = min(out_features, in_features)
    left = torch.linalg.qr(torch.randn(out_features, count, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(in_features, count, dtype=torch.float64)).Q
    return left * torch.logspace(0, smallest, count, dtype=torch.float64) @ right.T


@pytest.mark.parametrize("shape", [(20, 24), (24, 20), (100, 20), (20, 100)])  # the last two: streamed QR
@pytest.mark.usefixtures("kind_of_gram", "short_blocks")
def test_spectrum(shape, monkeypatch):
    weight = graded(*shape, -12)
    expected = torch.linalg.svdvals(weight)
    torch.testing.assert_close(module.spectrum(weight), expected, rtol=1e-9, atol=1e-15)
    monkeypatch.setattr(module, "LARGEST_SVD", 19)
    by_gram = module.spectrum(weight)  # clipped where a Gram matrix shows nothing
    floor = 2 * (20**0.5 * torch.finfo(torch.float64).eps) ** 0.5
    torch.testing.assert_close(by_gram, expected.clamp_min(floor), rtol=0.3, atol=0)
    torch.testing.assert_close(by_gram[:6], expected[:6], rtol=1e-6, atol=0)
