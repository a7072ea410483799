"""Plans and their tables. Compiled launches are observed by `launched.py`, in a separate process."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import triton

from mica.kernels import launching
from mica.kernels.common import LaunchError
from mica.kernels.configs import Config
from mica.kernels.launching import Launcher, Plan, RecordedLaunches, Table
from tests.support.processes import start


def test_compiled_launches():
    """In a process of its own: whether kernels are interpreted is decided as Triton is imported."""
    done = start("tests.kernels.launched")
    assert done.returncode == 0, done.stderr


def kernel(*names):
    return SimpleNamespace(arg_names=names, pre_run_hooks=[])


def plan(**meta):
    return Plan(kernel("x_ptr", "n", *meta), (2, 3), {"n": 7}, meta, Config(16, 0, 16, 4, 1))


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on the second GPU."""

    def get_device(self):
        return 1


@pytest.mark.parametrize("current", [0, 1])
def test_the_tensors_device_is_the_current_one(monkeypatch, current):
    """And the stream is that device's."""
    entered, seen = [], []

    @contextmanager
    def device(index):
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launching, "current_device", lambda: current)
    monkeypatch.setattr(launching, "raw_stream", lambda index: 40 + index)
    planned, tensor = plan(BLOCK=16), torch.zeros(4).as_subclass(OnGpu)
    planned._compiled[True] = (None, lambda *args: seen.append(args), "function", "metadata")
    planned(tensor)
    assert entered == ([] if current == 1 else [1])
    expected = (2, 3, 1, 41, "function", "metadata", None, None, None, tensor.data_ptr(), 7, 16)
    assert seen == [expected]


def test_numbers_and_constants_go_in_the_order_of_the_parameters():
    both = Plan(kernel("x_ptr", "n", "A", "B"), (1, 1), {"n": 7}, {"B": 2, "A": 1}, Config(16, 0, 16, 4, 1))
    assert both._tail == (7, 1, 2)
    launch = both.bind([torch.zeros(1)])
    assert list(launch.args) == ["x_ptr", "n"]


def test_caches_are_bounded(monkeypatch):
    monkeypatch.setattr(launching, "MOST_ENTRIES", 3)
    plans, recorded = Table(), RecordedLaunches()
    for key in range(10):
        plans.keep(key, plan())
        recorded.record(key)
        assert plans.get(key) is not None
        assert recorded.get(key) is not None
        assert max(len(plans), len(recorded)) <= 3
    launching.clear()
    assert len(plans) == len(recorded) == 0


def test_the_layout_holds_the_device():
    first, second = torch.zeros(4), torch.zeros(4).as_subclass(OnGpu)
    assert launching.layout(first)[:3] == launching.layout(second)[:3]
    assert launching.layout(first) != launching.layout(second)
    assert launching.layout(None) is None


CONFIGS = (Config(64, 0, 16, 4, 4), Config(32, 0, 16, 4, 4), Config(16, 0, 16, 4, 4))


class Refusing:
    """A kernel that cannot be launched with tiles above a size, for a reason, and records what was tried."""

    arg_names = ("x_ptr", "BLOCK_M")

    def __init__(self, most, error):
        self.most, self.error, self.tried = most, error, []

    def __getitem__(self, grid):
        return self

    def __call__(self, x, BLOCK_M, **options):
        self.tried.append(BLOCK_M)
        if self.most < BLOCK_M:
            raise self.error


def skinny(kernel):
    """A launcher of it; its output is its only tensor."""

    def planned(tensor):
        return CONFIGS, lambda config: Plan(kernel, (1, 1), {}, {"BLOCK_M": config.block_m}, config)

    def run(launch, plan, tensor):
        launch(tensor)
        return tensor

    return Launcher(planned, run)


REFUSALS = [
    triton.runtime.errors.OutOfResources(300_000, 101_376, "shared memory"),
    RuntimeError("PassManager::run failed"),
]
for_each_reason = pytest.mark.parametrize("error", REFUSALS, ids=["resources", "compiler"])


@for_each_reason
def test_the_next_configuration_is_tried(error):
    """And what was refused is not tried again, whatever the key: compiling it takes seconds."""
    kernel = Refusing(32, error)
    launcher = skinny(kernel)
    for tensor in (torch.zeros(4), torch.zeros(5)):
        assert launcher(tensor) is tensor
        assert launcher.cache.get(launcher.key(tensor)).config == CONFIGS[1]
    assert kernel.tried == [64, 32, 32]
    launcher(torch.zeros(4).double())  # another dtype may fit
    assert kernel.tried[3:] == [64, 32]


@for_each_reason
def test_where_none_can_be_launched_the_kernel_is_named(error):
    kernel = Refusing(8, error)
    launcher = skinny(kernel)
    for _ in range(2):
        with pytest.raises(LaunchError, match=f"planned cannot be .* configurations: {str(error)[:12]}"):
            launcher(torch.zeros(4))
    assert kernel.tried == [64, 32, 16]
    assert not len(launcher.cache)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("an illegal memory access"), triton.runtime.errors.InterpreterError("a fault of ours")],
)
def test_any_other_error_is_raised(error):
    """Something may have run already."""
    kernel = Refusing(32, error)
    launcher = skinny(kernel)
    with pytest.raises(type(error)):
        launcher(torch.zeros(4))
    assert kernel.tried == [64]
    assert not len(launcher.refused)


def test_what_was_recorded_is_not_looked_up_again(monkeypatch):
    kernel = Refusing(32, REFUSALS[0])
    launcher, tensor = skinny(kernel), torch.zeros(4)
    recorded = RecordedLaunches(launcher, launcher)
    assert recorded.get("a") is None
    first, second = recorded.record("a", {}, {})
    assert first(tensor) is tensor
    first, unused = recorded.get("a")
    monkeypatch.setattr(Launcher, "key", None)
    assert first(tensor) is tensor
    assert kernel.tried == [64, 32, 32]
    with pytest.raises(TypeError):  # it has not been called yet
        unused(tensor)
    assert unused is second


def test_what_failed_is_planned_again():
    kernel, tensor = Refusing(8, REFUSALS[0]), torch.zeros(4)
    recorded = RecordedLaunches(skinny(kernel))
    for steps in (recorded.record("a", {}), recorded.get("a")):
        with pytest.raises(LaunchError):
            steps[0](tensor)
    launching.clear()
    assert not len(recorded)
    kernel.most = 64
    assert recorded.record("a", {})[0](tensor) is tensor
