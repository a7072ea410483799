"""Merging within autocast and inference mode, and what is known of a merge: what rounding swallowed, and
whether the weight is still the merged one."""

import copy
import itertools

import pytest
import torch

import mica.fast
from mica.fast.merge import merging
from tests.support.merging_models import assert_same_bits, exact_merge, quietly, trained, weights
from tests.support.models import Net, adapted_layers, net, randomise, stored, wrap
from tests.support.tolerances import RELATIVE, error

BF16 = torch.bfloat16
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", ["embed", "up", "down"]),
        (
            "qwen3_moe",
            [
                f"model.layers.{layer}.mlp.{name}"
                for layer in (0, 1)
                for name in ("experts.down_proj", "experts.gate_up_proj", "gate")
            ],
        ),
    ],
)
def test_report_says_what_rounding_swallowed(kind, names):
    """A row for every parameter, also of nested wrappers."""
    model = trained(kind, BF16, scale=0.02)
    before = weights(model)
    assert str(mica.fast.merge_report(model)).startswith("no MiCA adapter was merged")
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
    assert 0.005 < report.swallowed < 1
    assert f"{len(names)} layers merged into bfloat16: rounding swallowed" in str(report)
    assert set(report.layers) == {f"base_model.model.{name}" for name in names}
    report = mica.fast.merge_report(model.merge_and_unload())
    assert report.swallowed == pytest.approx(expected, rel=1e-4)
    assert set(report.layers) == set(names)


def test_report_of_fp32_is_near_zero_and_goes_with_the_unmerge():
    model = trained()
    model.merge_adapter()
    assert mica.fast.merge_report(model).swallowed < 1e-4
    model.unmerge_adapter()
    assert not mica.fast.merge_report(model).layers


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
    restored = layer.base_layer.weight.detach()
    assert error(restored, 2 * merged.double() - exact_merge(layer, merged)) <= RELATIVE[torch.bfloat16]
    assert not torch.equal(restored, before)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("merging_in", "unmerging_in"), [(False, True), (True, False), (True, True)])
def test_autocast_rounds_no_update(dtype, merging_in, unmerging_in):
    """An evaluation within autocast unmerges in `disable_adapter`; stock's update is in 16 bits then."""

    def round_trip(model):
        up, before = model.base_model.model.up, weights(model)
        exact = exact_merge(up, before["base_model.model.up"])
        with torch.autocast("cpu", BF16, enabled=merging_in):
            model.merge_adapter()
        merged = error(up.base_layer.weight, exact)
        with torch.autocast("cpu", BF16, enabled=unmerging_in), model.disable_adapter():
            model(torch.tensor([[1, 2, 3, 28]]))
        after = weights(model)
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
    quietly(model.unmerge_adapter)
    assert torch.equal(up.base_layer.weight, before)


def test_experts_within_autocast_and_inference_mode():
    model = trained("qwen3_moe", BF16)
    before = weights(model)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(model, before)
