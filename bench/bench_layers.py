"""How cost grows with depth: forward + backward of Llama blocks of SmolLM2's width, random weights, bf16."""

import functools
import time
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModel, LlamaConfig

import mica.fast
from bench.decoder import results, step
from bench.harness import DEVICE, iterations, pick
from bench.results import BARE, FAST, STOCK
from tests.support import models

ROUNDS = pick(quick=4, default=6)
LAYERS = pick(quick=[1, 2, 4], default=[1, 2, 4, 8])
TOKENS, RANK, WIDTH = 256, 16, 576
CONTEXTS = {BARE: nullcontext, STOCK: mica.fast.disabled, FAST: nullcontext}
GATE = 2e-2  # relative difference of y, dx and dA from stock PEFT's


@functools.lru_cache(maxsize=1)
def setting(layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=layers,
        vocab_size=8,
        bos_token_id=None,
        eos_token_id=None,
    )
    bare = AutoModel.from_config(config, dtype=torch.bfloat16).train().requires_grad_(False)
    adapted = models.wrap(AutoModel.from_config(config, dtype=torch.bfloat16), RANK, "all-linear")
    rivals = {BARE: bare.to(DEVICE), STOCK: adapted.to(DEVICE), FAST: adapted}
    models.randomise(adapted, 0.01)
    inputs = torch.randn(2, 1, TOKENS, WIDTH, device=DEVICE, dtype=torch.bfloat16).unbind()
    found = {}
    for name in (STOCK, FAST):
        with CONTEXTS[name]():
            found[name] = results(adapted, inputs)
    for what, value in found[FAST].items():
        error = (value - found[STOCK][what]).norm() / found[STOCK][what].norm()
        assert error <= GATE, f"{FAST}: {what} is {error:.1e} off stock PEFT's"
    step(bare, inputs)
    start = time.perf_counter()
    step(bare, inputs)
    return rivals, inputs, iterations(time.perf_counter() - start)


# the first named parameter is the innermost loop: rivals take turns within a round
@pytest.mark.parametrize("rival", CONTEXTS)
@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("layers", LAYERS)
def bench_layers(once, gated, layers, round_, rival):
    group = f"{layers} blocks of width {WIDTH}, {TOKENS} tokens, r = {RANK}, bfloat16, forward + backward"
    rivals, inputs, count = gated(group, lambda: setting(layers))
    axes = {"suite": "layers", "layers": layers, "width": WIDTH, "tokens": TOKENS, "rank": RANK}
    with CONTEXTS[rival]():
        call = functools.partial(step, rivals[rival], inputs)
        once(call, group, rival, {**axes, "dtype": "bfloat16"}, count, warm_up=True)
