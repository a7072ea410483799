"""Merging linear layers, embeddings, plain LoRA and stacks of experts: one rounding, every bit back."""

import copy
import itertools
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import mica.fast
from mica.fast.merge import merging
from tests.support.merging_models import (
    LORA,
    assert_same_bits,
    exact_merge,
    quietly,
    trained,
    weights,
    without_lora,
)
from tests.support.models import INDICES, Net, adapted_layers, factors, net, randomise, stored, wrap
from tests.support.moe_models import BUILDERS, qwen3_moe, second, wrap_experts
from tests.support.stock import uninstalled
from tests.support.tolerances import RELATIVE, error

pytestmark = pytest.mark.usefixtures("language")  # each test once with the C++ and once without

BF16 = torch.bfloat16
KINDS = ["linear", "lora", "qwen3_moe"]  # for `trained`: dense layers, and experts with their router
of_three_kinds = pytest.mark.parametrize("kind", KINDS)
in_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, BF16])


def assert_close(model, before, tolerance):
    for name, weight in weights(model).items():
        assert error(weight, before[name]) <= tolerance, name


def output(model, grad=False):
    with torch.set_grad_enabled(grad):
        out = model(INDICES)
    return getattr(out, "logits", out)


# -- there and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1], ids=["one chunk", "one row per chunk"])
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(
    ("kind", "rank"),
    [("linear", 4), ("lora", 4), ("dora", 4), ("qwen3_moe", 4), ("gpt_oss", 4), ("gpt_oss", 1)],
)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merges_in_fp32_and_rounds_once_and_unmerges_to_the_bit(
    kind, rank, dtype, safe_merge, chunk, monkeypatch
):
    if chunk:
        monkeypatch.setattr(merging, "CHUNK", chunk)
    model = trained(kind, dtype, rank=rank)
    before = weights(model)
    quietly(model.merge_adapter, safe_merge=safe_merge)
    eps = torch.finfo(dtype).eps
    for name, layer in adapted_layers(model).items():
        merged, exact = stored(layer), exact_merge(layer, before[name])
        assert merged.dtype == dtype
        assert not torch.equal(merged, before[name])
        # Half a unit in the last place, and a little for the sum itself, which is in fp32, or fp64 for fp64
        rounding = 0.5 * eps * exact.abs() * 1.01 + (1e-6 if dtype != torch.float64 else 1e-15)
        assert ((merged.double() - exact).abs() <= rounding).all()
    quietly(model.unmerge_adapter)
    assert_same_bits(model, before)
    if dtype == BF16:  # fault 6 of stock PEFT is real: its unmerge does not give W back
        with mica.fast.disabled():
            model.merge_adapter()
            model.unmerge_adapter()
        assert any(not torch.equal(weight, before[name]) for name, weight in weights(model).items())


@in_both_dtypes
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_only_weights_that_the_merged_ones_do_not_give_back_are_kept(kind, dtype):
    model = trained(kind, dtype, scale=0.03)
    model.merge_adapter()
    layers = adapted_layers(model).values()
    kept = sum(len(vars(layer)[merging.RECORDS]["default"].kept.values) for layer in layers)
    assert 0 < kept < 0.5 * sum(stored(layer).numel() for layer in layers)


def test_square_conv1d_is_merged_the_right_way_round_and_tied_weights_stay_tied():
    """Square, because there a transposed update fits too."""
    model = nn.ModuleDict({"conv": Conv1D(8, 8), "tied": Conv1D(8, 8)})
    model["tied"].weight = model["conv"].weight
    layer = randomise(wrap(model, targets=["conv"], fan_in_fan_out=True)).base_model.model["conv"]
    x = torch.randn(3, 8)
    expected = layer(x)
    layer.merge()
    assert error(layer(x), expected) <= RELATIVE[torch.float32]
    layer.unmerge()
    assert layer.base_layer.weight.data_ptr() == model["tied"].weight.data_ptr()


# Also those whose layers are nested wrappers of PEFT
of_every_kind = pytest.mark.parametrize("kind", ["linear", "lora", "dora", *BUILDERS])


