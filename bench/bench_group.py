"""Projections that read the same input: a decoder block's forward + backward, bf16, 2 x 512 tokens, r = 16.

Blocks of random weights with real widths. In Llama's and Qwen's, q/k/v and gate/up are groups; GPT-2's q/k/v
are one layer already, there is nothing to group, and grouping must not cost anything. Groups are learnt by
observation, so every rival takes two steps before it is checked and before each timed step. Each timed step
has to run the operators that its name says. Bytes are `bench.traffic`'s: counted from shapes, not measured.
"""

import copy
import functools
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial

import models
import pytest
import torch
from transformers import AutoModel, GPT2Config, LlamaConfig, Qwen2Config
from transformers.pytorch_utils import Conv1D

import mica.fast
from bench import traffic

ROUNDS, TOKENS, WARM_UP = 10, (2, 512), 2
# Relative differences of y, dx and dA from stock PEFT's, whose adapters compute in fp32.
GATES = {"y": 1e-2, "dx": 2e-2, "dA": 2e-2}
SMALL = {"vocab_size": 8, "bos_token_id": None, "eos_token_id": None}  # no tokens go in
CONFIGS = {
    "Llama-3.2-1B": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=1,
        **SMALL,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        num_hidden_layers=1,
        **SMALL,
    ),
    "GPT-2": GPT2Config(
        n_embd=768, n_head=12, n_layer=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SMALL
    ),
}


@contextmanager
def grouping(on):
    mica.fast.enable(group_projections=on)
    try:
        yield
    finally:
        mica.fast.enable()


CONTEXTS = {
    "bare frozen model": nullcontext,
    "stock PEFT": mica.fast.disabled,
    "stock PEFT, bf16 adapters": mica.fast.disabled,
    "mica.fast, ungrouped": partial(grouping, False),
    "mica.fast, grouped": partial(grouping, True),
}


def adapted(bare, **options):
    return models.randomise(
        models.wrap(copy.deepcopy(bare), rank=traffic.RANK, targets="all-linear", **options)
    )


@functools.lru_cache(maxsize=1)
def setting(name):
    """rival -> model, and (x, dy) of the block."""
    torch.manual_seed(0)
    bare = AutoModel.from_config(CONFIGS[name], dtype=torch.bfloat16).train().requires_grad_(False)
    layers = [module for module in bare.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    counted = sum(
        n * group.in_features for group in traffic.BLOCKS[name].values() for n in group.out_features
    )
    assert counted == sum(layer.weight.numel() for layer in layers), "bytes counted of another block"
    masters, bf16 = adapted(bare), adapted(bare, autocast_adapter_dtype=False)
    copies = (bare, masters, bf16, copy.deepcopy(masters), copy.deepcopy(masters))
    rivals = dict(zip(CONTEXTS, copies, strict=True))
    width = CONFIGS[name].hidden_size
    inputs = torch.randn(2, *TOKENS, width, dtype=torch.bfloat16).unbind()
    expected = results("stock PEFT", masters, inputs)
    for rival in ("mica.fast, ungrouped", "mica.fast, grouped"):
        for what, value in results(rival, rivals[rival], inputs).items():
            error = (value - expected[what]).norm() / expected[what].norm()
            assert error <= GATES[what], f"no timing of a wrong {what}: {name}, {rival}, {error:.3g}"
    return rivals, inputs


def step(model, inputs):
    """(y, dx); the gradients of A are left in the model."""
    x = inputs[0].detach().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = model(inputs_embeds=x).last_hidden_state
    y.backward(inputs[1])
    return y.detach(), x.grad


def results(rival, model, inputs):
    with CONTEXTS[rival]():
        for _ in range(WARM_UP):
            step(model, inputs)
        y, dx = step(model, inputs)
    dA = torch.cat([grad.flatten() for grad in models.gradients(model).values()])
    return {"y": y.float(), "dx": dx.float(), "dA": dA.float()}


def calls_of(name, rival):
    """Forward operators of one step, by what the rival's name says."""
    sizes = [len(group.out_features) for group in traffic.BLOCKS[name].values()]
    if not rival.startswith("mica.fast"):
        return {"linear": 0, "linear_group": 0}
    if rival == "mica.fast, ungrouped":
        return {"linear": sum(sizes), "linear_group": 0}
    return {"linear": sizes.count(1), "linear_group": len(sizes) - sizes.count(1)}


# the first named parameter is the innermost loop: rivals take turns within a round
@pytest.mark.parametrize("rival", CONTEXTS)
@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("name", CONFIGS)
def bench_group(once, name, round_, rival):
    rivals, inputs = setting(name)
    bytes_ = traffic.over_bare(rival, [*traffic.BLOCKS[name].values()])
    with CONTEXTS[rival]():
        for _ in range(WARM_UP):
            step(rivals[rival], inputs)
        before = Counter(mica.fast.call_counts)
        once(
            lambda: step(rivals[rival], inputs),
            f"forward + backward of a block, {name}, bfloat16",
            rival,
            **{"counted bytes ÷ bare": bytes_},
        )
    calls = {kind: mica.fast.call_counts[kind] - before[kind] for kind in ("linear", "linear_group")}
    assert calls == calls_of(name, rival), "no timing of another form"
