import pytest

import mica.fast
from mica.fast import grouping
from mica.subspace import many
from tests.support.quantised_models import stub_gptqmodel


@pytest.fixture(autouse=True)
def _nothing_traced(monkeypatch):
    """Other tests of this process may have compiled a layer."""
    monkeypatch.setattr(call_counts, "is_traced", False)


@pytest.fixture
def solved(monkeypatch):
    """Counts the solver's calls."""
    shapes = []
    solver = many.solve_each

    def counting(weight, rank, **kwargs):
        shapes.append(tuple(weight.shape))
        return solver(weight, rank, **kwargs)

    monkeypatch.setattr(many, "solve_each", counting)
    return shapes


@pytest.fixture
def gptqmodel(monkeypatch):
    """PEFT finds gptqmodel, a stub of it."""
    stub_gptqmodel(monkeypatch)


@pytest.fixture
def grouping_on():
    """Groups of layers, with none learnt; the test must not leave an output behind."""
    mica.fast.enable(group_projections=True)
    grouping.groups.clear()
    grouping.state.run = grouping.state.pending = None
    mica.fast.call_counts.clear()
    yield
    pending = grouping.state.pending
    assert pending is None or not any(pending.outputs.values())
