"""`generate()` on a pretrained model: bare, with a merged adapter, and with an adapter that is not merged.

The tokens must be stock PEFT's before anything is timed.
"""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

import mica.fast
from bench.results import throughput
from bench.results.names import BARE, FAST, MERGED, STOCK
from bench.suites.decoder import RANK, SMOLLM2, adapted
from bench.suites.harness import build_all
from bench.suites.steps import counting
from tests.support import models

ROUNDS = 5
NEW_TOKENS = 32
PROMPT_TOKENS = 16
# with a scale of 0.02 some of the tokens are the bare model's, with 0.1 they repeat
A_SCALE = 0.05
CONTEXTS = {BARE: nullcontext, MERGED: nullcontext, STOCK: mica.fast.disabled, FAST: nullcontext}
GROUP = f"generate() of {NEW_TOKENS} tokens after {PROMPT_TOKENS}, {SMOLLM2}, r = {RANK}, float32"
AXES = {"suite": "generation", "model": SMOLLM2, "tokens": NEW_TOKENS, "rank": RANK, "dtype": "float32"}


def generated(model: nn.Module) -> Tensor:
    """(1, new tokens), the likeliest ones."""
    ids = models.python_reference_tokens()[None, :PROMPT_TOKENS]
    how = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0)
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return tokens[:, PROMPT_TOKENS:]


@functools.lru_cache(maxsize=1)
def setting() -> dict[str, nn.Module]:
    """Stock PEFT and mica.fast have the same model."""
    torch.manual_seed(0)
    bare = models.smollm2().eval().requires_grad_(False)
    model = adapted(bare, A_SCALE).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    implementations = {BARE: bare, MERGED: merged, STOCK: model, FAST: model}

    def tokens_of(name: str) -> Tensor:
        with CONTEXTS[name](), counting() as ran:
            tokens = generated(implementations[name])
        assert bool(ran) == (name == FAST), f"{name} ran {ran}"
        assert tokens.shape == (1, NEW_TOKENS), f"{name} stopped after {tokens.shape[1]} tokens"
        return tokens

    expected = tokens_of(STOCK)
    assert not torch.equal(tokens_of(BARE), expected), "the adapter makes no difference"

    def checked(name: str) -> nn.Module:
        if name in (MERGED, FAST):
            assert torch.equal(tokens_of(name), expected), f"{name} generates other tokens than stock PEFT"
        return implementations[name]

    return build_all(GROUP, implementations, checked)


@pytest.mark.parametrize("implementation", CONTEXTS)
@pytest.mark.parametrize("round_", range(ROUNDS))
def bench_generate(once, gated, round_, implementation):
    model = gated(GROUP, setting, implementation)[implementation]
    call = functools.partial(generated, model)
    with CONTEXTS[implementation]():
        once(call, GROUP, implementation, AXES, work={throughput.TOKENS: NEW_TOKENS})
