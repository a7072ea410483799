import pytest
from quantised_models import stub_gptqmodel

import mica.fast
from mica.fast import grouping
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


@pytest.fixture
def grouping_on():
    """Groups of layers, with none learnt; the test must not leave an output behind."""
    mica.fast.enable(group_projections=True)
    grouping._groups.clear()
    grouping._state.run = grouping._state.pending = None
    mica.fast.call_counts.clear()
    yield
    pending = grouping._state.pending
    assert pending is None or not any(pending.outputs.values())
