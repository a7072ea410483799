import pytest

from mica import ops
from mica.kernels import launching
from mica.kernels.launching import Plan
from mica.paths import choose, tuning
from mica.paths.tuning import Layer, Part


@pytest.fixture
def on_kernels(monkeypatch):
    """Kernels or an error, and nothing planned."""
    monkeypatch.setenv("MICA_BACKEND", "triton")
    choose.clear()
    launching.clear()
    ops.call_counts.clear()
    yield
    choose.clear()


@pytest.fixture
def choose_form(monkeypatch):
    """``choose_form(forward, backward)``: as if these forms had been measured to be the fastest here."""

    def choose_form(forward, backward=None):
        layer = Layer(Part(forward), Part(backward or forward))
        monkeypatch.setattr(tuning.Table, "find", lambda table, kind: layer)

    return choose_form


@pytest.fixture
def launched(monkeypatch):
    """(name, dtype of the factor or None) of each kernel that is launched."""
    seen, launch = set(), Plan.__call__

    def watched(plan, *tensors):
        operands = dict(zip(plan.kernel.arg_names, tensors, strict=False))
        seen.add((plan.kernel.__name__, getattr(operands.get("p_ptr"), "dtype", None)))
        return launch(plan, *tensors)

    monkeypatch.setattr(Plan, "__call__", watched)
    return seen
