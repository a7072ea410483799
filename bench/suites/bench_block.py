"""A decoder block (attention and MLP) of random weights with real widths: forward + backward, bf16, r = 16.

All results are checked against stock PEFT's before anything is timed, and each timed step has to run the
operators that its name implies.
"""

import functools
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModel, GPT2Config, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from bench.measure.clocks import seconds
from bench.measure.machine import DEVICE
from bench.measure.memory import saved_bytes
from bench.results.names import BARE, FAST, STOCK, STOCK_16
from bench.suites.decoder import RANK, Work, adapted, config_of
from bench.suites.harness import iterations, pick
from bench.suites.steps import CONTEXTS, Step, check_all, expected_operators

ROUNDS = pick(default=4, quick=3, full=6, cuda=10, dry=1)
IMPLEMENTATIONS = (BARE, STOCK, STOCK_16, FAST)
# Relative differences of y, dx and dA from stock PEFT's, whose adapters compute in fp32.
GATES = {"y": 1e-2, "dx": 2e-2, "dA": 2e-2}


class Block(NamedTuple):
    """``tokens``: (batch, sequence), on a CPU."""

    config: PretrainedConfig
    tokens: tuple[int, int]


GPT2 = GPT2Config(
    n_embd=768,
    n_head=12,
    n_layer=1,
    vocab_size=8,  # no tokens go in
    bos_token_id=None,
    eos_token_id=None,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
BLOCKS = {
    "Llama-3.2-1B": Block(config_of("Llama-3.2-1B"), (2, 512)),
    "Qwen2.5-0.5B": Block(config_of("Qwen2.5-0.5B"), (2, 512)),
    "GPT-2": Block(GPT2, (2, 512)),
    "Llama-3.1-8B": Block(config_of("Llama-3.1-8B"), (1, 512)),
    "Qwen2.5-7B": Block(config_of("Qwen2.5-7B"), (1, 512)),
    "toy": Block(config_of("toy"), (1, 8)),
}
NAMES = pick(
    quick=["Qwen2.5-0.5B"],
    default=["Llama-3.2-1B", "Qwen2.5-0.5B", "GPT-2"],
    full=[name for name in BLOCKS if name != "toy"],  # the widest take half a minute to set up
    cuda=["Llama-3.2-1B", "Llama-3.1-8B"],
    dry=["toy"],
)


def tokens_of(name: str) -> tuple[int, int]:
    return pick(default=BLOCKS[name].tokens, cuda=(4, 2048))


class Setting(NamedTuple):
    steps: dict[str, Step]
    saved_mb: dict[str, float]
    iterations: int


@functools.lru_cache(maxsize=1)
def setting(name: str, group: str) -> Setting:
    torch.manual_seed(0)
    config = BLOCKS[name].config
    bare = AutoModel.from_config(config, dtype=torch.bfloat16).train().requires_grad_(False).to(DEVICE)
    layers = sum(isinstance(module, (torch.nn.Linear, Conv1D)) for module in bare.modules())
    x, dy = torch.randn(2, *tokens_of(name), config.hidden_size, device=DEVICE, dtype=torch.bfloat16).unbind()
    # an update of a size that bf16 adapters can carry at width 4096
    work = Work(bare, adapted(bare, 0.02), x, dy)

    def build(implementation: str) -> Step:
        return work.step(implementation, CONTEXTS[implementation], expected_operators(implementation, layers))

    steps = check_all(group, IMPLEMENTATIONS, build, GATES)
    saved = {}
    for implementation, step in steps.items():
        with step.form.context():
            saved[implementation] = saved_bytes(step.form.forward, [step.form.module]) / 1e6
    return Setting(steps, saved, iterations(seconds(steps[BARE])))


# the first named parameter is the innermost loop: implementations take turns within a round
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("name", NAMES)
def bench_block(once, gated, name, round_, implementation):
    batch, sequence = tokens_of(name)
    group = f"block of {name}, {batch} x {sequence} tokens, r = {RANK}, bfloat16, forward + backward"
    block = gated(group, lambda: setting(name, group), implementation)
    axes = {"suite": "block", "model": name, "tokens": batch * sequence, "rank": RANK, "dtype": "bfloat16"}
    facts = {"saved_mb": block.saved_mb[implementation]} if round_ == 0 else {}
    block.steps[implementation].time(
        once, group, implementation, axes, block.iterations, all_clocks=True, **facts
    )
