"""A decoder block (attention and MLP) of random weights with real widths: forward + backward, bf16, r = 16.

In Llama's and Qwen's, q/k/v and gate/up read the same input and can be groups; GPT-2's q/k/v are one layer
already, there is nothing to group, and grouping must not cost anything. Groups are learnt by observation, so
every rival takes two steps before it is checked. Each timed step has to run the operators that its name says.
Bytes are `bench.traffic`'s: counted from shapes, not measured.
"""

import copy
import functools
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModel, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.pytorch_utils import Conv1D

import mica.fast
from bench import traffic
from bench.measure.memory import saved_bytes
from bench.results.names import BARE, GROUPED, STOCK, STOCK_16, UNGROUPED
from bench.suites.decoder import forward, results, step
from bench.suites.harness import DEVICE, iterations, pick
from tests.support import models

ROUNDS, RANK, WARM_UP = pick(quick=5, default=6), 16, 2
# Relative differences of y, dx and dA from stock PEFT's, whose adapters compute in fp32.
GATES = {"y": 1e-2, "dx": 2e-2, "dA": 2e-2}
SMALL = {
    "vocab_size": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_hidden_layers": 1,
}  # no tokens go in


class Block(NamedTuple):
    """``tokens``: (batch, sequence); ``groups``: how many layers read one x, in the order of their calls."""

    config: PretrainedConfig
    tokens: tuple[int, int]
    groups: tuple[int, ...] = (3, 1, 2, 1)


def block(kind, tokens, hidden, intermediate, heads, kv_heads):
    return Block(
        kind(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            **SMALL,
        ),
        tokens,
    )


def gpt2(tokens):
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return Block(GPT2Config(n_embd=768, n_head=12, **no_dropout, **SMALL), tokens, (1, 1, 1, 1))


BLOCKS = {
    "Llama-3.2-1B": block(LlamaConfig, (2, 512), 2048, 8192, 32, 8),
    "Qwen2.5-0.5B": block(Qwen2Config, (2, 512), 896, 4864, 14, 2),
    "GPT-2": gpt2((2, 512)),
    "Llama-3.1-8B": block(LlamaConfig, (1, 512), 4096, 14336, 32, 8),
    "Qwen2.5-7B": block(Qwen2Config, (1, 512), 3584, 18944, 28, 4),
}
NAMES = pick(
    quick=["Llama-3.2-1B", "GPT-2"],
    default=["Llama-3.2-1B", "Qwen2.5-0.5B", "GPT-2", "Llama-3.1-8B"],
    full=[*BLOCKS],  # the widest take half a minute to set up
)


@contextmanager
def grouping(on):
    mica.fast.enable(group_projections=on)
    try:
        yield
    finally:
        mica.fast.enable()


CONTEXTS = {
    BARE: nullcontext,
    STOCK: mica.fast.disabled,
    STOCK_16: mica.fast.disabled,
    UNGROUPED: partial(grouping, False),
    GROUPED: partial(grouping, True),
}


COUNTED = {STOCK_16: "stock PEFT, bf16 adapters"}


class Setting(NamedTuple):
    rivals: dict[str, torch.nn.Module]
    inputs: tuple[torch.Tensor, torch.Tensor]
    saved_mb: dict[str, float]
    iterations: int


@functools.lru_cache(maxsize=1)
def setting(name):
    torch.manual_seed(0)
    config, tokens, groups = BLOCKS[name]
    bare = AutoModel.from_config(config, dtype=torch.bfloat16).train().requires_grad_(False)
    layers = [module for module in bare.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    assert len(layers) == sum(groups), f"{len(layers)} linear layers, and groups of {groups}"
    masters = models.wrap(copy.deepcopy(bare), rank=RANK, targets="all-linear")
    models.randomise(masters, 0.02)  # an update of a size that bf16 adapters can carry at width 4096
    copies = [masters, *(copy.deepcopy(masters) for _ in range(3))]
    for parameter in copies[1].parameters():  # not the fp32 frequencies of the rotary embedding, a buffer
        parameter.data = parameter.data.to(torch.bfloat16)
    rivals = {name: model.to(DEVICE) for name, model in zip(CONTEXTS, (bare, *copies), strict=True)}
    x, dy = torch.randn(2, *tokens, config.hidden_size, device=DEVICE, dtype=torch.bfloat16).unbind()
    expected = results_of(STOCK, masters, (x, dy))
    for rival in (STOCK_16, UNGROUPED, GROUPED):
        for what, value in results_of(rival, rivals[rival], (x, dy)).items():
            error = (value - expected[what]).norm() / expected[what].norm()
            assert error <= GATES[what], f"{rival}: {what} is {error:.1e} off stock PEFT's"
    saved = {}
    for rival, model in rivals.items():
        with CONTEXTS[rival]():
            saved[rival] = saved_bytes(lambda model=model: forward(model, x.detach()), [model, bare]) / 1e6
    start = time.perf_counter()
    step(bare, (x, dy))
    return Setting(rivals, (x, dy), saved, iterations(time.perf_counter() - start))


def results_of(rival, model, inputs):
    with CONTEXTS[rival]():
        for _ in range(WARM_UP):
            step(model, inputs)
        return results(model, inputs)


def calls_of(name, rival):
    """Forward operators of one step, by what the rival's name says."""
    sizes = BLOCKS[name].groups
    if rival not in (UNGROUPED, GROUPED):
        return {"linear": 0, "linear_group": 0}
    if rival == UNGROUPED:
        return {"linear": sum(sizes), "linear_group": 0}
    return {"linear": sizes.count(1), "linear_group": len(sizes) - sizes.count(1)}


# the first named parameter is the innermost loop: rivals take turns within a round
@pytest.mark.parametrize("rival", CONTEXTS)
@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("name", NAMES)
def bench_block(once, gated, name, round_, rival):
    batch, sequence = BLOCKS[name].tokens
    group = f"block of {name}, {batch} x {sequence} tokens, r = {RANK}, bfloat16, forward + backward"
    found = gated(group, lambda: setting(name))
    axes = {"suite": "block", "model": name, "tokens": batch * sequence, "rank": RANK, "dtype": "bfloat16"}
    facts = {"saved_mb": found.saved_mb[rival]} if round_ == 0 else {}
    if round_ == 0 and name in traffic.BLOCKS:
        facts["counted bytes ÷ bare"] = traffic.over_bare(
            COUNTED.get(rival, rival), [*traffic.BLOCKS[name].values()]
        )
    steps = []

    def one_step():
        steps.append(None)
        step(found.rivals[rival], found.inputs)

    with CONTEXTS[rival]():
        before = Counter(mica.fast.call_counts)
        once(one_step, group, rival, axes, found.iterations, warm_up=True, **facts)
    for kind, calls in calls_of(name, rival).items():
        ran = (mica.fast.call_counts[kind] - before[kind]) / len(steps)
        assert ran == calls, f"{rival} ran {ran} operators of the kind {kind} a step, not {calls}"
