import pytest
import torch

from mica.kernels import common, limits, runtime
from mica.paths import choose

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_decided():
    choose.clear()
    yield
    choose.clear()


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        runtime, "why_unavailable", lambda device: None if device.type == "cuda" else "no GPU"
    )
    monkeypatch.setattr(runtime, "is_settled", lambda device: True)
    return monkeypatch


@pytest.mark.parametrize(
    ("setting", "operands", "reason"),
    [
        ("auto", (GPU, 16, BF16), None),
        ("auto", (CPU, 16, BF16), "no GPU"),
        ("auto", (GPU, limits.MAX_RANK, BF16), None),
        ("auto", (GPU, limits.MAX_RANK + 1, BF16), "no Triton kernels for ranks above 256"),
        ("auto", (GPU, 16, torch.float64), "no Triton kernels for float64"),
        ("auto", (GPU, 16, BF16, torch.float64), "no Triton kernels for float64"),
        ("", (GPU, 16, BF16), None),
        ("", (CPU, 16, BF16), "no GPU"),
        ("reference", (GPU, 16, BF16), "MICA_BACKEND=reference"),
        ("triton", (GPU, 16, BF16), None),
        ("triton", (CPU, 16, BF16), "no GPU"),
        ("triton", (GPU, 16, BF16, torch.float64), "no Triton kernels for float64"),
    ],
)
def test_the_device_its_operands_and_the_setting_decide(a_gpu, setting, operands, reason):
    """Each verdict is one of its operands, whatever has been decided for others."""
    a_gpu.setenv("MICA_BACKEND", setting)
    assert choose.requested() == (setting or "auto")
    assert choose.use_kernels(GPU, 16, BF16) == (setting != "reference")
    assert choose.why_not_kernels(*operands) == reason
    if setting == "triton" and reason:
        with pytest.raises(RuntimeError, match=f"MICA_BACKEND=triton demands .* none here: {reason}"):
            choose.use_kernels(*operands)
    else:
        assert choose.use_kernels(*operands) == (reason is None)


def test_interpreted_kernels_run_only_on_demand(monkeypatch):
    assert "only with MICA_BACKEND=triton" in choose.why_not_kernels(CPU, 16, BF16)
    monkeypatch.setenv("MICA_BACKEND", "triton")
    assert choose.why_not_kernels(CPU, 16, BF16) is None


@pytest.mark.parametrize("value", ["cuda", "Triton", "1"])
def test_another_value_is_named(monkeypatch, value):
    monkeypatch.setenv("MICA_BACKEND", value)
    with pytest.raises(ValueError, match=f"must be one of auto, triton, reference, but it is '{value}'"):
        choose.requested()


def test_a_verdict_is_kept_until_the_environment_changes(a_gpu):
    queries = []
    a_gpu.setattr(runtime, "why_unavailable", queries.append)
    for _ in range(3):
        assert choose.use_kernels(GPU, 16, BF16)
    assert len(queries) == 1
    a_gpu.setenv("MICA_BACKEND", "reference")
    assert not choose.use_kernels(GPU, 16, BF16)
    a_gpu.delenv("MICA_BACKEND")
    a_gpu.setenv("TRITON_INTERPRET", "1")
    assert not choose.use_kernels(GPU, 16, BF16)
    a_gpu.delenv("TRITON_INTERPRET")
    assert choose.use_kernels(GPU, 16, BF16)
    assert len(queries) == 1


def test_what_a_capture_says_is_not_kept(a_gpu):
    a_gpu.setattr(runtime, "why_unavailable", lambda device: "nothing was tried yet")
    a_gpu.setattr(runtime, "is_settled", lambda device: False)
    assert not choose.use_kernels(GPU, 16, BF16)
    a_gpu.setattr(runtime, "why_unavailable", lambda device: None)
    assert choose.use_kernels(GPU, 16, BF16)


def test_the_setting_is_what_the_environment_holds(monkeypatch):
    assert choose.setting() is None
    settings = []
    for value in ("triton", "reference"):
        monkeypatch.setenv("MICA_BACKEND", value)
        settings.append(choose.setting())
    assert len({None, *settings}) == 3
    monkeypatch.delenv("MICA_BACKEND")
    assert choose.setting() is None


ERROR = common.LaunchError("the kernel grad_a can be launched nowhere: out of resource\nand more")


def test_only_what_cannot_be_launched_is_given_up(a_gpu):
    assert choose.use_kernels(GPU, 16, BF16, function="linear")
    with pytest.warns(UserWarning, match="linear at rank 16 .bfloat16. on PyTorch's own operators on cuda"):
        choose.give_up(GPU, "linear", 16, (BF16,), ERROR)
    assert not choose.use_kernels(GPU, 16, BF16, function="linear")
    for device, rank, dtypes, function in (
        (GPU, 16, (BF16,), "linear_backward"),
        (GPU, 8, (BF16,), "linear"),
        (GPU, 16, (BF16, BF16), "linear"),
        (torch.device("cuda", 1), 16, (BF16,), "linear"),
    ):
        assert choose.use_kernels(device, rank, *dtypes, function=function)


def test_what_was_given_up_is_told(a_gpu):
    dtypes = (BF16, BF16, torch.float32)
    with pytest.warns(UserWarning, match="grad_a can be launched nowhere: out of resource$"):
        choose.give_up(GPU, "linear_backward", 16, dtypes, ERROR)
    reason = choose.why_not_kernels(GPU, 16, torch.float32, BF16)  # of a layer, whatever its function
    assert reason.startswith(
        "linear_backward at rank 16 (bfloat16, bfloat16, float32) was given up: the kernel"
    )
    assert choose.why_not_kernels(GPU, 16, *dtypes, function="linear_backward") == reason
    assert choose.why_not_kernels(GPU, 16, *dtypes, function="linear") is None
    assert choose.why_not_kernels(GPU, 16, torch.float16) is None
    assert choose.why_not_kernels(GPU, 8, BF16) is None
    a_gpu.setenv("MICA_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="there are none here: linear_backward at rank 16"):
        choose.use_kernels(GPU, 16, *dtypes, function="linear_backward")
    choose.clear()
    assert choose.why_not_kernels(GPU, 16, *dtypes) is None
