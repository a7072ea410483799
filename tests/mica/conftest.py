import pytest

import mica.fast
from mica import native, ops
from mica.paths import choose, products
from tests.support.linear_calls import IN_CHUNKS, NATIVE, OWN, PATHS, WAYS
from tests.support.processor import has_instructions


@pytest.fixture(params=["C++", "Python"])
def language(request, monkeypatch):
    """What a layer on the reference path is called from."""
    if request.param == "Python":
        monkeypatch.setenv("MICA_NATIVE", "0")
    elif native.module() is None:
        pytest.skip(native.why_not())
    return request.param


@pytest.fixture(params=["MiCA", "LoRA"])
def adapter(request):
    """The kind of adapter that `tests.support.models.wrap` makes, with which the backend runs."""
    mica.fast.enable(lora=request.param == "LoRA")
    return request.param


@pytest.fixture(params=WAYS)
def sixteen_bit_products(request, monkeypatch):
    """Every way in which `mica.paths.products` multiplies 16-bit matrices, whatever this processor can do."""
    _multiply(request.param, monkeypatch)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Kernels or an error, and PyTorch's operators with every way in which they multiply 16-bit matrices."""
    is_triton = request.param == "triton"
    monkeypatch.setenv("MICA_BACKEND", "triton" if is_triton else "reference")
    if request.param == NATIVE:
        has_instructions(True, monkeypatch)
    elif not is_triton:
        _multiply(request.param, monkeypatch)
    ops.call_counts.clear()
    return request.param


def _multiply(way, monkeypatch):
    monkeypatch.setenv("MICA_NATIVE", "0")
    has_instructions(way == OWN, monkeypatch)
    if way != OWN:
        monkeypatch.setattr(products, "FEW_ROWS", 0)
    if way == IN_CHUNKS:
        monkeypatch.setattr(products, "CHUNK", 64)
        monkeypatch.setattr(products, "SHORTEST", 3)


@pytest.fixture
def by_default(monkeypatch):
    """``by_default()``: the CPU, which stands for a device, can run kernels where nothing is demanded."""
    from mica.kernels import launching  # which imports Triton

    def by_default():
        monkeypatch.setenv("MICA_BACKEND", "auto")
        monkeypatch.setattr(choose.runtime, "is_interpreting", lambda: False)
        monkeypatch.setattr(choose.runtime, "why_unavailable", lambda device: None)
        has_instructions(True, monkeypatch)  # GPUs have them
        choose.clear()
        choose.devices_without_kernels.clear()
        launching.clear()

    yield by_default
    choose.clear()
