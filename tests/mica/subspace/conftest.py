"""What lets small matrices stand for large ones."""

import pytest
import torch

from mica.subspace import eigen


@pytest.fixture(autouse=True)
def one_thread():
    """On matrices of this size more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def both_eigensolvers(monkeypatch):
    """Small sides of 140 and 150 go through the partial eigensolver, those of 40 and 60 do not."""
    monkeypatch.setattr(eigen, "FULL_BELOW", 128)
