import pytest

from mica.paths import products


@pytest.fixture(params=["PyTorch's own", "through fp32", "through fp32 in chunks"])
def sixteen_bit_products(request, monkeypatch):
    """Every way in which `mica.paths.products` multiplies 16-bit matrices, whatever this processor can do."""
    own = request.param == "PyTorch's own"
    monkeypatch.setattr(products, "has_native", lambda dtype: own)
    if not own:
        monkeypatch.setattr(products, "FEW_ROWS", 0)
    if request.param == "through fp32 in chunks":
        monkeypatch.setattr(products, "CHUNK", 64)
        monkeypatch.setattr(products, "SHORTEST", 3)
