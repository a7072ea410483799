import os
import shutil

import pytest
import torch
from torch import nn

import mica.fast
from mica import native
from mica.native import build
from mica.paths import choose
from tests.mica.native.compilers import Compiler, copying
from tests.support.models import randomise, wrap
from tests.support.stock import both, step


@pytest.fixture(scope="session")
def compiled():
    """The module from the real compiler, which runs once on this machine."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), *build.COMPILERS) if name):
        pytest.skip("there is no C++ compiler")
    return build.ensure_built(build.default_folder())


@pytest.fixture
def forget():
    """Forgets what this process has found out about the module, as a new process; also after the test.

    In the dictionary that C++ reads: with another one, all layers would be called from Python ever after.
    """
    before = dict(native.modules)

    def forget():
        native.modules.clear()
        native._is_unbuilt.cache_clear()
        choose.clear()

    forget()
    yield forget
    forget()
    native.modules.update(before)


@pytest.fixture
def folder(tmp_path, monkeypatch, forget):
    """A cache of the test's own, named by MICA_NATIVE."""
    monkeypatch.setenv("MICA_NATIVE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path, compiled, monkeypatch):
    """A compiler that is quick and works, named by CXX."""
    quick = Compiler(tmp_path / "bin", copying(compiled))
    monkeypatch.setenv("CXX", str(quick.path))
    return quick


@pytest.fixture
def assert_layer_works():
    """A layer gives stock PEFT's numbers, and is called as it says."""

    def check():
        torch.manual_seed(0)
        model = randomise(wrap(nn.Sequential(nn.Linear(48, 32)), targets=["0"]))
        x = torch.randn(5, 48)
        mica.fast.call_counts.clear()
        ours, stock = both(lambda: step(model, x))
        is_native = native.why_not() is None
        assert mica.fast.call_counts["linear"] == 1
        assert mica.fast.call_counts["linear_native"] == is_native
        assert mica.fast.call_counts["linear_backward_native"] == is_native
        torch.testing.assert_close(ours, stock)

    return check
