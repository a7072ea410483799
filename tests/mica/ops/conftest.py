"""What runs the layers of test_recompute.py, test_recompute_beside.py and test_computed.py."""

import pytest

from mica import native, ops


@pytest.fixture(params=("C++", "Python", "kernels"))
def way(request, monkeypatch):
    """What calls the layer, and what computes it."""
    if request.param == "kernels":
        pytest.importorskip("triton")
        monkeypatch.setenv("MICA_BACKEND", "triton")
    else:
        monkeypatch.setenv("MICA_BACKEND", "reference")
        monkeypatch.setenv("MICA_NATIVE", str(int(request.param == "C++")))
    if request.param == "C++" and native.module() is None:
        pytest.skip(native.why_not())
    return request.param


@pytest.fixture(params=["reference", "reference, from Python", "triton"])
def backend(request, monkeypatch):
    """A path, and what calls it."""
    name, _, from_python = request.param.partition(", ")
    monkeypatch.setenv("MICA_BACKEND", name)
    if from_python:
        monkeypatch.setenv("MICA_NATIVE", "0")
    ops.call_counts.clear()
    return name
