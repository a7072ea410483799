import pytest

from mica.subspace import many


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Asked for by every test of this folder."""


@pytest.fixture
def solved(monkeypatch):
    """Counts the solver's calls."""
    shapes = []
    solver = many.solve_stack

    def counting(weight, rank, **kwargs):
        shapes.append(tuple(weight.shape))
        return solver(weight, rank, **kwargs)

    monkeypatch.setattr(many, "solve_stack", counting)
    return shapes
