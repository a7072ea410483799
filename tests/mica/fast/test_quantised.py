"""Quantised base layers: the basis, training, merging, and the way to the unquantised base and back."""

import copy
import gc
import itertools
import math
import re
import weakref

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import hqq
from torch import nn

import mica.fast
from mica.fast.create import quantised, solving
from tests.support import quantised_models
from tests.support.models import (
    ADAPTERS,
    INDICES,
    adapted_layers,
    assert_same_bases,
    factors,
    randomise,
    wrap,
)
from tests.support.moe_models import second
from tests.support.quantised_models import KINDS, TARGETS, adapted, assert_spans, dequantised, llama, logits
from tests.support.stock import as_stock, assert_same, counted, step, uninstalled
from tests.support.tolerances import RELATIVE, error

pytestmark = pytest.mark.filterwarnings("ignore:.*may get different")
of_each_kind = pytest.mark.parametrize("kind", KINDS)


# -- initialisation --------------------------------------------------------------------------------


def test_rank_one_does_not_start_from_packed_bytes():
    """Fault 3: packed into floats, a 4-bit weight looks to stock like a column, and r = 1 fits."""

    def model():
        torch.manual_seed(0)
        return quantised_models.quantise(nn.Sequential(nn.Linear(16, 8)), "nf4, fp32 storage, bf16 compute")

    stock = wrap(model(), rank=1, targets=["0"], stock=True).base_model.model[0]
    assert stock.lora_B["default"].weight.shape == (16, 1)  # the fault is real: 64 bytes in 16 floats
    layer = wrap(model(), rank=1, targets=["0"]).base_model.model[0]
    assert layer.lora_B["default"].weight.shape == (8, 1)
    assert_spans(layer.lora_B["default"].weight, dequantised(layer.get_base_layer()))


def test_an_8_bit_layer_that_was_called_before_still_works():
    """PEFT's `dequantize_module_weight` takes its scales away on the CPU."""
    model = llama("int8")
    expected = logits(model)
    model = wrap(model, targets=TARGETS)
    for _ in range(2):
        assert torch.equal(logits(model), expected)


# -- 4-bit weights that bitsandbytes has repacked for its CPU kernel --------------------------------

REPACKED = ["nf4", "fp4", "nf4 double, bf16 storage"]  # 128 in_features: two blocks of scales per row
of_each_repacked = pytest.mark.parametrize("kind", REPACKED)


def four_bits(kind="nf4", in_features=128, layers=1):
    torch.manual_seed(0)
    sizes = [in_features] * layers + [64]
    linears = [nn.Linear(*two) for two in itertools.pairwise(sizes)]
    return quantised_models.quantise(nn.Sequential(*linears), kind).train()


def repack(model):
    """What one call in eval mode does on a CPU with AVX512-BF16: plain PyTorch, so on any processor."""
    import bitsandbytes as bnb

    convert = vars(bnb.functional).get("_convert_weight_packed_for_cpu")
    if convert is None:
        pytest.skip("this bitsandbytes repacks nothing")
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.data, module.weight.quant_state = convert(
                module.weight.data, module.weight.quant_state
            )


def base_of(model):
    """That of its first layer."""
    return model.base_model.model[0].get_base_layer()


