"""What ``mica inspect`` measures in a layer, and which layers it takes, against PEFT and the fp64 SVD."""

import copy
from dataclasses import fields, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mica.cli import spectra
from mica.fast.forward.eligibility import adapter_weights
from mica.subspace import MinorSubspace, gram, minor_subspace
from tests.support import moe_models, quantised_models

MEASURED = [field.name for field in fields(spectra.Row)[6:]]  # behind ``quantised``


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


UNSUITABLE = {  # name -> (layer, effective shape, reason)
    "not quantised yet": (  # its weight was never moved to its device
        lambda: pytest.importorskip("bitsandbytes").nn.Linear4bit(16, 12),
        (12, 16),
        "bitsandbytes 4-bit) is not quantised yet",
    ),
    "rank too large": (
        lambda: linear(torch.ones(8, 3)),
        (8, 3),
        "shape (8, 3) (max usable r is 3)",
    ),
    "NaN": (lambda: linear(torch.full((8, 8), torch.nan)), (8, 8), "got 64 NaN or infinite of 64"),
    "norm": (lambda: nn.LayerNorm(12), None, "a layer of type LayerNorm"),
}


def ends_of(row):
    """The largest and the smallest of the values that were chosen."""
    return pytest.approx((row.sigma_largest, row.sigma_smallest), rel=2e-2, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*a model with PEFT for a second time")  # its rest of one it refused
@pytest.mark.parametrize("name", UNSUITABLE)
def test_unsuitable_layer_gives_a_reason(name):
    make, shape, reason = UNSUITABLE[name]
    model = nn.Module()
    model.layer, model.lm_head = make(), nn.Linear(4, 4)
    model.is_loaded_in_4bit = name == "not quantised yet"  # as transformers does
    row = spectra.measure("layer", model.layer, 4)
    assert reason in row.reason
    assert row.shape == shape
    assert row.quantised == ("bitsandbytes 4-bit" if model.is_loaded_in_4bit else None)
    assert all(getattr(row, number) is None for number in MEASURED)
    with pytest.raises((ValueError, TypeError)):
        get_peft_model(model, LoraConfig(init_lora_weights="mica", r=4, target_modules=["layer"]))


@pytest.mark.parametrize("kind", quantised_models.KINDS)
def test_quantised_layers_are_those_of_the_backend(kind):
    """By what it starts from."""
    layer = quantised_models.llama(kind).model.layers[0].mlp.up_proj
    row = spectra.measure("layer", layer, 4)
    assert (row.reason, row.shape, row.kind) == (None, (48, 32), type(layer).__name__)
    assert row.quantised
    assert row.dtype in ("float32", "bfloat16", "float16")
    weight = quantised_models.dequantised(layer)
    expected = torch.linalg.svdvals(weight)
    assert (expected[-4].item(), expected[-1].item()) == ends_of(row)
    assert row.sigma_above == pytest.approx(expected[-5].item(), rel=1e-2)
    adapted = quantised_models.adapted(kind).base_model.model.model.layers[0].mlp.up_proj
    assert type(adapted.base_layer) is type(layer)
    _, lora_B = adapter_weights(adapted, "default")  # it has the subspace whose values were measured
    assert lora_B.shape == (48, 4)
    assert not lora_B.requires_grad
    reached = torch.linalg.svdvals(lora_B.double().T @ weight.double())
    assert (reached[0].item(), reached[-1].item()) == ends_of(row)
    assert "(max usable r is 32)" in spectra.measure("layer", layer, 33).reason


# Numbers


def diagonal(*values):
    return torch.diag(torch.tensor(values))


@pytest.fixture
def solver(monkeypatch):
    """Replaces the solver by one that takes diagonal matrices; calls are noted, as (shape, rank)."""
    calls = []

    def replace(certificate):
        def solve(weight, rank):
            calls.append((tuple(weight.shape), rank))
            basis = torch.eye(len(weight), dtype=torch.float64)[:, -rank:]
            proven, excess = certificate(weight, rank)
            return MinorSubspace(basis, weight.diagonal()[-rank:].double(), "gram", proven, excess, 1e-14)

        monkeypatch.setattr(spectra, "minor_subspace", solve)
        return calls

    return replace


@pytest.mark.parametrize(("above", "ranks", "reported"), [(2.0, [3], 3e-9), (1e3, [3, 2], 7e-9)])
def test_the_bound_is_for_the_chosen_rank(above, ranks, reported, solver):
    """An excess of the three vectors may be one of the chosen two: more of their smaller energy."""
    calls = solver(lambda weight, rank: (True, 1e-9 if rank == 3 else 7e-9))
    row = spectra.measure("layer", linear(diagonal(1e4, 1e4, 1e4, above, 1.0, 1.0)), 2)
    assert [rank for _, rank in calls] == ranks
    assert (row.proven, row.sigma_above) == (True, above)
    assert row.energy_excess == pytest.approx(reported)


def test_null_singular_values_are_shown_and_not_warned_about(recwarn):
    row = spectra.measure("layer", linear(torch.ones(9, 8)), 4)
    assert row.sigma_largest == pytest.approx(0, abs=1e-6)
    assert spectra.measure("layer", linear(torch.zeros(9, 8)), 4).energy_share is None
    assert not [warning for warning in recwarn if "null" in str(warning.message)]


def test_a_stack_has_the_numbers_of_its_worst_expert(solver, monkeypatch):
    """The expert with the smallest gap is shown; proven and the bound hold for all of them."""
    certificates = {8.0: (True, 1e-9), 2.0: (True, 2e-9), 4.0: (False, 3e-9)}  # by the value above the cut
    solver(lambda weight, rank: certificates[weight[3, 3].item()])
    monkeypatch.setattr(spectra, "narrow", lambda *_: None)
    experts = [diagonal(9.0, 9.0, 9.0, above, 1.0, 1.0) for above in certificates]
    stack = moe_models.holder(torch.stack(experts))["experts"]
    before = copy.deepcopy(stack.state_dict())
    row = spectra.measure("experts.down_proj", stack, 2, "down_proj")
    assert (row.reason, row.shape, row.expert, row.gap) == (None, (3, 6, 6), 1, 2.0)
    assert (row.sigma_largest, row.sigma_smallest) == (1.0, 1.0)
    assert (row.proven, row.energy_excess) == (False, 3e-9)
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())


def test_of_a_smaller_rank_the_last_columns_where_all_was_proven_and_determined():
    stored = minor_subspace(torch.randn(60, 40), 8)
    for rank in (3, 8):
        kept = spectra.narrow(stored, rank)
        assert torch.equal(kept.basis, stored.basis[:, -rank:])
        assert torch.equal(kept.singular_values, stored.singular_values[-rank:])
        assert kept.certified
    assert spectra.narrow(replace(stored, certified=False), 3) is None
    assert spectra.narrow(replace(stored, null_count=2), 3) is None


@pytest.mark.parametrize("block", [1, 2**20])
@pytest.mark.parametrize("shape", [(64, 64), (40, 7), (7, 40), (1, 9), (9, 1)])
def test_squared_norm(shape, block, monkeypatch):
    """Of a weight in one block, and row by row."""
    monkeypatch.setattr(gram, "BLOCK_ROWS", block)
    monkeypatch.setattr(gram, "BLOCK_ELEMENTS", block)
    for matrix in (torch.randn(shape), torch.ones(shape), torch.zeros(shape), torch.randn(shape).bfloat16()):
        squared = matrix.double().square().sum().item()
        assert spectra.squared_norm(matrix) == pytest.approx(squared, rel=1e-12)
