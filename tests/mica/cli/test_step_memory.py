"""A step that is counted without values allocates what PyTorch's allocator reports of a real one."""

import copy
import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

import mica.fast
from mica.cli.quantising import quantisation, quantise
from mica.cli.step_memory import (
    ATTENTION,
    ChunkedLoss,
    checkpoint_first,
    decoder_layers,
    dropout_of_devices,
    kept_bytes,
    loss_of,
    memory,
    record,
    shorten,
)
from mica.counting import Alive
from mica.paths import products, reference_path
from tests.support import models, no_products, quantised_models
from tests.support.processor import has_instructions
from tests.support.tables import rows

BF16 = torch.bfloat16
WIDTHS = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = LlamaConfig(**WIDTHS, num_hidden_layers=4, vocab_size=2048)
TOKENS = 128
META_IDS = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
MARK = 12_345_678  # bytes of an allocation between forward and backward

ADAPTERS = {
    "none": None,
    "MiCA": {"init_lora_weights": "mica"},
    "LoRA": {"init_lora_weights": True},
    "LoRA with dropout": {"init_lora_weights": True, "lora_dropout": 0.1},
}
BACKENDS = {
    "stock": None,
    "here": {"lora": True},
    "norms saved": {"lora": True, "recompute": "activations"},
}
CASES = """
none => here =>
MiCA => stock =>
MiCA => here =>
MiCA => norms saved => bits=4
MiCA => here => checkpointed=4
LoRA => stock => bits=4
LoRA with dropout => stock => checkpointed=1
LoRA => here => in_chunks=1
LoRA with dropout => here => bits=4 checkpointed=1
"""
# In a small model the peak of these is that of bitsandbytes' kernels for a CPU
LARGE_CASES = """
LoRA => stock => bits=4 in_chunks=1 checkpointed=10
LoRA with dropout => stock => bits=4 in_chunks=1 checkpointed=10
LoRA with dropout => here => bits=4 in_chunks=1 checkpointed=10
LoRA => here => bits=4 in_chunks=1 checkpointed=30
"""


def fp32_sums(g, x):
    return g.new_empty(g.shape[1], x.shape[1], dtype=torch.float32)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    has_instructions(True, monkeypatch)  # without them products are computed in float32
    if not products.query(BF16):  # nor would C++ multiply gᵀ x: it casts x, 1.5 MB of 37, which no GPU does
        monkeypatch.setenv("MICA_NATIVE", "0")
        monkeypatch.setattr(reference_path, "_by_native", fp32_sums)
    yield
    mica.fast.enable(lora=False, recompute="norms")


def outline(config, bits=None):
    with torch.device("meta"):
        options = {"dtype": BF16, "attn_implementation": ATTENTION}
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    if bits:
        args = SimpleNamespace(bits=bits, model="a model")
        quantise(model, quantisation(model, args))
    return model


def prepared(model, adapter=None, checkpointed=0):
    model.requires_grad_(False)
    model.enable_input_require_grads()
    if adapter is not None:
        model = models.wrap(model, rank=16, **{"targets": "all-linear", **adapter})
    checkpoint_first(model, checkpointed, preserve_rng_state=False)
    return model.train()


def measured(model, loss):
    """Bytes that are kept after the forward, and at most of the whole step."""
    loss().backward()
    model.zero_grad()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = loss()
        torch.zeros(MARK, dtype=torch.uint8)
        result.backward()
    model.zero_grad()
    now = peak = kept = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        size = event.nbytes()
        if abs(size) == MARK:
            kept = kept or now
            continue
        now += size
        peak = max(peak, now)
    return kept, peak


def as_it_ran(recorded):
    return memory(recorded, recorded, list(range(len(recorded.weights) - 1)), 0)