def round_scales(model):
    """As `repack` leaves the scales: in bf16, and no longer quantised themselves."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            if state.nested:
                state.absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
                state.nested, state.state2, state.offset = False, None, None
            state.absmax = state.absmax.bfloat16().float()


def assert_close(actual, expected):
    """Repacking has rounded the scales to bf16."""
    assert (actual.double() - expected.double()).abs().max() <= 2**-7 * expected.abs().max()


@of_each_repacked
def test_a_basis_from_a_weight_that_was_repacked(kind):
    model = four_bits(kind)
    weight = dequantised(model[0])
    repack(model)
    assert (dequantised(model[0]) - weight).abs().max() > 0.1 * weight.abs().max()  # the fault is real
    layer = wrap(model, targets=["0"]).base_model.model[0]
    after = quantised.dequantise(layer, "it")
    assert_close(after, weight)
    assert_spans(layer.lora_B["default"].weight, after)


@of_each_repacked
@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merge_into_a_weight_that_was_repacked(kind, safe_merge):
    """PEFT dequantises it as if it had not been; stock's merge destroys the base.

    Ours is that into a layer that was not repacked, but whose scales are rounded as repacking does. With its
    own scales it is 0.005 to 0.05 away.
    """
    models = [
        randomise(wrap(four_bits(kind), targets=["0"], inference_mode=True), scale=0.3) for _ in range(3)
    ]
    plain, ours, stock = models
    repack(ours)
    repack(stock)
    round_scales(plain)
    for model in (plain, ours):
        model.merge_adapter(safe_merge=safe_merge)
    with mica.fast.disabled():
        stock.merge_adapter(safe_merge=safe_merge)
    weights = [dequantised(base_of(model)) for model in models]
    assert error(weights[2], weights[0]) > 0.3  # the fault is real
    assert error(weights[1], weights[0]) < 1e-6
    repack(ours)
    round_scales(plain)
    for model in (plain, ours):
        model.unmerge_adapter()
    weights = [dequantised(base_of(model)) for model in models]
    assert error(weights[1], weights[0]) < 1e-6
    repack(ours)
    round_scales(plain)
    unloaded = [model.merge_and_unload(safe_merge=safe_merge)[0] for model in (plain, ours)]
    assert error(dequantised(unloaded[1]), dequantised(unloaded[0])) < 1e-6


@pytest.mark.parametrize(("kind", "rounding"), [*((kind, 0.16) for kind in REPACKED), ("int8", 0.02)])
def test_evaluations_copies_and_switches_around_a_merge(kind, rounding):
    """In an evaluation bitsandbytes may repack a weight, and without the adapter PEFT unmerges it.

    A merge and an unmerge round it to its few bits, relative to its own size; nothing else changes it.
    """
    model = randomise(second(wrap(four_bits(kind), targets=["0"]), r=2), scale=0.05)
    layer, x = model.base_model.model[0], torch.randn(3, 128)

    def weight():
        return quantised.dequantise(layer, "it").double()

    def evaluate(model):
        with torch.no_grad():
            model.eval()(x)
        if not quantised.is_packed_for_cpu(base_of(model).weight):
            repack(model)

    before = weight()
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        evaluate(model)
        assert error(weight(), before) <= 0.01
        update = layer.get_delta_weight(adapter).double()
        model.merge_adapter()
        model = copy.deepcopy(model)
        layer = model.base_model.model[0]
        evaluate(model)
        assert error(weight(), before + update) <= rounding
        with model.disable_adapter():
            evaluate(model)
        assert not layer.merged
        assert error(weight(), before) <= 2 * rounding
        before = weight()


@pytest.mark.parametrize("before", [False, True])
@of_each_repacked
def test_what_is_trained_is_not_repacked(kind, before):
    """In stock no gradient passes a repacked layer, and saving it makes of it another one."""
    model = four_bits(kind, layers=2)
    for layer in model:
        layer.support_avx512bf16_for_cpu = True
    if before:
        repack(model)
    model = randomise(wrap(model, targets=["0"]))  # the gradient of its A passes the second layer
    x = torch.randn(3, 128)

    def gradient():
        model.zero_grad()
        model.train()(x).square().sum().backward()
        return model.base_model.model[0].lora_A["default"].weight.grad.clone()

    expected, output = gradient(), model(x)
    assert expected.abs().max() > 0
    for _ in range(2):
        with torch.no_grad():
            assert_close(model.eval()(x), output)
        assert not any(quantised.is_packed_for_cpu(getattr(m, "weight", None)) for m in model.modules())
        model.state_dict()
        assert torch.equal(gradient(), expected)
        assert torch.equal(model(x), output)


def test_an_adapter_for_inference_leaves_the_kernel_for_single_tokens():
    model = four_bits()
    model[0].support_avx512bf16_for_cpu = True
    model = wrap(model, targets=["0"], inference_mode=True)
    assert model.base_model.model[0].base_layer.support_avx512bf16_for_cpu


# -- forward and backward ---------------------------------------------------------------------------


@of_each_kind
def test_stock_refuses_mica(kind):
    """Fault 3: with another error for each library."""
    with pytest.raises((TypeError, ValueError, AttributeError, NotImplementedError)):
        adapted(kind, stock=True)


@pytest.mark.parametrize(
    ("kind", "adapter", "backend"),
    [
        *((kind, ("MiCA", "LoRA")[number % 2], "reference") for number, kind in enumerate(KINDS)),
        ("nf4", "MiCA", "triton"),
    ],
    indirect=["adapter"],
)
def test_training_runs_on_the_operators_and_follows_peft(monkeypatch, kind, adapter, backend):
    monkeypatch.setenv("MICA_BACKEND", backend)
    model = randomise(adapted(kind, **ADAPTERS[adapter]))
    rows = mica.fast.explain(model).rows
    assert {row.path for row in rows} == {{"reference": "reference", "triton": "kernel"}[backend]}
    assert all("base layer called: a base layer of type" in row.reason for row in rows)
    tolerance = 10 * RELATIVE[torch.bfloat16 if "bf16 compute" in kind else torch.float32]
    _, counts = counted(lambda: as_stock(lambda: step(model.train(), input_ids=INDICES), tolerance))
    assert counts["linear_added"] == 7
    for name in ("linear", "linear_backward"):
        assert counts[name] == 7, name
        assert counts.get(f"{name}_kernels", 0) == (7 if backend == "triton" else 0)


def test_uninstalled_peft_has_its_forward_back():
    model = randomise(adapted("hqq"))
    ours = hqq.HqqLoraLinear.forward
    with uninstalled():
        assert hqq.HqqLoraLinear.forward is not ours
        assert hqq.HqqLoraLinear.forward.__module__ == "peft.tuners.lora.hqq"
        logits(model)
    assert mica.fast.explain(model).counts() == {"peft": 7}  # until the next adapter over this kind of base
    assert mica.fast.explain(second(model)).counts() == {"reference": 7}


def test_few_dequantised_weights_are_there_at_a_time(monkeypatch):
    expected = adapted("hqq")
    alive, most = {}, []
    dequantise = quantised.dequantise

    def tracking(layer, name):
        weight = dequantise(layer, name)
        key = object()
        alive[key] = weight.numel()
        weakref.finalize(weight, alive.pop, key)
        most.append(sum(alive.values()))
        return weight

    monkeypatch.setattr(quantised, "dequantise", tracking)
    monkeypatch.setattr(solving, "_DEQUANTISED_ELEMENTS", 3000)
    model = adapted("hqq")
    gc.collect()
    assert max(most) <= 3000
    assert not alive
    assert_same_bases(model, expected)  # in one chunk or in several
    # a layer that is larger than the bound is still solved, alone
    monkeypatch.setattr(solving, "_DEQUANTISED_ELEMENTS", 10)
    most.clear()
    adapted("hqq")
    assert max(most) == 32 * 48


# -- saving and loading ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq", "torchao int8"])
def test_to_the_unquantised_base_and_back(kind, tmp_path):
    model = randomise(adapted(kind), scale=0.5)
    model.save_pretrained(tmp_path / "quantised")
    plain = llama()
    modules = dict(plain.named_modules())
    for name, layer in adapted_layers(model).items():  # unquantised: what the quantised layers compute with
        weight = modules[name.removeprefix("base_model.model.")].weight
        weight.data.copy_(dequantised(layer.get_base_layer()))
    bare = logits(plain).detach()
    plain = PeftModel.from_pretrained(plain, tmp_path / "quantised", is_trainable=True)
    assert mica.fast.explain(plain).counts() == {"reference": 7}
    assert (logits(plain) - bare).abs().max() > 0.1
    assert (logits(plain) - logits(model)).abs().max() <= 1e-3

    plain.save_pretrained(tmp_path / "plain")
    back = PeftModel.from_pretrained(llama(kind), tmp_path / "plain")
    assert torch.equal(logits(back), logits(model))


# -- merging ---------------------------------------------------------------------------------------


def adapted_and_plain(kind):
    """The adapted model, and plain LoRA on the same base with the same A and B."""
    model, plain = randomise(adapted(kind), scale=0.3), adapted(kind, init_lora_weights=True)
    with torch.no_grad():
        for name, layer in adapted_layers(plain).items():
            for theirs, ours in zip(factors(layer), factors(adapted_layers(model)[name]), strict=True):
                theirs.copy_(ours)
    return model, plain


def base_weights(model):
    return {name: dequantised(layer.get_base_layer()) for name, layer in adapted_layers(model).items()}


@pytest.mark.parametrize("safe_merge", [False, True])
@of_each_kind
def test_merging_is_that_of_plain_lora(kind, safe_merge, monkeypatch):
    if kind.startswith("hqq"):  # as transformers 5.20 does, which makes a tensor at each look
        from hqq.core.quantize import HQQLinear

        weight = property(lambda layer: torch.empty(0))
        monkeypatch.setattr(HQQLinear, "weight", weight, raising=False)
    model, plain = adapted_and_plain(kind)
    original = base_weights(model)
    for call in ("merge_adapter", "unmerge_adapter"):
        arguments = {"safe_merge": safe_merge} if call == "merge_adapter" else {}
        getattr(model, call)(**arguments)
        with mica.fast.disabled():
            getattr(plain, call)(**arguments)
        ours, theirs = base_weights(model), base_weights(plain)
        assert_same(ours, theirs, 0.0)
        if call == "merge_adapter":
            assert any((ours[name] - original[name]).abs().max() > 0.1 for name in ours)
            assert torch.equal(logits(model), logits(plain))
    unloaded = [merged.merge_and_unload(safe_merge=safe_merge) for merged in (model, plain)]
    assert torch.equal(*map(logits, unloaded))


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@of_each_kind
def test_a_merge_into_quantised_weights_is_reported_as_not_measured(kind):
    model = randomise(adapted(kind), scale=0.3)
    assert str(mica.fast.merge_report(model)) == "nothing was merged by mica.fast"
    model.merge_adapter()
    unloaded = copy.deepcopy(model).merge_and_unload()
    for merged in (model, unloaded):
        report = mica.fast.merge_report(merged)
        assert not report.layers
        assert len(report.unmeasured) == 7
        assert math.isnan(report.swallowed)
        assert re.match(
            r"7 layers merged into quantised weights \(.*\): not measured, and not exact", str(report)
        )
    for row in mica.fast.explain(model).rows:
        assert re.fullmatch(r"the adapter is merged .* \(.*\), whose rounding was not measured", row.reason)
    model.unmerge_adapter()
    assert not mica.fast.merge_report(model).unmeasured
    assert mica.fast.explain(model).counts() == {"reference": 7}
    again = wrap(unloaded, targets=TARGETS)  # the report is of the adapters that the model has now
    assert not mica.fast.merge_report(again).unmeasured


def test_next_to_a_dense_layer_both_are_reported():
    model = randomise(wrap(llama("nf4"), targets=["q_proj", "lm_head"]), scale=0.3)
    model.merge_adapter()
    for merged in (model, model.merge_and_unload()):
        report = mica.fast.merge_report(merged)
        assert [len(report.layers), len(report.unmeasured)] == [1, 1]
        assert 0 <= report.swallowed < 1e-4
        assert "1 layers merged into float32: rounding swallowed" in str(report)
        assert "; 1 layers merged into quantised weights (bitsandbytes 4-bit): not measured" in str(report)


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("nf4", 0.01, 1.08),
        ("nf4", 0.1, 0.79),
        ("nf4", 0.3, 0.32),
        ("int8", 0.01, 0.70),
        ("int8", 0.03, 0.25),
        ("int8", 0.1, 0.08),
    ],
)
def test_what_a_merge_into_quantised_weights_loses(kind, size, expected):
    """The table in mica/fast/README.md."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 256, bias=False)
    linear.weight.data.normal_(std=0.03)
    model = wrap(quantised_models.quantise(nn.Sequential(linear), kind), rank=16, targets=["0"])
    layer = randomise(model).base_model.model[0]
    before = dequantised(layer.get_base_layer())
    with torch.no_grad():
        lora_A = factors(layer)[0]
        lora_A.mul_(size * before.norm() / layer.get_delta_weight("default").norm())
    update = layer.get_delta_weight("default").detach()
    model.merge_adapter()
    moved = dequantised(layer.get_base_layer()) - before
    assert error(moved, update) == pytest.approx(expected, rel=0.1)


def test_stock_would_round_the_update_before_it_is_merged():
    """Why merging is patched: over a bf16 base stock's MiCA is not merged as plain LoRA is."""
    model, plain = adapted_and_plain("nf4, fp32 storage, bf16 compute")
    with mica.fast.disabled():
        model.merge_adapter()
        plain.merge_adapter()
    theirs = base_weights(plain)
    assert any(not torch.equal(weight, theirs[name]) for name, weight in base_weights(model).items())
