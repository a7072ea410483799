import pytest
import torch

from mica import backend
from mica.kernels import common, runtime

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        runtime, "why_unavailable", lambda device: None if device.type == "cuda" else "no GPU"
    )
    return monkeypatch


def test_the_device_decides(a_gpu):
    assert backend.why_not_kernels(GPU, 16, BF16) is None
    assert backend.why_not_kernels(CPU, 16, BF16) == "no GPU"
    assert backend.use_kernels(GPU, 16, BF16)
    assert not backend.use_kernels(CPU, 16, BF16)


def test_reference_is_forced(a_gpu):
    a_gpu.setenv("MICA_BACKEND", "reference")
    assert backend.why_not_kernels(GPU, 16, BF16) == "MICA_BACKEND=reference"
    assert not backend.use_kernels(GPU, 16, BF16)


def test_triton_is_forced_or_refused(a_gpu):
    a_gpu.setenv("MICA_BACKEND", "triton")
    assert backend.use_kernels(GPU, 16, BF16)
    with pytest.raises(RuntimeError, match=r"MICA_BACKEND=triton demands .* none here: no GPU\."):
        backend.use_kernels(CPU, 16, BF16)
    with pytest.raises(RuntimeError, match="no Triton kernels for float64"):
        backend.use_kernels(GPU, 16, BF16, torch.float64)


@pytest.mark.parametrize("rank", [backend.MAX_RANK, backend.MAX_RANK + 1])
def test_ranks(a_gpu, rank):
    reason = backend.why_not_kernels(GPU, rank, BF16)
    assert reason == (None if rank == 256 else "no Triton kernels for ranks above 256")
    assert backend.MAX_RANK == common.MAX_RANK
    assert set(backend.KERNEL_DTYPES) == set(common.TRITON_DTYPES)


def test_interpreted_kernels_run_only_on_demand(monkeypatch):
    assert "only with MICA_BACKEND=triton" in backend.why_not_kernels(CPU, 16, BF16)
    monkeypatch.setenv("MICA_BACKEND", "triton")
    assert backend.why_not_kernels(CPU, 16, BF16) is None


@pytest.mark.parametrize("value", ["cuda", "Triton", "1"])
def test_another_value_is_named(monkeypatch, value):
    monkeypatch.setenv("MICA_BACKEND", value)
    with pytest.raises(ValueError, match=f"must be one of auto, triton, reference, but it is '{value}'"):
        backend.requested()


def test_empty_means_auto(monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", "")
    assert backend.requested() == "auto"
