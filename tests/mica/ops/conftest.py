"""What runs the layers of test_kept.py and test_kept_beside.py."""

import pytest


@pytest.fixture(params=("C++", "Python", "kernels"))
def way(request, monkeypatch):
    """What calls the layer, and what computes it."""
    if request.param == "kernels":
        pytest.importorskip("triton")
        monkeypatch.setenv("MICA_BACKEND", "triton")
    else:
        monkeypatch.setenv("MICA_BACKEND", "reference")
        monkeypatch.setenv("MICA_NATIVE", str(int(request.param == "C++")))
    return request.param
