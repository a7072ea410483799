"""A step that is counted without values allocates what PyTorch's allocator reports of a real one."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

import mica.fast
from mica.cli.step_memory import ATTENTION, count
from tests.support import models

BF16 = torch.bfloat16
# x has 2^17 numbers, as many as it takes to be computed again
SMALL = LlamaConfig(
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=8192,  # the peak is that of the logits, not of the temporaries of a layer
)
TOKENS = 256
CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": False}  # its 5 kB are a CPU's, of no device
MARK = 12_345_678  # bytes of an allocation between forward and backward

MICA = {"init_lora_weights": "mica"}
LORA = {"init_lora_weights": True}
CASES = {  # what it is: (adapter, settings of the backend, checkpointing)
    "bare": (None, {}, False),
    "stock MiCA": (MICA, None, False),
    "MiCA": (MICA, {}, False),
    "MiCA, norms saved": (MICA, {"recompute": "activations"}, False),
    "MiCA, dropout": ({**MICA, "lora_dropout": 0.1}, {}, False),
    "MiCA, checkpointing": (MICA, {}, True),
    "stock LoRA": (LORA, None, False),
    "LoRA": (LORA, {"lora": True}, False),
}


@pytest.fixture(autouse=True)
def settings():
    yield
    mica.fast.enable(lora=False, recompute="norms")


def prepared(model, adapter, checkpointing):
    model.requires_grad_(False)
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
    if adapter is not None:
        model = models.wrap(model, rank=16, targets="all-linear", **adapter)
    return model.train()


def loss_of(model, ids):
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


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


def check(case, config, real, tokens):
    adapter, settings, checkpointing = CASES[case]
    mica.fast.enable(**(settings or {}))
    real = prepared(real, adapter, checkpointing)
    with torch.device("meta"):
        options = {"dtype": BF16, "attn_implementation": ATTENTION}
        outline = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    outline = prepared(outline, adapter, checkpointing)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with mica.fast.disabled() if settings is None else nullcontext():
        expected = measured(real, loss_of(real, ids))
        memory = count(outline, loss_of(outline, ids.to("meta")))
    assert memory[1:] == pytest.approx(expected, rel=1e-3)
    assert memory.weights == pytest.approx(sum(p.nbytes for p in real.parameters()), rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_counted_is_measured(case):
    check(case, SMALL, AutoModelForCausalLM.from_config(copy.deepcopy(SMALL), dtype=BF16), TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_counted_is_measured_on_smollm2(case):
    check(case, models.smollm2().config, models.smollm2(BF16), 512)
