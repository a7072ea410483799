"""DoRA's linear layers with ``lora=True`` are stock PEFT's; what is left to PEFT says why."""

import copy
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mica.fast
from mica.fast import known_peft
from mica.ops import recompute
from mica.paths.dropout import drawn_seed, dropout_keep
from tests.support.merging_models import other_magnitudes, quietly, weights
from tests.support.models import INDICES, adapted_layers, net, randomise, tiny_llama, wrap
from tests.support.moe_models import second
from tests.support.quantised_models import KINDS, TARGETS, quantise
from tests.support.stock import as_graph, assert_same, both, step, uninstalled
from tests.support.tolerances import RELATIVE, error
from tests.support.training import checkpointed, llama, train, trainable

DORA = {"use_dora": True, "init_lora_weights": False}
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _dora():
    mica.fast.enable(lora=True)


def adapted(dtype=FP32, **config):
    """Linear layers with a bias and without, and a Conv1D. A magnitude of each is 0."""
    model = net(dtype, targets=["up", "conv", "down"], **DORA, **config)
    return other_magnitudes(randomise(model, 0.3)).train()


def paths(model):
    return mica.fast.explain(model).counts()


@pytest.mark.parametrize(
    ("dtype", "config", "autocast"),
    [
        (FP32, {}, None),
        (FP32, {"use_rslora": True}, None),
        (FP32, {}, BF16),
        (BF16, {}, None),
        (torch.float64, {"autocast_adapter_dtype": False}, None),
    ],
)
def test_outputs_and_gradients_are_stocks(dtype, config, autocast):
    model = adapted(dtype, **config)
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        assert_same(*both(lambda: step(model, INDICES)), 3 * RELATIVE[autocast or dtype])
    assert paths(model) == {"reference": 3}


def test_adapters_in_16_bits_are_as_exact_as_stocks():
    """Stock rounds the norms to them."""
    model = adapted(BF16, autocast_adapter_dtype=False)
    ours, theirs = both(lambda: step(model, INDICES))
    with mica.fast.disabled():
        exact = step(copy.deepcopy(model).double(), INDICES)
    errors = [sum(error(grad, exact[1][name]) for name, grad in grads.items()) for _, grads in (ours, theirs)]
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_training_follows_stock(use_reentrant):
    """AdamW's fused steps, which change no version: nothing of a norm is kept from one step to the next."""

    def losses():
        model = randomise(llama(**DORA))
        if use_reentrant is not None:
            checkpointed(model, use_reentrant)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01, fused=True)
        return train(model, optimizer=optimizer)

    ours, theirs = both(losses)
    assert ours[0] - ours[-1] > 1e-2
    assert error(ours, theirs) <= 1e-5


class Masked(nn.Module):
    """PEFT's dropout with a mask of this package."""

    def forward(self, x):
        seed = drawn_seed(0.4, x.device)
        keep = dropout_keep(seed, x[..., 0].numel(), x.shape[-1], 0.4).view(x.shape)
        return x * keep / 0.6


def with_masks(model):
    stock = copy.deepcopy(model)
    for layer in adapted_layers(stock).values():
        layer.lora_dropout["default"] = Masked()
    return stock


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_dropout_is_pefts_formula(dtype):
    model = adapted(dtype, lora_dropout=0.4)
    stock = with_masks(model)
    torch.manual_seed(3)
    ours = step(model, INDICES)
    assert paths(model) == {"reference": 3}
    torch.manual_seed(3)
    with mica.fast.disabled():
        assert_same(ours, step(stock, INDICES), 3 * RELATIVE[dtype])
    torch.manual_seed(3)
    assert torch.equal(checkpoint(model, INDICES, use_reentrant=False), ours[0])
    model.eval()
    assert_same(*both(lambda: step(model, INDICES)), 3 * RELATIVE[dtype])
    for layer in adapted_layers(model).values():
        layer.lora_dropout.train()  # PEFT's code looks at the layer
    assert_same(*both(lambda: model(INDICES)), 3 * RELATIVE[dtype])


def test_a_fresh_adapter_changes_no_output():
    """PEFT's own test has this tolerance, which one unit in the last place of a small y is beyond."""
    torch.manual_seed(0)
    linear = nn.Linear(576, 4096)
    x = torch.randn(16, 576)
    expected = linear(x)
    model = wrap(nn.Sequential(linear), targets=["0"], use_dora=True, init_lora_weights=True)
    for is_training in (True, False):
        assert torch.allclose(model.train(is_training)(x), expected)
    assert paths(model) == {"reference": 1}


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [*((kind, 0.0) for kind in KINDS if kind != "hqq, bf16 compute"), ("nf4", 0.4)],  # there stock raises
)
def test_quantised_layers(kind, dropout):
    """A bias is not scaled."""
    has_bias = kind != "hqq"  # which is trained there
    model = tiny_llama(initializer_range=0.3, attention_bias=has_bias)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model = quantise(model, kind)
    model = randomise(wrap(model, targets=TARGETS, lora_dropout=dropout, **DORA)).train()
    stock = with_masks(model) if dropout else model
    torch.manual_seed(3)
    ours = step(model, INDICES)
    torch.manual_seed(3)
    with mica.fast.disabled():
        theirs = step(stock, INDICES)
    tolerance = RELATIVE[BF16] if "bf16" in kind else 1e-4
    assert_same(ours, theirs, tolerance)
    assert paths(model) == {"reference": 14}


