import pytest
import torch

from mica import ops
from mica.kernels import configs, launching
from mica.kernels.launching import Plan
from mica.paths import choose
from tests.support.kernel_cases import DEVICE
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
    """``by_default(host_bound)``: kernels where nothing is demanded, for layers with more work than that."""

    def by_default(host_bound: int = 0):
        monkeypatch.setenv("MICA_BACKEND", "auto")
        monkeypatch.setattr(choose.runtime, "is_interpreting", lambda: False)
        monkeypatch.setattr(choose.runtime, "why_unavailable", lambda device: None)
        has_instructions(True, monkeypatch)  # GPUs have them
        monkeypatch.setattr(configs, "HOST_BOUND", host_bound)
        choose.clear()
        monkeypatch.setitem(choose.host_bounds, -1, host_bound)  # that of the CPU, which stands for a device
        launching.clear()

    return by_default


@pytest.fixture
def choose_form(monkeypatch):
    """``choose_form(forward, backward)``: as if these forms had been measured to be the fastest here."""

    def choose_form(forward, backward=None):
        row = configs.Forms(0, 256, forward, backward or forward)
        monkeypatch.setitem(configs.FORMS, choose.device_name(torch.device(DEVICE)), (row,))

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
