import copy
import itertools
import pickle
import warnings

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import mica.fast
from mica.fast.forward.eligibility import adapter_weights
from mica.fast.merge import merging
from tests.support.models import Net, adapted_layers, net, randomise, wrap
from tests.support.tolerances import RELATIVE, error

INDICES = torch.tensor([[1, 2, 3, 28], [0, 7, 7, 3]])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def base_weights(model):
    return {
        name: layer.get_base_layer().weight.detach().clone() for name, layer in adapted_layers(model).items()
    }


def exact_merge(layer, weight, adapter="default"):
    lora_A, lora_B = adapter_weights(layer, adapter)
    update = layer.scaling[adapter] * (lora_B.double() @ lora_A.double())
    return weight.double() + (update if weight.shape == update.shape else update.t())


@pytest.fixture(params=[None, 1], ids=["one chunk", "one row per chunk"])
def _chunked(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(merging, "_CHUNK", request.param)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merges_in_fp32_and_rounds_once_and_unmerges_to_the_bit(dtype, safe_merge):
    model = randomise(net(dtype, targets=["embed", "up", "down"]), scale=0.3)
    before = base_weights(model)
    model.merge_adapter(safe_merge=safe_merge)
    eps = torch.finfo(dtype).eps
    for name, layer in adapted_layers(model).items():
        merged, exact = layer.get_base_layer().weight, exact_merge(layer, before[name])
        assert merged.dtype == dtype
        assert (
            (merged.double() - exact).abs()
            <= 0.5 * eps * exact.abs() * 1.01 + (1e-6 if eps > 1e-10 else 1e-15)
        ).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()
    for name, weight in base_weights(model).items():
        assert torch.equal(weight.view(torch.uint8), before[name].view(torch.uint8)), name


def test_square_conv1d_is_merged_the_right_way_round():
    modules = torch.nn.ModuleDict({"conv": Conv1D(8, 8)})
    model = wrap(modules, targets=["conv"], fan_in_fan_out=True)
    layer = randomise(model).base_model.model["conv"]
    x = torch.randn(3, 8)
    expected = layer(x)
    model.merge_adapter()
    assert error(layer(x), expected) <= RELATIVE[torch.float32]


def test_stock_loses_what_this_keeps():
    """Fault 6 is real: in bf16 stock's unmerge does not give W back."""
    model = randomise(net(torch.bfloat16, targets=["up"]), scale=0.02)
    before = base_weights(model)
    with mica.fast.disabled():
        model.merge_adapter()
        model.unmerge_adapter()
    assert any(not torch.equal(weight, before[name]) for name, weight in base_weights(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_merged_and_unmerged(dtype):
    model = randomise(net(dtype, targets=["embed", "up", "down"])).eval()
    expected = model(INDICES)
    model.merge_adapter()
    assert error(model(INDICES), expected) <= 3 * RELATIVE[dtype]
    assert mica.fast.explain(model).counts() == {"peft": 3}
    model.unmerge_adapter()
    assert torch.equal(model(INDICES), expected)
    merged = model.merge_and_unload()
    assert error(merged(INDICES), expected) <= 3 * RELATIVE[dtype]


def test_many_rounds_of_merge_train_unmerge():
    """What RL trainers do at every step: the base weight must not drift by a bit."""
    model = net(torch.bfloat16, targets=["up", "down"])
    before = base_weights(model)
    for seed in range(20):
        randomise(model, seed=seed)
        model.merge_adapter()
        model.unmerge_adapter()
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, before[name])


def test_adapter_may_change_while_merged():
    """The update that was merged is taken out, not the one that A makes now."""
    model = randomise(net(torch.bfloat16, targets=["up"]))
    before = base_weights(model)
    model.merge_adapter()
    randomise(model, seed=9)
    model.base_model.model.up.scaling["default"] = 17.0
    model.unmerge_adapter()
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, before[name])


def test_two_adapters_merge_and_unmerge_in_order():
    model = randomise(net(torch.bfloat16, targets=["up"]))
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    layer = model.base_model.model.up
    with torch.no_grad():
        layer.lora_A["second"].weight.copy_(torch.randn(4, 12))
    before = base_weights(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    model.unmerge_adapter()
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("edit", ["value", "dtype"])
def test_an_edit_while_merged_is_seen_and_said(edit):
    model = randomise(net(torch.bfloat16, targets=["up"]), scale=0.3)
    weight = model.base_model.model.up.base_layer.weight
    before = weight.detach().clone()
    model.merge_adapter()
    if edit == "value":
        weight.data[0, 0] += 1
    else:
        model.base_model.model.up.base_layer.float()
    with pytest.warns(UserWarning, match="edited, cast or moved"):
        model.unmerge_adapter()
    restored = model.base_model.model.up.base_layer.weight.detach().double()
    restored[0, 0] = before[0, 0]
    assert error(restored, before) <= RELATIVE[torch.bfloat16]


def test_disabling_in_between_still_unmerges_to_the_bit():
    model = randomise(net(torch.bfloat16, targets=["up"]))
    before = base_weights(model)
    model.merge_adapter()
    with mica.fast.disabled():
        model.unmerge_adapter()
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, before[name])


def test_broken_adapter_is_refused_by_safe_merge():
    model = randomise(net(targets=["up"]))
    before = base_weights(model)
    with torch.no_grad():
        model.base_model.model.up.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, before[name])


