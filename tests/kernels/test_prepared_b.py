import gc
import weakref

import pytest
import torch

from mica.kernels import prepared_b
from mica.kernels.prepared_b import clear, prepare, prepare_experts


@pytest.fixture(autouse=True)
def nothing_kept():
    clear()
    yield
    clear()


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


def test_an_edit_through_data_needs_clear():
    """The one write that PyTorch does not count, as the docstring says."""
    lora_B = torch.randn(9, 3)
    prepare(lora_B, torch.bfloat16)
    lora_B.data.mul_(2.0)
    assert not torch.equal(prepare(lora_B, torch.bfloat16)[:3].t(), lora_B.bfloat16())
    clear()
    assert torch.equal(prepare(lora_B, torch.bfloat16)[:3].t(), lora_B.bfloat16())


def test_nothing_outlives_the_parameter():
    lora_B = torch.randn(9, 3)
    storage = weakref.ref(prepare(lora_B, torch.bfloat16))
    del lora_B
    gc.collect()
    assert storage() is None
    assert len(prepared_b.entries) == 0


def test_not_kept_where_a_change_could_be_hidden(monkeypatch):
    lora_B = torch.randn(9, 3)
    with torch.inference_mode():
        inferred = torch.randn(9, 3)
    prepare(inferred, torch.bfloat16)
    prepare((lora_B.requires_grad_() * 2.0), torch.bfloat16)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    prepare(lora_B.detach(), torch.bfloat16)
    assert len(prepared_b.entries) == 0


def test_a_copy_is_kept_where_no_graph_owns_the_memory(monkeypatch):
    kept = []
    monkeypatch.setattr(
        prepared_b.workspace, "allocate_persistent", lambda make, tensor: kept.append(1) or make()
    )
    lora_B = torch.randn(9, 3)
    prepare(lora_B, torch.bfloat16)
    prepare(lora_B, torch.bfloat16)
    assert kept == [1]


@pytest.fixture
def stored():
    """lora_B as PEFT stores it for 4 experts: (9 out_features, rank 3 · 4)."""
    return torch.nn.Parameter(torch.randn(9, 12), requires_grad=False)


def view(stored):
    return stored.view(9, 3, 4).permute(2, 0, 1)


@pytest.mark.parametrize(("rank", "columns"), [(3, 16), (16, 16), (20, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_cast_padded_and_contiguous(rank, columns, dtype):
    lora_B = torch.randn(9, rank, 4).permute(2, 0, 1)
    result = prepare_experts(lora_B, dtype).transpose(1, 2)
    assert result.shape == (4, 9, columns)
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert torch.equal(result[..., :rank], lora_B.to(dtype))
    assert not result[..., rank:].any()


def test_a_stack_that_fits_already_is_not_copied():
    lora_B = torch.randn(4, 9, 16)
    assert prepare_experts(lora_B, torch.float32).data_ptr() == lora_B.data_ptr()


def test_views_of_one_parameter_share_a_copy(stored):
    first = prepare_experts(view(stored), torch.bfloat16)
    assert prepare_experts(view(stored), torch.bfloat16) is first
    with torch.no_grad():
        assert prepare_experts(view(stored), torch.bfloat16) is first
    assert len(prepared_b.entries) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_stack_is_seen(stored, change):
    prepare_experts(view(stored), torch.bfloat16)
    with torch.no_grad():
        CHANGES[change](stored)
    result = prepare_experts(view(stored), torch.bfloat16)[:, :3]
    assert torch.equal(result, view(stored).bfloat16().transpose(1, 2))


def test_clear_drops_stacks_too(stored):
    prepare_experts(view(stored), torch.bfloat16)
    stored.data.mul_(2.0)
    clear()
    result = prepare_experts(view(stored), torch.bfloat16)[:, :3]
    assert torch.equal(result, view(stored).bfloat16().transpose(1, 2))


def test_a_copy_of_a_stack_lives_as_long_as_the_parameter():
    stored = torch.nn.Parameter(torch.randn(9, 12), requires_grad=False)
    copy = weakref.ref(prepare_experts(view(stored), torch.bfloat16))
    gc.collect()
    assert copy() is not None
    del stored
    gc.collect()
    assert copy() is None
    assert len(prepared_b.entries) == 0


def test_a_stack_is_not_kept_where_a_change_could_be_hidden(stored, monkeypatch):
    prepare_experts(view(stored.detach().requires_grad_()), torch.bfloat16)
    with torch.inference_mode():
        inferred = torch.randn(9, 12)
    prepare_experts(view(inferred), torch.bfloat16)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    prepare_experts(view(stored), torch.bfloat16)
    assert len(prepared_b.entries) == 0


def test_a_stack_of_unknown_base_has_a_copy_of_its_own(stored):
    lora_B = view(stored).detach()
    prepare_experts(lora_B, torch.bfloat16)
    del lora_B
    gc.collect()
    assert len(prepared_b.entries) == 0
