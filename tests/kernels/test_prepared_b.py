"""B of a layer, and of a stack of experts: there a view of what PEFT stores, (out_features, rank·experts)."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef

from mica.kernels import prepared_b
from mica.kernels.prepared_b import clear, prepare, prepare_experts

KINDS = ["layer", "experts"]


@pytest.fixture(autouse=True)
def nothing_kept():
    clear()
    yield
    clear()


@pytest.fixture(params=KINDS)
def b(request):
    return B(request.param)


class B:
    """A stored B of 9 out_features, and what the kernels get of it."""

    def __init__(self, kind, rank=3):
        self.of_experts, self.rank = kind == "experts", rank
        stored = torch.randn(9, 4 * rank) if self.of_experts else torch.randn(rank, 9).t()
        self.stored = torch.nn.Parameter(stored, requires_grad=False)

    def view(self, stored=None):
        stored = self.stored if stored is None else stored
        return stored.view(9, self.rank, 4).permute(2, 0, 1) if self.of_experts else stored

    def alias(self):
        """What `mica.ops.operator.save` keeps for a backward."""
        lora_B = self.view()
        return lora_B.view_as(lora_B)

    def prepare(self, dtype=torch.bfloat16):
        return self.prepared(self.view(), dtype)

    def prepared(self, lora_B, dtype=torch.bfloat16, **options):
        return (prepare_experts if self.of_experts else prepare)(lora_B, dtype, **options)

    def is_right(self):
        return torch.equal(self.prepare()[..., :3, :].transpose(-1, -2), self.view().bfloat16())


@pytest.mark.parametrize(("rank", "columns"), [(1, 16), (15, 16), (16, 16), (20, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_cast_padded_and_contiguous(rank, columns, dtype, kind):
    b = B(kind, rank)
    lora_B, result = b.view(), b.prepare(dtype).mT
    assert result.shape == (*lora_B.shape[:-1], columns)
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert torch.equal(result[..., :rank], lora_B.to(dtype))
    assert not result[..., rank:].any()


def test_a_backward_has_the_copy_of_the_forward(b):
    alias = b.alias()
    first = b.prepare()
    assert b.prepared(alias) is first
    expected = first.clone()
    replace(b.stored)  # after the forward
    assert torch.equal(b.prepared(alias), expected)
    assert b.is_right()


def test_a_part_of_another_tensor_is_not_kept():
    """As FSDP1's: what it belongs to may be gathered anew."""
    both = torch.randn(2, 9, 3)
    assert torch.equal(prepare(both[0], torch.bfloat16)[:3].t(), both[0].bfloat16())
    assert len(prepared_b.entries) == 0


@pytest.mark.parametrize(("shape", "prepare"), [((9, 32), prepare), ((4, 9, 16), prepare_experts)])
def test_what_fits_already_is_not_copied(shape, prepare):
    lora_B = torch.randn(shape)
    assert prepare(lora_B, torch.float32).data_ptr() == lora_B.data_ptr()
    lora_B.data.fill_(2.0)  # not even this can make it stale
    assert prepare(lora_B, torch.float32).eq(2.0).all()


def replace(stored):
    stored.data = torch.randn_like(stored)


CHANGES = {
    "copy_": lambda stored: stored.copy_(torch.randn_like(stored)),
    "mul_": lambda stored: stored.mul_(2.0),
    "an element": lambda stored: stored[0].fill_(5.0),
    "through detach": lambda stored: stored.detach().mul_(2.0),
    "data =": replace,
    "a loaded state": lambda stored: torch.nn.ParameterDict({"B": stored}).load_state_dict(
        {"B": torch.randn_like(stored)}
    ),
    "dtype": lambda stored: setattr(stored, "data", stored.data.double()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(b, change):
    b.prepare()
    with torch.no_grad():
        CHANGES[change](b.stored)
    assert b.is_right()


def test_what_was_copied_lives_as_long_as_the_copy(b):
    """Or the allocator hands out its address again, for another B of the same version."""
    b.prepare()
    old = StorageWeakRef(b.stored.untyped_storage())
    replace(b.stored)
    gc.collect()
    assert not old.expired()
    b.prepare()
    assert old.expired()


def test_an_edit_through_data_needs_clear(b):
    """The one write that PyTorch does not count, as the docstring says."""
    b.prepare()
    b.stored.data.mul_(2.0)
    assert not b.is_right()
    clear()
    assert b.is_right()


def test_a_copy_lives_as_long_as_the_parameter(b):
    copy = weakref.ref(b.prepare())
    gc.collect()
    assert copy() is not None
    del b.stored
    gc.collect()
    assert copy() is None
    assert len(prepared_b.entries) == 0


def view_of_a_flat_parameter(stored):
    flat = torch.nn.Parameter(stored.detach().flatten().clone(), requires_grad=False)
    flat._is_flat_param = True
    return flat.view_as(stored)


@pytest.fixture
def gloo():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


HIDDEN = {
    "inference mode": lambda stored: torch.inference_mode()(torch.randn_like)(stored),
    "a result": lambda stored: stored.detach().clone().requires_grad_() * 2.0,
    "FSDP1": view_of_a_flat_parameter,
    "ZeRO": lambda stored: setattr(stored, "ds_id", 3) or stored,
}


@pytest.mark.whole
@pytest.mark.parametrize("name", HIDDEN)
def test_not_kept_where_a_change_could_be_hidden(b, name):
    stored = HIDDEN[name](b.stored)  # a copy would be dropped with it
    view = b.view(stored)
    b.prepared(view)
    assert len(prepared_b.entries) == 0


def test_kept_beside_other_processes_until_a_module_is_sharded(b, gloo):
    """DDP writes B once, when it is made, and every write counts; FSDP2's do not."""
    first = b.prepare()
    assert b.prepare() is first
    with torch.no_grad():
        b.stored.neg_()  # as DDP's broadcast does
    assert b.is_right()
    module = fully_shard(torch.nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    assert b.prepare() is not b.prepare()
    del module
    gc.collect()
    assert b.prepare() is b.prepare()


def test_a_copy_is_kept_where_no_graph_owns_the_memory(b, monkeypatch):
    kept = []
    allocate = "allocate_persistent"
    monkeypatch.setattr(prepared_b.workspace, allocate, lambda make, tensor: kept.append(1) or make())
    b.prepare(), b.prepare()
    assert kept == [1]


def test_a_copy_of_a_trained_b_is_made_in_each_call_and_in_the_graph_that_captures_it(b, monkeypatch):
    """So that a replay follows an optimizer, whose edits no version has to count."""
    monkeypatch.setattr(prepared_b.workspace, "allocate_persistent", None)
    first = b.prepared(b.view(), is_frozen=False)
    b.stored.data.mul_(2)
    assert torch.equal(b.prepared(b.view(), is_frozen=False), 2 * first)
    assert not prepared_b.entries


def test_another_stream_waits_for_the_copy_once(b, monkeypatch):
    waited = []
    monkeypatch.setattr(prepared_b.workspace, "follow", waited.append)
    for stream in (1, 1, 2, 2, 1):
        monkeypatch.setattr(prepared_b.workspace, "stream_of", lambda tensor, stream=stream: stream)
        factor = b.prepare()
    assert [tensor is factor for tensor in waited] == [True]
