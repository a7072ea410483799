"""On an accelerator no product mixes tensors of the device and of the host, which the CPU cannot show."""

from dataclasses import replace

import pytest
import torch

from mica.subspace import content_hash, krylov, solver
from tests.mica.subspace.foreign_device import DEVICE, ForeignDevice, OnDevice
from tests.support.judging import judge
from tests.support.spectra import weight as spectrum


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((256, 256), "gaussian"),
        ((256, 256), "row scales"),
        ((300, 256), "gaussian"),
        ((300, 256), "tail x 1e-6"),
        ((256, 300), "gaussian"),
        ((256, 300), "rank deficient by most"),
        ((128, 160), "gaussian"),  # where no subspaces fit
    ],
    ids=str,
)
def test_certified_results_on_the_device(shape, name, monkeypatch):
    monkeypatch.setattr(krylov, "FIRST_CHECK", 3)
    matrix = spectrum(name, *shape)
    with ForeignDevice():
        result = solver.solve(OnDevice(matrix), 16)
    assert result.certified
    assert result.basis.device == result.singular_values.device == DEVICE
    judge(matrix, replace(result, basis=result.basis.host, singular_values=result.singular_values.host))


def test_content_hashes_of_a_device():
    weight = torch.randn(300, 70)
    with ForeignDevice():
        key = content_hash.content_hash(OnDevice(weight))
    assert key == content_hash.content_hash(weight)
