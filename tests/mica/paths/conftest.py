import pytest

from mica import ops
from mica.kernels import launching
from mica.kernels.launching import Plan
from mica.paths import choose, tuning
from mica.paths.tuning import Layer, Part
from tests.support.processor import has_instructions


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
def by_default(monkeypatch):
    """``by_default()``: the CPU, which stands for a device, can run kernels where nothing is demanded."""

    def by_default():
        monkeypatch.setenv("MICA_BACKEND", "auto")
        monkeypatch.setattr(choose.runtime, "is_interpreting", lambda: False)
        monkeypatch.setattr(choose.runtime, "why_unavailable", lambda device: None)
        has_instructions(True, monkeypatch)  # GPUs have them
        choose.clear()
        choose.devices_without_kernels.clear()
        launching.clear()

    return by_default


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