def test_tied_weights_stay_tied():
    model = Net(torch.bfloat16)
    tied = model.down.weight
    model.also = torch.nn.Linear(16, 10, bias=False)
    model.also.weight = tied
    model = randomise(wrap(model, targets=["down"]))
    model.merge_adapter()
    model.unmerge_adapter()
    assert (
        model.base_model.model.down.base_layer.weight.data_ptr()
        == model.base_model.model.also.weight.data_ptr()
    )


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
def test_report_says_what_rounding_swallowed():
    model = randomise(net(torch.bfloat16, targets=["up", "down"]), scale=0.02)
    before = base_weights(model)
    assert str(mica.fast.merge_report(model)).startswith("no MiCA adapter was merged")
    model.merge_adapter()
    update_squared = error_squared = 0.0
    for name, layer in adapted_layers(model).items():
        update = exact_merge(layer, before[name]) - before[name].double()
        moved = layer.get_base_layer().weight.double() - before[name].double()
        update_squared += update.square().sum().item()
        error_squared += (moved - update).square().sum().item()
    expected = (error_squared / update_squared) ** 0.5
    report = mica.fast.merge_report(model)
    assert report.swallowed == pytest.approx(expected, rel=1e-4)
    assert 0.005 < report.swallowed < 1
    assert "2 layers merged into bfloat16: rounding swallowed" in str(report)
    unloaded = model.merge_and_unload()
    assert mica.fast.merge_report(unloaded).swallowed == pytest.approx(expected, rel=1e-4)
    assert set(mica.fast.merge_report(unloaded).layers) == {"up", "down"}


def test_report_of_fp32_is_near_zero_and_goes_with_the_unmerge():
    model = randomise(net(targets=["up"]))
    model.merge_adapter()
    assert mica.fast.merge_report(model).swallowed < 1e-4
    model.unmerge_adapter()
    assert not mica.fast.merge_report(model).layers


def _quietly_unmerged(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()
    return base_weights(model)


def test_what_stock_has_merged_since_is_not_undone_with_an_old_record():
    model = randomise(net(targets=["up"]))
    before = base_weights(model)
    model.merge_adapter()
    mica.fast.uninstall()
    model.unmerge_adapter()
    randomise(model, scale=3.0, seed=9)
    model.merge_adapter()
    mica.fast.enable()
    assert not mica.fast.merge_report(model).layers
    with pytest.warns(UserWarning, match="present update in fp32, .* stock PEFT merged it"):
        model.unmerge_adapter()
    for name, weight in base_weights(model).items():
        assert error(weight, before[name]) <= 10 * RELATIVE[torch.float32]


def test_uninstalling_in_between_still_unmerges_to_the_bit():
    model = randomise(net(torch.bfloat16, targets=["up"]))
    before = base_weights(model)
    model.merge_adapter()
    mica.fast.uninstall()
    mica.fast.enable()
    for name, weight in _quietly_unmerged(model).items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_refused_merge_leaves_no_record(dtype):
    """One refused for a NaN in A, one for an overflow of the sum."""
    model = randomise(net(dtype, targets=["up"]))
    layer = model.base_model.model.up
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan") if dtype == torch.float32 else 1e30
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert str(mica.fast.merge_report(model)).startswith("no MiCA adapter was merged")
    assert all("mica" not in key for key in vars(layer))


@pytest.mark.parametrize("first", ["copy", "original"])
def test_a_deep_copy_of_a_merged_model_unmerges_to_the_bit(first):
    model = randomise(net(torch.bfloat16, targets=["embed", "up"]), scale=0.3)
    before = base_weights(model)
    model.merge_adapter()
    copied = copy.deepcopy(model)
    assert mica.fast.merge_report(copied).swallowed == mica.fast.merge_report(model).swallowed > 0
    for merged in (copied, model) if first == "copy" else (model, copied):
        for name, weight in _quietly_unmerged(merged).items():
            assert torch.equal(weight, before[name])


def test_a_merged_model_from_a_pickle_is_unmerged_by_subtraction_and_that_is_said():
    model = randomise(net(torch.bfloat16, targets=["up"]), scale=0.3)
    before = base_weights(model)
    model.merge_adapter()
    data = pickle.dumps(model)
    assert b"mica.fast" not in data
    loaded = pickle.loads(data)
    with pytest.warns(UserWarning, match="no record of its merge"):
        loaded.unmerge_adapter()
    for name, weight in base_weights(loaded).items():
        assert error(weight, before[name]) <= RELATIVE[torch.bfloat16]
    loaded.merge_adapter()  # from here on there is one
    _quietly_unmerged(loaded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(12, 20), (7, 9)], ids=["whole words", "odd"])