@pytest.mark.whole
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("autocast", ["none", "around", "inside"])
@pytest.mark.parametrize("adapter", ["MiCA", "LoRA", "DoRA"])
def test_compiled(adapter, autocast, dropout):
    """As one graph, forward and backward; the mask is that of the eager call."""
    config = {"MiCA": {}, "LoRA": {"init_lora_weights": False}, "DoRA": DORA}[adapter]
    model = randomise(net(targets=["up"], lora_dropout=dropout, **config), 0.3).train()
    (layer,) = adapted_layers(model).values()
    cast = partial(torch.autocast, "cpu", BF16)

    def inside(x):
        with cast() if autocast == "inside" else nullcontext():
            return layer(x)

    def run(function):
        x = torch.linspace(-1, 1, 60).view(5, 12).requires_grad_()
        torch.manual_seed(3)
        with cast() if autocast == "around" else nullcontext():
            y = function(x)
        weights = [weight for weight in layer.parameters() if weight.requires_grad]
        return y, *torch.autograd.grad(y.float().square().sum(), [x, *weights])

    tolerance = 3 * RELATIVE[FP32 if autocast == "none" else BF16]
    for ours, expected in zip(run(as_graph(inside)), run(inside), strict=True):
        assert error(ours, expected) <= tolerance


def test_one_dimension_becomes_two_as_in_peft():
    layer = adapted_layers(adapted())["base_model.model.up"]
    ours, theirs = both(lambda: layer(torch.linspace(-1, 1, 12)))
    assert ours.shape == theirs.shape == (1, 20)
    assert error(ours, theirs) <= 3 * RELATIVE[FP32]


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("tokens", [5, 2000])
def test_a_row_of_zeros_is_not_scaled_whatever_the_size(tokens, native, monkeypatch):
    """Stock divides 0 by 0 there."""
    monkeypatch.setenv("MICA_NATIVE", native)
    monkeypatch.setattr(recompute, "MIN_NUMBERS", 12 * 1000)
    layer = adapted_layers(adapted())["base_model.model.up"]
    layer.base_layer.weight.data[3] = 0
    layer.lora_B["default"].weight.data[3] = 0
    ours, theirs = both(lambda: layer(torch.ones(tokens, 12)))
    assert torch.equal(ours[:, 3], layer.base_layer.bias[3].expand(tokens))
    assert theirs[:, 3].isnan().all()


# -- left to PEFT -------------------------------------------------------------------------------------


def _second(model):
    second(model, init_lora_weights=False)
    model.base_model.set_adapter(["default", "second"])


def _trained(model):
    model.base_model.model.up.base_layer.weight.requires_grad_()


def _hooked(model):
    model.base_model.model.up.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)


def _unknown(model):
    known_peft.left[known_peft.DORA] = ["it has another body"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_second, r"several active adapters, \['default', 'second'\], of which 'default' is DoRA"),
        (_trained, "DoRA, and the base weight is trainable"),
        (_hooked, "hooks on the lora_magnitude_vector"),
        (_unknown, "adapter 'default' is of PEFT's variant DoraLinearVariant"),
        (
            lambda model: mica.fast.enable(lora=False),
            r"is DoRA, which mica.fast.enable\(lora=True\) includes",
        ),
    ],
)
def test_left_to_peft_with_a_reason(change, reason, monkeypatch):
    monkeypatch.setattr(known_peft, "left", {})
    model = adapted()
    change(model)
    x = torch.randn(5, 12)
    assert_same(*both(lambda: model.base_model.model.up(x)), 0.0)
    (row,) = [row for row in mica.fast.explain(model).rows if row.name.endswith("up")]
    assert row.path == "peft"
    assert re.search(reason, row.reason)


# -- merging beside stock -----------------------------------------------------------------------------


def test_stock_unmerges_what_was_merged_here():
    model = adapted()
    expected = model.eval()(INDICES)
    for layer in adapted_layers(model).values():
        layer.lora_magnitude_vector["default"].weight.data[2] = 1  # stock divides by it
    before = weights(model)
    model.merge_adapter()
    with uninstalled():
        model.unmerge_adapter()
    for name, layer in adapted_layers(model).items():
        assert error(layer.base_layer.weight, before[name]) <= RELATIVE[FP32]
    assert expected.isfinite().all()


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("calls", [[["second", "default"]], [["second"], ["default"]]])
def test_dora_after_another_adapter_is_merged_as_stock_does(calls):
    model = second(adapted(), init_lora_weights=False)
    stock = copy.deepcopy(model)
    for names in calls:
        model.merge_adapter(names)
        with mica.fast.disabled():
            stock.merge_adapter(names)
    for ours, theirs in zip(adapted_layers(model).values(), adapted_layers(stock).values(), strict=True):
        assert error(ours.base_layer.weight, theirs.base_layer.weight) <= 3 * RELATIVE[FP32]
    assert [type(v).__name__ for v in ours.lora_variant.values()] == ["DoraLinearVariant"] * 2
    quietly(partial(mica.fast.merge_report, model))
