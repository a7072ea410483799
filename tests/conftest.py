"""For every test: `torch.empty` holds NaN, so that a result that was never written is seen."""

import logging
import os
import time
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may be fetched, not even by mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MICA_CACHE"] = "0"  # a test that wants one makes its own
if "MICA_TEST_DEVICE" not in os.environ:
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before Triton is imported; kernels run with MICA_BACKEND=triton only
    )
os.environ.pop("MICA_BACKEND", None)

import pytest
import torch

from mica.cli import NOISY

for name in NOISY:  # or the end of a run shows what they log as PEFT imports them
    logging.getLogger(name).setLevel(logging.ERROR)

import mica.fast  # noqa: E402
from tests.support.thinning import ON_DEVICE, off_the_diagonal  # noqa: E402

# Seconds since the epoch: `.ci/run` has a limit, and some machines are several times slower than others
DEADLINE = float(os.environ.get("MICA_TEST_DEADLINE", "inf"))
LEFT_OUT = os.environ.get("MICA_TEST_LEFT_OUT", os.devnull)  # a line for each test that did not begin by then


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Report what begins after the deadline as skipped, without any of its fixtures.

    There may be thousands of these, and the limit comes soon after the deadline.
    """
    if time.time() <= DEADLINE:
        return None
    # The same place for all of them, so that the report has one line
    why = (__file__, 1, "Skipped: not run: no time left (MICA_TEST_DEADLINE)")
    with open(LEFT_OUT, "a", encoding="utf-8") as noted:
        noted.write(f"{item.nodeid}\n")
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    report = pytest.TestReport(item.nodeid, item.location, {}, "skipped", why, "setup")
    item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


# What imports one of these, where it is not installed, is skipped
OPTIONAL = (
    "bitsandbytes datasets gguf hqq hypothesis kernels liger_kernel matplotlib pandas "
    "pytest_benchmark seaborn tabulate torchao trl zstandard"
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


def pytest_collection_modifyitems(config, items):
    if ON_DEVICE:
        dropped = off_the_diagonal(items)
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture(autouse=True)
def _poisoned_memory_and_fresh_settings():
    torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory: NaN in every torch.empty
    torch.manual_seed(0)
    mica.fast.enable()
    yield
    mica.fast.enable()
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread():
    """Threads only wait for each other on matrices as small as most tests', the more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
