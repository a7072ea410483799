"""For every test: `torch.empty` holds NaN, so that a result that was never written is seen.

torch and PEFT take 8 s to import, so that is done where tests run: not in the process that hands them out.
"""

import gc
import logging
import os
from dataclasses import fields
from functools import partial
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may be fetched, not even by mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MICA_CACHE"] = "0"  # a test that wants one makes its own
os.environ["MICA_TUNE"] = "0"  # nothing is measured, likewise
if "MICA_TEST_DEVICE" not in os.environ:
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before Triton is imported; kernels run with MICA_BACKEND=triton only
    )
os.environ.pop("MICA_BACKEND", None)

import pytest

from mica.cli import NOISY
from tests.support.thinning import left_out

for name in NOISY:  # or the end of a run shows what they log as PEFT imports them
    logging.getLogger(name).setLevel(logging.ERROR)

# What imports one of these, where it is not installed, is skipped
OPTIONAL = (
    "bitsandbytes datasets gguf hqq hypothesis kernels liger_kernel matplotlib pandas "
    "pytest_benchmark torchao trl zstandard"
)
MISSING = {name for name in OPTIONAL.split() if find_spec(name) is None}


def _skip_if_missing(error: BaseException | None) -> None:
    """Skip if the error comes from the import of a library that is not installed."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            library = error.name.partition(".")[0]
            if library in MISSING:
                pytest.skip(f"needs {library}")
        error = error.__cause__


class _Module(pytest.Module):
    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            _skip_if_missing(error)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return _Module.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    if call.excinfo is not None:
        try:
            _skip_if_missing(call.excinfo.value)
        except pytest.skip.Exception:
            call.excinfo = pytest.ExceptionInfo.from_current()
    return (yield)


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="all cases of cross products, see tests.support.thinning"
    )
    parser.addoption("--smoke", action="store_true", help="the first test of each file only")


@pytest.hookimpl(trylast=True)  # behind -k and -m
def pytest_collection_modifyitems(config, items):
    if config.option.smoke:
        items[:] = {item.path: item for item in reversed(items)}.values()
    if config.option.full:
        return
    dropped = left_out(items)
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=[*dropped])


def pytest_sessionfinish():
    gc.unfreeze()  # or libraries report as leaked what nobody has looked for


@pytest.fixture(scope="session", autouse=True)
def enable():
    """``enable()``: the backend, with the settings that it comes with."""
    import mica.fast
    from mica.fast.settings import Settings
    from mica.ops import recompute

    recompute.MIN_NUMBERS = 0  # what is tested is what becomes of inputs that are worth it
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        from tests.support import interpreter

        interpreter.hasten()
    defaults = {field.name: field.default for field in fields(Settings) if field.name != "enabled"}
    return partial(mica.fast.enable, **defaults)


@pytest.fixture(autouse=True)
def _poisoned_memory_and_fresh_settings(enable):
    import torch

    torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory: NaN in every torch.empty
    torch.manual_seed(0)
    enable()
    yield
    enable()
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """To look for garbage through all that is imported takes 0.7 s; the Trainer does after each training."""
    gc.collect()  # what is garbage now would stay, as FSDP2's modules, beside which nothing is tracked
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    """Threads only wait for each other on matrices as small as most tests', the more on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
