import pytest
from quantised_models import stub_gptqmodel

from mica.subspace import many


@pytest.fixture
def solved(monkeypatch):
    """Counts the solver's calls."""
    calls = []
    solver = many.solve_each

    def counting(weight, rank, **kwargs):
        calls.append(tuple(weight.shape))
        return solver(weight, rank, **kwargs)

    monkeypatch.setattr(many, "solve_each", counting)
    return calls


@pytest.fixture
def gptqmodel(monkeypatch):
    """PEFT finds gptqmodel, a stub of it."""
    stub_gptqmodel(monkeypatch)
