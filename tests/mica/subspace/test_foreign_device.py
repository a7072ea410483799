"""On an accelerator no product mixes tensors of the device and of the host, which the CPU cannot show."""

from dataclasses import replace

import pytest
import torch

from mica.subspace import content_hash, krylov, solver
from tests.mica.subspace.foreign_device import DEVICE, ForeignDevice, OnDevice
from tests.support.judging import judge
from tests.support.spectra import stack


@pytest.mark.parametrize(
    ("shape", "names", "rank"),
    [
        ((256, 256), ["gaussian", "row scales"], 16),
        ((300, 256), ["gaussian", "tail x 1e-6"], 16),
        ((256, 300), ["gaussian", "rank deficient by most"], 16),
        ((128, 160), ["gaussian"], 16),  # where no subspaces fit
    ],
    ids=str,
)
def test_certified_results_on_the_device(shape, names, rank, monkeypatch):
    monkeypatch.setattr(krylov, "FIRST_CHECK", 3)
    monkeypatch.setattr(solver, "_check_weight", lambda weight: None)  # it refuses this device's name
    matrices = stack(names, shape)
    with ForeignDevice():
        results = solver.solve_stack(OnDevice(matrices), rank)
    for matrix, result in zip(matrices, results, strict=True):
        assert result.certified
        assert result.basis.device == result.singular_values.device == DEVICE
        judge(matrix, replace(result, basis=result.basis.host, singular_values=result.singular_values.host))


def test_content_hashes_of_a_device():
    weight = torch.randn(300, 70)
    with ForeignDevice():
        key = content_hash.content_hash(OnDevice(weight))
    assert key == content_hash.content_hash(weight)
