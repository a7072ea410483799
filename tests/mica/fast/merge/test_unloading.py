"""`merge_and_unload`: no undo where the layer goes, an exact one where it stays because something fails."""

import copy

import pytest
import torch
from peft.tuners import lora
from torch import nn

import mica.fast
from mica.fast import known_peft
from mica.fast.merge import merging
from tests.support.merging_models import assert_same_bits, exact_merge, quietly, trained, weights
from tests.support.models import adapted_layers, factors, randomise, stored
from tests.support.moe_models import second
from tests.support.stock import assert_same
from tests.support.tolerances import RELATIVE, error

BF16 = torch.bfloat16
KINDS = ["linear", "lora", "qwen3_moe"]


@pytest.fixture
def recorded(monkeypatch):
    """(layer, adapter, its record) of every merge."""
    records = []
    record = merging.record

    def recording(layer, adapter, undo):
        records.append((layer, adapter, undo))
        record(layer, adapter, undo)

    monkeypatch.setattr(merging, "record", recording)
    return records


def corrected(recorded):
    """Which of them can be undone to the bit."""
    return [undo.kept is not None for _, _, undo in recorded]


def refused_at(layer, model, adapter="default", **options):
    """`merge_and_unload` of the model, whose layer gets a NaN in A: with ``safe_merge`` PEFT refuses it."""
    with torch.no_grad():
        factors(layer, adapter)[0].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True, **options)


# -- what is left out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_and_the_report_are_those_of_a_merge(kind, dtype, safe_merge, monkeypatch):
    monkeypatch.setattr(merging, "MEASURED_ROWS", 1)
    model = trained(kind, dtype, scale=0.02)
    merged = copy.deepcopy(model)
    merged.merge_adapter(safe_merge=safe_merge)
    report = mica.fast.merge_report(merged)
    expected = {name.removeprefix("base_model.model."): stats for name, stats in report.layers.items()}
    unloaded = model.merge_and_unload(safe_merge=safe_merge)
    assert mica.fast.merge_report(unloaded).layers == expected
    assert mica.fast.merge_report(unloaded).swallowed == report.swallowed
    assert_same(unloaded.state_dict(), merged.merge_and_unload().state_dict(), 0.0)


@pytest.mark.parametrize(
    ("names", "undone"),
    [(None, [False]), (["default", "second"], [True, False]), (["default", "another"], [False])],
    ids=["a layer that goes", "only its last adapter", "a name that no layer has"],
)
def test_what_is_merged_last_into_a_layer_that_goes_has_none(recorded, names, undone):
    randomise(second(trained()), scale=0.5, seed=3).merge_and_unload(adapter_names=names)
    assert corrected(recorded) == undone * 3


def test_of_nested_wrappers_only_the_innermost_has_none(recorded):
    trained("qwen3_moe").merge_and_unload()
    innermost = [not isinstance(layer.base_layer, lora.LoraLayer) for layer, _, _ in recorded]
    assert {*innermost} == {True, False}
    assert corrected(recorded) == [not is_innermost for is_innermost in innermost]


def test_a_layer_at_two_places_keeps_its_undo_and_unmerges_at_the_other(recorded):
    """PEFT replaces it at the first."""
    model = trained(dtype=BF16)
    inner = model.base_model.model
    inner.again = inner.up
    before = stored(inner.up).detach().clone()
    unloaded = model.merge_and_unload()
    assert isinstance(unloaded.again, lora.Linear)
    assert sorted(corrected(recorded)) == [False, False, True]
    quietly(unloaded.again.unmerge)
    assert torch.equal(stored(unloaded.again), before)


def test_a_release_that_unloads_otherwise_keeps_all(recorded, monkeypatch):
    name = "peft.tuners.lora.model:LoraModel._unload_and_optionally_merge"
    monkeypatch.setitem(known_peft.UNLOADING, name, "another")
    trained().merge_and_unload()
    assert corrected(recorded) == [True] * 3


# -- what happens afterwards --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_was_kept_unmerges_by_subtraction_and_says_so(kind):
    """The update that was merged, not the one that A makes now."""
    model = trained(kind, BF16)
    layers = list(adapted_layers(model).values())
    layer = layers[-1]
    before = stored(layer).detach().clone()
    model.merge_and_unload()
    with torch.no_grad():
        factors(layer)[0].fill_(7.0)
    with pytest.warns(UserWarning, match="subtracting its update .* merged by merge_and_unload"):
        layer.unmerge()
    assert error(stored(layer), before) <= RELATIVE[BF16]


def test_after_a_failure_merges_have_their_undo_again(recorded):
    model = trained(dtype=BF16)
    first, layer, _ = adapted_layers(model).values()
    refused_at(first, model)
    before = stored(layer).detach().clone()
    layer.merge()
    assert corrected(recorded) == [True]
    quietly(layer.unmerge)
    assert torch.equal(stored(layer), before)


# -- a failure on the way -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_a_refused_layer_leaves_those_before_it_merged_and_itself_as_it_was(number):
    model = trained(dtype=BF16)
    before = weights(model)
    layers = adapted_layers(model)
    expected = {name: exact_merge(layer, before[name]) for name, layer in layers.items()}
    names = list(layers)
    layer = layers[names[number]]
    refused_at(layer, model)
    assert list(adapted_layers(model)) == names[number:]
    for name in names[:number]:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear | nn.Embedding)
        assert error(module.weight, expected[name]) <= RELATIVE[BF16]
    assert not layer.merged_adapters
    assert_same_bits(model, before)
    assert list(mica.fast.merge_report(model).layers) == names[:number]


def test_a_refused_second_adapter_leaves_a_first_that_unmerges_to_the_bit():
    model = randomise(second(trained(dtype=BF16)), scale=0.5, seed=3)
    before = weights(model)
    name, layer = next(iter(adapted_layers(model).items()))
    refused_at(layer, model, "second", adapter_names=["default", "second"])
    assert layer.merged_adapters == ["default"]
    assert list(mica.fast.merge_report(model).layers) == [name]
    quietly(layer.unmerge)
    assert_same_bits(model, before)


def test_a_refused_inner_wrapper_leaves_an_outer_one_that_unmerges_to_the_bit():
    model = trained("qwen3_moe", BF16)
    before = weights(model)
    layers = adapted_layers(model)
    outer = next(layer for layer in layers.values() if isinstance(layer.base_layer, lora.LoraLayer))
    refused_at(outer.base_layer, model)
    assert outer.merged_adapters == ["default"]
    quietly(outer.unmerge)
    assert_same_bits(model, before)