def check(case, config, real, tokens, tolerance):
    adapter, backend, options = case
    adapter, settings = ADAPTERS[adapter], BACKENDS[backend]
    options = dict(option.split("=") for option in options.split())
    bits, in_chunks, checkpointed = (int(options.get(n, 0)) for n in ("bits", "in_chunks", "checkpointed"))
    if bits:
        real = quantised_models.quantise(
            real, lambda linear: quantised_models.bnb_4bit(linear, double=True, compute_dtype=BF16)
        )
        real.is_loaded_in_4bit = True
    mica.fast.enable(**(settings or {}))
    real = prepared(real, adapter, checkpointed)
    counted = prepared(outline(config, bits), adapter, checkpointed)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with mica.fast.disabled() if settings is None else nullcontext():
        with dropout_of_devices(), no_products.installed():
            kept, peak = measured(real, loss_of(real, ids, in_chunks))
        found = as_it_ran(record(counted, loss_of(counted, ids.to("meta"), in_chunks)))
    assert found.kept == pytest.approx(kept, rel=5e-3)
    assert found.peak == pytest.approx(peak, rel=tolerance if bits else 5e-3)


@pytest.mark.parametrize("case", rows(CASES), ids=", ".join)
def test_counted_is_measured(case):
    real = AutoModelForCausalLM.from_config(copy.deepcopy(SMALL), dtype=BF16)
    check(case, SMALL, real, TOKENS, tolerance=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", rows(CASES + LARGE_CASES.lstrip()), ids=", ".join)
def test_counted_is_measured_on_smollm2(case):
    # Without AVX512 bitsandbytes expands scales to fp32, which no GPU does: 3.5 MB of 137 MB
    check(case, models.smollm2().config, models.smollm2(BF16), 512, tolerance=3e-2)


@pytest.mark.parametrize("checkpointed", [0, 4])
def test_a_step_has_each_layer_twice(checkpointed):
    """Once forwards and once backwards: one computed again is no part of its own. No hook stays."""
    model = prepared(outline(SMALL), ADAPTERS["LoRA"], checkpointed)
    recorded = record(model, loss_of(model, META_IDS, in_chunks=False))
    assert len(recorded.parts) == 2 * (1 + SMALL.num_hidden_layers + 1)
    for layer in decoder_layers(model).values():
        assert not layer._forward_pre_hooks
        assert not layer._forward_hooks
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    assert sum(recorded.trained) == sum(weight.nbytes for weight in trained)
    assert sum(recorded.weights) == sum(tensor.nbytes for tensor in [*weights, *model.buffers()])
    assert all(weight.grad is None for weight in weights)


def test_dropout_keeps_a_mask_of_bytes():
    """On every device; a CPU's own keeps a mask of the dtype of x."""
    x = torch.ones(8, 64, dtype=BF16, requires_grad=True)
    output, mask = 2 * x.numel(), x.numel()
    assert kept_bytes(nn.Dropout(0.1), lambda: F.dropout(x, 0.1)) == output + mask


@pytest.mark.parametrize(
    ("bits", "inner"),
    [(4, 2 * 256 * 512), (8, 4 * TOKENS * 512)],  # the weight in 16 bits; the product in 32
)
def test_what_a_quantised_product_allocates_within(bits, inner):
    model = outline(SMALL, bits)
    x = torch.zeros(TOKENS, 256, dtype=BF16, device=model.device)
    output = 2 * TOKENS * 512
    with torch.no_grad(), Alive() as alive:
        y = model.model.layers[0].mlp.up_proj(x)
    assert y.nbytes == output
    assert alive.peak >= inner + output


WHOLE = {  # configuration, and which of its layers have other adapters
    "Llama": (SMALL, "all-linear"),
    "one layer unlike the others": (
        LlamaConfig(**WIDTHS, num_hidden_layers=6, vocab_size=2048),
        ["1.mlp.down_proj", "q_proj"],
    ),
    "Gemma 3": (Gemma3TextConfig(**WIDTHS, head_dim=64, num_hidden_layers=7, vocab_size=2048), "all-linear"),
    "GPT-2": (GPT2Config(n_embd=256, n_head=4, n_layer=4, vocab_size=2048), "all-linear"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_step_of_all_layers_follows_from_one_of_each_kind(case):
    config, targets = WHOLE[case]
    mica.fast.enable(lora=True)

    def recorded(model, number):
        checkpoint_first(model, number)
        return record(model, loss_of(model, META_IDS, in_chunks=False))

    whole = prepared(outline(config), ADAPTERS["LoRA with dropout"] | {"targets": targets})
    short = copy.deepcopy(whole)
    modules = short.get_base_model().named_modules()
    adapted = {name: module for name, module in modules if hasattr(module, "lora_A")}
    kinds = shorten(short, adapted.values())
    base = outline(config)  # `fits` shortens it before it has adapters
    assert shorten(base, map(base.get_submodule, adapted)) == kinds
    assert len(decoder_layers(short)) == 1 + max(kinds) < len(kinds)
    plain, checkpointed = (recorded(short, number) for number in (0, len(kinds)))
    for number in (0, 1, len(kinds) - 1, len(kinds)):
        of_all = recorded(whole, number)
        found, expected = memory(plain, checkpointed, kinds, number), as_it_ran(of_all)
        hidden_state = 2 * TOKENS * config.hidden_size  # bytes in 16 bits
        most = 0 if number in (0, len(kinds)) else 2 * hidden_state
        assert all(0 <= more - bytes <= most for bytes, more in zip(found, expected, strict=True))
        for sizes, theirs in ((plain.weights, of_all.weights), (plain.trained, of_all.trained)):
            assert [sizes[kind] for kind in (*kinds, -1)] == theirs


def test_the_first_layers_are_the_right_ones_to_checkpoint():
    model = prepared(outline(SMALL), ADAPTERS["LoRA"])
    peaks = []
    for chosen in ((0, 1), (0, 2), (2, 3)):
        for index, layer in enumerate(decoder_layers(model).values()):
            layer.gradient_checkpointing = index in chosen
        peaks.append(as_it_ran(record(model, loss_of(model, META_IDS, in_chunks=True))).peak)
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


@pytest.mark.parametrize(
    ("bits", "replaced"),
    [(4, lambda linear: quantised_models.bnb_4bit(linear, double=True)), (8, quantised_models.bnb_8bit)],
)
def test_quantised_weights_have_the_bytes_of_real_ones(bits, replaced):
    real = quantised_models.quantise(
        AutoModelForCausalLM.from_config(copy.deepcopy(SMALL), dtype=BF16), replaced
    )
    counted = outline(SMALL, bits)
    ids = torch.zeros(1, 8, dtype=torch.long)
    recorded = [
        record(model.train(), loss_of(model, ids.to(model.device), in_chunks=False))
        for model in map(prepared, (counted, real))
    ]
    ours, theirs = (sum(step.weights) for step in recorded)
    assert ours == theirs
    described = ("weight_format", "quant_state.bitsandbytes__nf4")  # not the layer's own tensors
    stored = {name: tensor.nbytes for name, tensor in real.state_dict().items()}
    scales_and_weights = sum(size for name, size in stored.items() if not name.endswith(described))
    offsets = 4 * sum(name.endswith(described[1]) for name in stored)  # of double quantisation: within these
    assert theirs == scales_and_weights + offsets + sum(buffer.nbytes for buffer in real.buffers())


def test_the_chunked_loss_allocates_as_much_as_libraries_do():
    """Vocabulary and width are such that all cut the tokens into eight."""
    h = nn.Parameter(torch.randn(64, 32, dtype=BF16))
    weight, labels = torch.randn(256, 32, dtype=BF16), torch.randint(256, (64,))

    def allocated(loss):
        return measured(nn.ParameterList([h]), lambda: loss(h * 2))

    kept, peak = allocated(lambda h: ChunkedLoss.apply(h, weight))
    liger = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    function = liger.LigerFusedLinearCrossEntropyFunction
    _, peak_of_liger = allocated(
        lambda h: function.apply(h, weight, labels)[0]
    )  # the interpreter keeps logits
    assert peak == pytest.approx(peak_of_liger, rel=0.01)
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("PyTorch has no linear_cross_entropy")
    options = nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio", acc_policy="compact")  # a GPU's
    kept_by_torch, peak_of_torch = allocated(
        lambda h: F.linear_cross_entropy(h, weight, labels, options=options)
    )
    assert kept == pytest.approx(kept_by_torch, rel=0.01)
    assert peak_of_torch <= peak