@in_both_dtypes
@of_every_kind
def test_a_merged_model_has_the_same_outputs_and_so_has_an_unloaded_one(kind, dtype):
    """`disable_adapter` unmerges it, and without its adapter it is the base."""
    has_experts = kind in BUILDERS
    model = trained(kind, dtype, scale=0.3 if has_experts else 0.1)
    tolerance = (10 if has_experts else 3) * RELATIVE[dtype]  # of experts stock rounds W + s·B·A twice
    before, expected = weights(model), output(model)
    with model.disable_adapter():
        bare = output(model)
    assert torch.equal(output(copy.deepcopy(model).unload()), bare)
    model.merge_adapter()
    assert error(output(model), expected) <= tolerance
    assert mica.fast.explain(model).counts() == {"peft": len(adapted_layers(model))}
    with model.disable_adapter():
        assert torch.equal(output(model), bare)
    assert_same_bits(model, before)
    assert torch.equal(output(model), expected)
    unloaded = model.merge_and_unload()
    assert not adapted_layers(unloaded)
    assert error(output(unloaded), expected) <= tolerance


@of_three_kinds
def test_many_rounds_of_merge_train_unmerge(kind):
    """As RL trainers do at every step; what was merged is taken out, not what A and B make now."""
    model = trained(kind, BF16)
    before = weights(model)
    for seed in range(3 if kind == "qwen3_moe" else 20):
        model.merge_adapter()
        randomise(model, seed=seed)
        for layer in adapted_layers(model).values():
            layer.scaling["default"] = 17.0 + seed
            factors(layer)[1].detach().neg_()
        quietly(model.unmerge_adapter)
    assert_same_bits(model, before)


