import gc
import weakref

import pytest
import torch

from mica.kernels import prepared
from mica.kernels.prepared import forget, prepare


@pytest.fixture(autouse=True)
def nothing_kept():
    forget()
    yield
    forget()


@pytest.mark.parametrize(("rank", "columns"), [(1, 16), (15, 16), (16, 16), (20, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cast_padded_and_contiguous(rank, columns, dtype):
    lora_B = torch.randn(rank, 9).t()
    result = prepare(lora_B, dtype).t()
    assert result.shape == (9, columns)
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert torch.equal(result[:, :rank], lora_B.to(dtype))
    assert not result[:, rank:].any()


def test_made_once():
    lora_B = torch.nn.Parameter(torch.randn(9, 3), requires_grad=False)
    first = prepare(lora_B, torch.bfloat16)
    assert prepare(lora_B, torch.bfloat16) is first
    assert not first.requires_grad


def test_what_fits_already_is_not_copied():
    lora_B = torch.randn(9, 32)
    assert prepare(lora_B, torch.float32).data_ptr() == lora_B.data_ptr()
    lora_B.data.fill_(2.0)  # not even this can make it stale
    assert prepare(lora_B, torch.float32).eq(2.0).all()


def replace(lora_B):
    lora_B.data = torch.randn_like(lora_B)


def replace_at_a_freed_address(lora_B):
    """Without the old storage kept alive, the allocator hands out its address again."""
    shape = lora_B.shape
    lora_B.data = torch.empty(0)
    gc.collect()
    lora_B.data = torch.randn(shape)


CHANGES = {
    "copy_": lambda lora_B: lora_B.copy_(torch.randn_like(lora_B)),
    "mul_": lambda lora_B: lora_B.mul_(2.0),
    "an element": lambda lora_B: lora_B[0].fill_(5.0),
    "through detach": lambda lora_B: lora_B.detach().mul_(2.0),
    "data =": replace,
    "data = at a freed address": replace_at_a_freed_address,
    "dtype": lambda lora_B: setattr(lora_B, "data", lora_B.data.double()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    lora_B = torch.nn.Parameter(torch.randn(9, 3), requires_grad=False)
    prepare(lora_B, torch.bfloat16)
    with torch.no_grad():
        CHANGES[change](lora_B)
    assert torch.equal(prepare(lora_B, torch.bfloat16)[:3].t(), lora_B.bfloat16())


def test_a_loaded_state_is_seen():
    layer = torch.nn.Linear(3, 9, bias=False).requires_grad_(False)
    prepare(layer.weight, torch.bfloat16)
    layer.load_state_dict({"weight": torch.randn(9, 3)})
    assert torch.equal(prepare(layer.weight, torch.bfloat16)[:3].t(), layer.weight.bfloat16())


def test_an_edit_through_data_needs_forget():
    """The one write that PyTorch does not count, as the docstring says."""
    lora_B = torch.randn(9, 3)
    prepare(lora_B, torch.bfloat16)
    lora_B.data.mul_(2.0)
    assert not torch.equal(prepare(lora_B, torch.bfloat16)[:3].t(), lora_B.bfloat16())
    forget()
    assert torch.equal(prepare(lora_B, torch.bfloat16)[:3].t(), lora_B.bfloat16())


def test_nothing_outlives_the_parameter():
    lora_B = torch.randn(9, 3)
    storage = weakref.ref(prepare(lora_B, torch.bfloat16))
    del lora_B
    gc.collect()
    assert storage() is None
    assert len(prepared.entries) == 0


def test_not_kept_where_a_change_could_be_hidden(monkeypatch):
    lora_B = torch.randn(9, 3)
    with torch.inference_mode():
        inferred = torch.randn(9, 3)
    prepare(inferred, torch.bfloat16)
    prepare((lora_B.requires_grad_() * 2.0), torch.bfloat16)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    prepare(lora_B.detach(), torch.bfloat16)
    assert len(prepared.entries) == 0


def test_a_copy_is_kept_where_no_graph_owns_the_memory(monkeypatch):
    kept = []
    monkeypatch.setattr(prepared.workspace, "kept", lambda make, tensor: kept.append(1) or make())
    lora_B = torch.randn(9, 3)
    prepare(lora_B, torch.bfloat16)
    prepare(lora_B, torch.bfloat16)
    assert kept == [1]
