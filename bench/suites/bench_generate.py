"""`generate()` on a pretrained model and on a tiny one, whose time is the host's: bare, with the adapter
merged, and with the adapter not merged.

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
from bench.suites.rounds import Once, prepared, rounds
from bench.suites.steps import counting
from tests.support import models

NEW_TOKENS = 32
PROMPT_TOKENS = 16
# with a scale of 0.02 some of the tokens are the bare model's, with 0.1 they repeat
A_SCALE = 0.05
CONTEXTS = {BARE: nullcontext, MERGED: nullcontext, STOCK: mica.fast.disabled, FAST: nullcontext}
TINY = "a Llama of 2 blocks of 64 / 128"
MODELS = {"smollm2": SMOLLM2, "tiny": TINY}  # for -k, and their names


def group_of(model: str) -> str:
    return f"generate() of {NEW_TOKENS} tokens after {PROMPT_TOKENS}, {model}, r = {RANK}, float32"


def bare_of(model: str) -> nn.Module:
    if model == SMOLLM2:
        return models.smollm2()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    vocabulary = int(models.python_reference_tokens().max()) + 1
    return models.tiny_llama(0, vocab_size=vocabulary, initializer_range=0.3, **sizes)


def generated(model: nn.Module) -> Tensor:
    """(1, new tokens), the likeliest ones."""
    ids = models.python_reference_tokens()[None, :PROMPT_TOKENS]
    how = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0)
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return tokens[:, PROMPT_TOKENS:]


@functools.lru_cache(maxsize=1)
def setting(name: str) -> dict[str, nn.Module]:
    """Stock PEFT and mica.fast have the same model."""
    torch.manual_seed(0)
    bare = bare_of(name).eval().requires_grad_(False)
    model = adapted(bare, A_SCALE).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    implementations = {BARE: bare, MERGED: merged, STOCK: model, FAST: model}

    def tokens_of(implementation: str) -> Tensor:
        with CONTEXTS[implementation](), counting() as ran:
            tokens = generated(implementations[implementation])
        assert bool(ran) == (implementation == FAST), f"{implementation} ran {ran}"
        assert tokens.shape == (1, NEW_TOKENS), f"{implementation} stopped after {tokens.shape[1]} tokens"
        return tokens

    expected = tokens_of(STOCK)
    assert not torch.equal(tokens_of(BARE), expected), "the adapter makes no difference"

    def checked(implementation: str) -> nn.Module:
        if implementation in (MERGED, FAST):
            is_same = torch.equal(tokens_of(implementation), expected)
            assert is_same, f"{implementation} generates other tokens than stock PEFT"
        return implementations[implementation]

    return build_all(group_of(name), implementations, checked)


@pytest.mark.parametrize("key", MODELS)
def bench_generate(key):
    model = MODELS[key]
    group = group_of(model)
    axes = {"suite": "generation", "model": model, "tokens": NEW_TOKENS, "rank": RANK, "dtype": "float32"}
    implementations = prepared(group, lambda: setting(model))

    def sample(once: Once, name: str) -> None:
        with CONTEXTS[name]():
            once(lambda: generated(implementations[name]), axes, work={throughput.TOKENS: NEW_TOKENS})

    rounds(group, CONTEXTS, sample)