@of_three_kinds
def test_two_adapters_merge_and_unmerge_in_order(kind):
    model = trained(kind, BF16)
    randomise(second(model), scale=0.5, seed=3)
    before = weights(model)
    quietly(model.merge_adapter, ["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter(["default"])
    assert all(layer.merged_adapters == ["default", "second"] for layer in adapted_layers(model).values())
    quietly(model.unmerge_adapter)
    assert_same_bits(model, before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_experts_next_to_plain_lora_which_stock_merges():
    """LoRA is merged first, by stock's code and without a record of ours."""
    model = second(trained("qwen3_moe"), init_lora_weights=False)
    before = weights(model)
    quietly(model.merge_adapter, ["default", "second"])
    for name, layer in adapted_layers(model).items():
        assert layer.merged_adapters == ["second", "default"]
        assert list(vars(layer)[merging.RECORDS]) == ["default"]
        exact = exact_merge(layer, exact_merge(layer, before[name]), "second")
        assert error(stored(layer), exact) <= RELATIVE[torch.float32]
    quietly(model.unmerge_adapter)
    assert_close(model, before, RELATIVE[torch.float32])


# -- what may happen while merged ---------------------------------------------------------------------


def with_another_value(weight):
    weight[(0,) * weight.ndim] += 1
    return weight


EDITS = {
    "value": with_another_value,
    "dtype": torch.Tensor.float,
    # In bf16 four columns are the 8 bytes that a fingerprint takes as one word: a plain sum would miss this
    "columns": lambda weight: weight.unflatten(-1, (-1, 4)).flip(-2).flatten(-2).contiguous(),
}


@pytest.mark.parametrize("edit", EDITS)
@of_three_kinds
def test_an_edit_while_merged_is_seen_and_said(kind, edit):
    """The update is taken out of what is there; no bits are put back at the wrong places."""
    model = trained(kind, BF16)
    name, layer = next(reversed(adapted_layers(model).items()))
    before = weights(model)[name]
    update = exact_merge(layer, before) - before.double()
    model.merge_adapter()
    stored(layer).data = EDITS[edit](stored(layer).data)
    edited = stored(layer).detach().clone()
    with pytest.warns(UserWarning, match=r"edited .* cast or moved"):
        model.unmerge_adapter()
    assert stored(layer).dtype == edited.dtype
    assert error(stored(layer), edited.double() - update) <= RELATIVE[BF16]
    assert not torch.equal(stored(layer), before)


def test_an_unmerge_that_computes_otherwise_than_the_merge_is_seen_and_said():
    """As products on another device may do in their last bits."""
    model = trained(dtype=BF16)
    model.merge_adapter()
    (undo,) = vars(model.base_model.model.up)[merging.RECORDS].values()
    undo.update.down.mul_(1.5)
    with pytest.warns(UserWarning, match=r"edited .* cast or moved"):
        model.unmerge_adapter()


@pytest.mark.whole
@pytest.mark.parametrize("off", [mica.fast.disabled, uninstalled, without_lora])
@of_three_kinds
def test_switching_off_in_between_still_unmerges_to_the_bit(kind, off):
    model = trained(kind, BF16)
    before = weights(model)
    model.merge_adapter()
    with off():
        if off is not uninstalled:
            quietly(model.unmerge_adapter)
    if off is uninstalled:
        quietly(model.unmerge_adapter)
    assert_same_bits(model, before)


@pytest.mark.parametrize(("how", "dtype"), [("disabled", torch.float32), ("pickled", BF16)])
@pytest.mark.parametrize("kind", ["linear", "qwen3_moe"])
def test_a_merge_without_a_record_is_unmerged_by_subtraction_and_that_is_said(kind, how, dtype):
    """Made by stock, or before the model was pickled: a pickle holds nothing of this package."""
    model = trained(kind, dtype)
    before = weights(model)
    with mica.fast.disabled() if how == "disabled" else nullcontext():
        model.merge_adapter()
    for module in model.modules():
        # transformers keeps functions in it, if it can use Hugging Face's kernels, and pickle refuses them
        vars(module).pop("_kernel_funcs", None)
    data = pickle.dumps(model)
    assert b"mica.fast" not in data
    if how == "pickled":
        model = pickle.loads(data)
    with pytest.warns(UserWarning, match="no record of its merge"):
        model.unmerge_adapter()
    assert_close(model, before, RELATIVE[dtype])
    model.merge_adapter()  # this one leaves a record
    quietly(model.unmerge_adapter)


@pytest.mark.parametrize("off", [mica.fast.disabled, uninstalled])
@of_three_kinds
def test_what_stock_has_merged_since_is_not_undone_with_an_old_record(kind, off):
    """What stock merged within `disabled` it unmerges itself; after `uninstalled` we do, by subtraction."""
    model = trained(kind, scale=0.1)
    before = weights(model)
    model.merge_adapter()
    with off():
        model.unmerge_adapter()
        randomise(model, scale=3.0, seed=9)
        model.merge_adapter()
        if off is mica.fast.disabled:
            model.unmerge_adapter()
    if off is uninstalled:
        assert not mica.fast.merge_report(model).layers
        with pytest.warns(UserWarning, match="present update in fp32, .* stock PEFT merged it"):
            model.unmerge_adapter()
    assert_close(model, before, 200 * RELATIVE[torch.float32])  # a wrong update is off by more than 1


def test_a_weight_that_is_not_contiguous_is_merged_and_unmerged_by_stock():
    model = trained()
    layer = model.base_model.model.up
    stored(layer).data = stored(layer).data.t().contiguous().t()
    before = weights(model)
    exact = exact_merge(layer, stored(layer).detach().clone())
    quietly(model.merge_adapter)
    assert error(stored(layer), exact) <= RELATIVE[torch.float32]
    assert not any(name.endswith("up") for name in mica.fast.merge_report(model).layers)
    quietly(model.unmerge_adapter)
    assert_close(model, before, RELATIVE[torch.float32])


@pytest.mark.parametrize(
    ("kind", "dtype"), [*itertools.product(KINDS, [torch.float32]), ("linear", torch.float16)]
)
def test_a_merge_that_is_refused_changes_nothing_and_leaves_no_record(kind, dtype):
    """For a NaN in A; in fp16 for a sum that overflows."""
    model = trained(kind, dtype)
    before, layer = weights(model), list(adapted_layers(model).values())[1]
    with torch.no_grad():
        factors(layer)[0].view(-1)[0] = float("nan") if dtype == torch.float32 else 1e30
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert_same_bits(model, before)
    assert not layer.merged_adapters
    assert str(mica.fast.merge_report(model)).startswith("nothing was merged")
    assert all("mica" not in key for key in vars(layer))


@pytest.mark.parametrize("first", ["copy", "original"])
@of_three_kinds
def test_a_deep_copy_of_a_merged_model_unmerges_to_the_bit(kind, first):
    model = trained(kind, BF16)
    before = weights(model)
    model.merge_adapter()
    copied = copy.deepcopy(model)
    assert mica.fast.merge_report(copied).swallowed == mica.fast.merge_report(model).swallowed > 0
    for merged in (copied, model) if first == "copy" else (model, copied):
        quietly(merged.unmerge_adapter)
        assert_same_bits(merged, before)


# -- within autocast and inference mode ------------------------------------------------------------


@in_both_dtypes
@pytest.mark.parametrize(("merging_in", "unmerging_in"), [(False, True), (True, False), (True, True)])
def test_autocast_rounds_no_update(dtype, merging_in, unmerging_in):
    """An evaluation within autocast unmerges in `disable_adapter`; stock's update is in 16 bits then."""

    def round_trip(model):
        """The errors of the merged weight, and of all weights after the unmerge."""
        up, before = model.base_model.model.up, weights(model)
        exact = exact_merge(up, before["base_model.model.up"])
        with torch.autocast("cpu", BF16, enabled=merging_in):
            model.merge_adapter()
        merged = error(up.base_layer.weight, exact)
        with torch.autocast("cpu", BF16, enabled=unmerging_in), model.disable_adapter():
            model(INDICES)
        after = weights(model)
        return merged, max(error(after[name], before[name]) for name in before)

    model = randomise(net(dtype), scale=1.0).eval()
    stock = copy.deepcopy(model)
    merged, unmerged = round_trip(model)
    assert merged <= RELATIVE[dtype]
    assert unmerged == 0.0
    with mica.fast.disabled():
        assert max(round_trip(stock)) > 1e-3


@pytest.mark.whole
@pytest.mark.parametrize(
    ("made_in", "merged_in", "safe"), [(True, False, False), (False, True, True), (True, True, False)]
)
@of_three_kinds
def test_inference_mode(kind, made_in, merged_in, safe):
    """A model made in inference mode, or merged in it and in autocast, is unmerged outside of it."""
    mica.fast.enable(lora=kind == "lora")
    adapt, build = (wrap_experts, qwen3_moe) if kind == "qwen3_moe" else (wrap, Net)
    with torch.inference_mode(made_in):
        base = build()
    model = randomise(adapt(base, **LORA) if kind == "lora" else adapt(base), scale=1.0)
    before = weights(model)
    with torch.inference_mode(merged_in), torch.autocast("cpu", torch.float16, enabled=merged_in):
        model.merge_adapter(safe_merge=safe)
    assert not any(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    with torch.autocast("cpu", BF16, enabled=merged_in):
        quietly(model.unmerge_adapter)
    assert_same_bits(model, before)
    if not made_in:  # a weight of inference mode has no gradients over it
        assert not any(stored(layer).is_inference() for layer in adapted_layers(model).values())
        output(model, grad=True).square().mean().backward()


# -- what is known of a merge ----------------------------------------------------------------------


def parameters_of(kind):
    """Names of the adapted parameters in the base model."""
    if kind == "linear":
        return {"embed", "up", "down"}
    if kind == "lora":
        return {"up", "conv", "down"}
    places = ("experts.down_proj", "experts.gate_up_proj", "gate")
    return {f"model.layers.{layer}.mlp.{place}" for layer in (0, 1) for place in places}


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@of_three_kinds
def test_report_says_what_rounding_swallowed(kind, monkeypatch):
    """As a share of the update, of all layers together: in a model that is merged, or merged and unloaded."""
    monkeypatch.setattr(merging, "MEASURED_ROWS", 1)
    model = trained(kind, BF16, scale=0.02)
    before = weights(model)
    model.merge_adapter()
    update_squared = error_squared = 0.0
    for name, layer in adapted_layers(model).items():
        update = exact_merge(layer, before[name]) - before[name].double()
        moved = stored(layer).double() - before[name].double()
        update_squared += update.square().sum().item()
        error_squared += (moved - update).square().sum().item()
    expected = (error_squared / update_squared) ** 0.5
    report = mica.fast.merge_report(model)
    assert report.swallowed == pytest.approx(expected, rel=1e-4)
    assert 0.004 < report.swallowed < 1
    names = parameters_of(kind)
    assert f"{len(names)} layers merged into bfloat16: rounding swallowed" in str(report)
    report = mica.fast.merge_report(model.merge_and_unload())
    assert report.swallowed == pytest.approx(expected, rel=1e-4)
    assert set(report.layers) == names
