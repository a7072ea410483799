"""The largest singular value and the whole spectrum are the dense ones."""

import itertools

import pytest
import torch

from mica.cli import spectrum
from mica.subspace import device, gram
from tests.support.spectra import from_values

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=itertools.product([False, True], repeat=2), ids=str)
def _either_gram_and_blocks(request, monkeypatch):
    """The Gram matrix of the CPU, and that of accelerators; weights in one block, and row by row."""
    on_device, row_by_row = request.param
    if on_device:
        monkeypatch.setattr(device, "ON_HOST", ())
    if row_by_row:
        monkeypatch.setattr(gram, "BLOCK_ROWS", 1)
        monkeypatch.setattr(gram, "BLOCK_ELEMENTS", 1)


@pytest.mark.parametrize("shape", [(64, 64), (40, 7), (7, 40), (1, 9), (9, 1)])
@pytest.mark.usefixtures("_either_gram_and_blocks")
def test_largest_singular_value(shape):
    for matrix in (torch.randn(shape), torch.ones(shape), torch.zeros(shape), torch.randn(shape).bfloat16()):
        expected = torch.linalg.svdvals(matrix.double())[0].item()
        assert spectrum.sigma_max(matrix) == pytest.approx(expected, rel=1e-7, abs=1e-12)
        squared = matrix.double().square().sum().item()
        assert spectrum.squared_norm(matrix) == pytest.approx(squared, rel=1e-12)


@pytest.mark.parametrize("shape", [(20, 24), (24, 20), (100, 20), (20, 100)])  # the last two: streamed QR
@pytest.mark.usefixtures("_either_gram_and_blocks")
def test_spectrum(shape, monkeypatch):
    graded = torch.logspace(0, -12, 20, dtype=torch.float64)
    matrix = from_values(lambda count: graded)(*shape, torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(spectrum.spectrum(matrix), expected, rtol=1e-9, atol=1e-15)
    monkeypatch.setattr(spectrum, "LARGEST_SVD", 19)
    by_gram = spectrum.spectrum(matrix)  # clipped where a Gram matrix shows nothing
    floor = 2 * (20**0.5 * torch.finfo(torch.float64).eps) ** 0.5
    torch.testing.assert_close(by_gram, expected.clamp_min(floor), rtol=0.3, atol=0)
    torch.testing.assert_close(by_gram[:6], expected[:6], rtol=1e-6, atol=0)
