"""How often the host waits for an accelerator, and how many operators it dispatches: counted on the CPU."""

from dataclasses import replace

import pytest
import torch

from mica.subspace import content_hash, krylov, solver
from tests.mica.subspace.counted_device import DEVICE, CountedDevice, OnDevice
from tests.support.judging import judge
from tests.support.spectra import stack

RANK = 16
WIDE = (512, 1408)


@pytest.fixture
def counted(monkeypatch):
    """What it took to solve matrices there: each proven, on the device and right."""
    monkeypatch.setattr(krylov, "FIRST_CHECK", 7)
    monkeypatch.setattr(solver, "_check_weight", lambda weight: None)  # it refuses this device's name

    def solved(matrices: torch.Tensor, rank: int = RANK) -> CountedDevice:
        with CountedDevice() as device:
            results = solver.solve_each(OnDevice(matrices), rank)
        for result in results:
            assert result.certified
            assert result.basis.device == result.singular_values.device == DEVICE
        for index in {0, len(results) - 1}:
            basis, values = results[index].basis.host, results[index].singular_values.host
            judge(matrices[index], replace(results[index], basis=basis, singular_values=values))
        return device

    return solved


@pytest.mark.parametrize(
    ("shape", "batches", "waits", "operators"),
    [
        ((512, 512), (1, 8), 10, 1100),
        (WIDE, (1, 8), 10, 1350),
        ((1408, 512), (1, 8), 10, 1400),
        ((128, 160), (4,), 7, 300),  # where no subspaces fit
    ],
    ids=str,
)
def test_a_batch_waits_ten_times_at_most(shape, batches, waits, operators, counted):
    """And dispatches as much whether of one matrix or of eight, but for what is done for each result."""
    for batch in batches:
        device = counted(torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)))
        assert 3 <= device.waits.total() <= waits
        assert device.operators.total() <= operators


def test_fp32_products_and_factors_take_few_waits_too(counted, weak_fp64):
    device = counted(torch.randn(2, *WIDE, generator=torch.Generator().manual_seed(0)))
    assert device.waits.total() <= 12
    assert device.operators.total() <= 1750


@pytest.mark.parametrize("shape", [(500, 500), (480, 700)], ids=str)
def test_trust_in_vain_is_noticed(shape, counted):
    """Then the batch is solved step by step, with a wait for each."""
    assert counted(stack(["gaussian", "rank deficient by most"], shape), 8).waits.total() > 20


@pytest.mark.parametrize(("chunks", "waits"), [(64, 1), (3, 3)])
def test_a_content_hash_is_copied_in_large_pieces(chunks, waits, monkeypatch):
    weight = torch.randn(3000, 700)  # 8.01 MiB
    monkeypatch.setattr(content_hash, "is_weight", lambda weight: True)
    monkeypatch.setattr(content_hash, "_COPIED_CHUNKS", chunks)
    with CountedDevice() as device:
        key = content_hash.content_hash(OnDevice(weight))
    assert key == content_hash.content_hash(weight)
    assert device.waits.total() == waits


def test_a_quick_content_hash_copies_nothing_but_sums(monkeypatch):
    weight = torch.randn(300, 70)
    monkeypatch.setattr(content_hash, "is_weight", lambda weight: True)
    with CountedDevice() as device:
        key = content_hash.quick_content_hash(OnDevice(weight))
    assert key == content_hash.quick_content_hash(weight)
    assert device.waits.total() == 1


# The count itself