def test_weights_at_other_places_are_seen(dtype, dim, shape):
    """Every exchange of two rows or columns of a weight, and every change of one sign."""
    weight = torch.randn(shape, dtype=dtype)
    fingerprint = merging.fingerprint(weight)
    assert fingerprint.shape == weight.shape[:1]
    for first, second in itertools.combinations(range(weight.shape[dim]), 2):
        order = list(range(weight.shape[dim]))
        order[first], order[second] = second, first
        moved = weight.index_select(dim, torch.tensor(order))
        assert not torch.equal(merging.fingerprint(moved), fingerprint)
    for place in itertools.product(*map(range, shape)):
        negated = weight.clone()
        negated[place] *= -1
        changed = merging.fingerprint(negated) != fingerprint
        assert changed.nonzero().flatten().tolist() == [place[0]]


def test_columns_permuted_while_merged_are_not_put_back_at_the_wrong_places():
    model = randomise(net(torch.bfloat16, targets=["down"]), scale=0.3)
    layer = model.base_model.model.down
    before = layer.base_layer.weight.detach().clone()
    order = torch.arange(16).view(4, 4).flip(0).flatten()  # four at a time, 8 bytes
    model.merge_adapter()
    layer.base_layer.weight.data = layer.base_layer.weight.data[:, order].contiguous()
    merged = layer.base_layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="edited, cast or moved"):
        model.unmerge_adapter()
    lora_A, lora_B = adapter_weights(layer, "default")
    update = layer.scaling["default"] * (lora_B.double() @ lora_A.double())
    restored = layer.base_layer.weight.detach()
    assert error(restored, merged.double() - update) <= RELATIVE[torch.bfloat16]
    assert not torch.equal(restored, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("merging_in", "unmerging_in"), [(False, True), (True, False), (True, True)])
def test_autocast_rounds_no_update(dtype, merging_in, unmerging_in):
    """An evaluation within autocast unmerges in `disable_adapter`; stock's update is in 16 bits then."""

    def round_trip(model):
        up, before = model.base_model.model.up, base_weights(model)
        exact = exact_merge(up, before["base_model.model.up"])
        with torch.autocast("cpu", torch.bfloat16, enabled=merging_in):
            model.merge_adapter()
        merged = error(up.base_layer.weight, exact)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=unmerging_in),
            torch.no_grad(),
            model.disable_adapter(),
        ):
            model(INDICES)
        after = base_weights(model)
        return merged, max(error(after[name], before[name]) for name in before)

    model = randomise(net(dtype), scale=1.0).eval()
    stock = copy.deepcopy(model)
    merged, unmerged = round_trip(model)
    assert merged <= RELATIVE[dtype]
    assert unmerged == 0.0
    with mica.fast.disabled():
        assert max(round_trip(stock)) > 1e-3


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(("made_in", "merged_in"), [(True, False), (False, True), (True, True)])
def test_inference_mode(made_in, merged_in, safe):
    """A model made in it, or merged in it, is unmerged outside."""
    with torch.inference_mode(made_in):
        base = Net()
    model = randomise(wrap(base), scale=1.0)
    up = model.base_model.model.up
    before = up.base_layer.weight.clone()
    with torch.inference_mode(merged_in):
        model.merge_adapter(safe_merge=safe)
    assert not torch.equal(up.base_layer.weight, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()
    assert torch.equal(up.base_layer.weight, before)
