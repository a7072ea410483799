"""Quantised base layers: the basis, training, merging, and the way to the unquantised base and back."""

import gc
import weakref

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.hqq import HqqLoraLinear
from torch import nn

import mica.fast
from mica.fast.create import quantised, solving
from tests.support import quantised_models
from tests.support.models import adapted_layers, assert_same_bases, bases, factors, oriented, randomise, wrap
from tests.support.moe_models import second
from tests.support.quantised_models import KINDS, TARGETS, adapted, assert_spans, dequantised, llama, logits
from tests.support.stock import as_stock, assert_same, counted, step, uninstalled
from tests.support.tolerances import RELATIVE

MERGEABLE = [kind for kind in KINDS if "stub" not in kind]
pytestmark = [
    pytest.mark.usefixtures("one_thread", "gptqmodel"),
    pytest.mark.filterwarnings("ignore:.*may get different"),
]


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


@pytest.mark.parametrize("kind", ["nf4, fp32 storage, bf16 compute", "torchao int8"])
def test_adapters_in_16_bits_where_the_user_wants_them(kind):
    model = adapted(kind, autocast_adapter_dtype=False)
    plain = adapted(kind, autocast_adapter_dtype=False, init_lora_weights=True)
    dtypes = [[p.dtype for p in m.parameters() if p.requires_grad] for m in (model, plain)]
    assert set(dtypes[0]) == set(dtypes[1])


@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq", "gptq stub"])
def test_any_spelling_and_a_second_adapter(kind):
    model = adapted(kind, init_lora_weights="MICA")
    assert model.peft_config["default"].init_lora_weights == "mica"
    second(model, r=2, lora_dropout=0.1)
    for name in ("second", "default", ["default", "second"]):
        model.base_model.set_adapter(name)
        assert not any("lora_B" in n for n, p in model.named_parameters() if p.requires_grad)
    for layer in adapted_layers(model).values():
        for adapter in ("default", "second"):
            assert_spans(layer.lora_B[adapter].weight, dequantised(layer.get_base_layer()))


def test_next_to_layers_that_are_not_quantised():
    model = wrap(llama("nf4"), targets=[*TARGETS, "embed_tokens", "lm_head"], ensure_weight_tying=False)
    assert len(bases(model)) == 9
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert_spans(factors(layer)[1], oriented(layer).detach())


def test_an_8_bit_layer_that_was_called_before_still_works():
    """PEFT's `dequantize_module_weight` takes its scales away on the CPU."""
    model = llama("int8")
    expected = logits(model)
    model = wrap(model, targets=TARGETS)
    for _ in range(2):
        assert torch.equal(logits(model), expected)


def test_a_4_bit_layer_that_the_cpu_has_repacked():
    """After a call in eval mode bitsandbytes' own dequantisation is silently wrong on an AVX512-BF16 CPU."""
    bnb = pytest.importorskip("bitsandbytes")
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    model = quantised_models.quantise(nn.Sequential(nn.Linear(64, 32)), "nf4").eval()
    weight = dequantised(model[0])
    with torch.no_grad():
        model(torch.randn(1, 64))
    assert (dequantised(model[0]) - weight).abs().max() > 0.1 * weight.abs().max()  # the fault is real
    model = wrap(model, targets=["0"])
    layer = model.base_model.model[0]
    after = quantised.dequantise(layer, "it")
    assert (after - weight).abs().max() <= 2**-6 * weight.abs().max()  # bf16, as it computes from now on
    assert_spans(layer.lora_B["default"].weight, after)


@pytest.mark.parametrize("kind", [quantised_models.StubGPTQLinear, quantised_models.StubAWQLinear])
@pytest.mark.parametrize("repacked", [False, True])
def test_a_large_bias_and_a_dequantize_weight_that_lies(kind, repacked, monkeypatch):
    linear = nn.Linear(24, 20)
    linear.bias.data.fill_(1000.0)  # fp16 has no digit left for the weights added to it
    base = kind(linear)
    if repacked:  # as in a kernel that has rearranged what it inherits `dequantize_weight` for
        base.dequantize_weight = lambda: base._weight().flip(0)
    elif kind is quantised_models.StubGPTQLinear:
        monkeypatch.delattr(quantised, "_by_calls")  # not needed: it costs in_features rows
    bias = base.bias
    layer = wrap(nn.Sequential(base, nn.LayerNorm(20)), targets=["0"]).base_model.model[0]
    assert torch.equal(quantised.dequantise(layer, "it").double(), dequantised(base))
    assert base.bias is bias
    assert_spans(layer.lora_B["default"].weight, dequantised(base))


# -- forward and backward ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_runs_on_the_operators_and_follows_peft(monkeypatch, kind, backend):
    """Fault 3: stock itself refuses, with another error for each library."""
    with pytest.raises((TypeError, ValueError, AttributeError, NotImplementedError)):
        adapted(kind, stock=True)
    monkeypatch.setenv("MICA_BACKEND", backend)
    model = randomise(adapted(kind))
    rows = mica.fast.explain(model).rows
    assert {row.path for row in rows} == {{"reference": "reference", "triton": "kernel"}[backend]}
    assert all("base layer called: a base layer of type" in row.reason for row in rows)
    tolerance = 10 * RELATIVE[torch.bfloat16 if "bf16 compute" in kind else torch.float32]
    _, counts = counted(
        lambda: as_stock(lambda: step(model.train(), input_ids=quantised_models.TOKENS), tolerance)
    )
    for name in ("down_projection", "up_projection", "down_projection_backward", "up_projection_backward"):
        assert counts[name] == 7, name
        assert counts.get(f"{name}_kernels", 0) == (7 if backend == "triton" else 0)


@torch.no_grad()  # with a graph stock fails on int8: it writes into a view that bitsandbytes has made
@pytest.mark.parametrize("kind", ["int8", "hqq", "torchao int8"])  # eval mode: see `logits` for the other
def test_mixed_batch(kind):
    model = randomise(second(adapted(kind), r=2)).eval()
    options = {"input_ids": quantised_models.TOKENS, "adapter_names": ["default", "second"]}
    _, counts = counted(lambda: as_stock(lambda: model(**options).logits, 10 * RELATIVE[torch.float32]))
    assert counts["down_projection"] == 14


def test_uninstalled_peft_has_its_forward_back():
    model = randomise(adapted("hqq"))
    ours = HqqLoraLinear.forward
    with uninstalled():
        assert HqqLoraLinear.forward is not ours
        assert HqqLoraLinear.forward.__module__ == "peft.tuners.lora.hqq"
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
@pytest.mark.parametrize("kind", MERGEABLE)
def test_merging_is_that_of_plain_lora(kind, safe_merge):
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


def test_stock_would_round_the_update_before_it_is_merged():
    """Why merging is patched: over a bf16 base stock's MiCA is not merged as plain LoRA is."""
    model, plain = adapted_and_plain("nf4, fp32 storage, bf16 compute")
    with mica.fast.disabled():
        model.merge_adapter()
        plain.merge_adapter()
    theirs = base_weights(plain)
    assert any(not torch.equal(weight, theirs[name]) for name, weight in base_weights(model).items())
