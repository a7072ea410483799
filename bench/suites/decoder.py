"""Decoder models with adapters on all linear layers, of which every implementation has its own copy."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from bench.results.names import BARE, MICA, PLAIN_LORA, STOCK_16, STOCK_UNCAST
from bench.suites.layer import Form
from bench.suites.steps import Step
from tests.support import models

Context = Callable[[], AbstractContextManager]

RANK = 16
SMOLLM2 = "SmolLM2-135M"
LINEAR_LAYERS = 7  # of a block of Llama's or Qwen's
_WIDTHS = {  # hidden, intermediate, heads, heads of k and v
    "Llama-3.2-1B": (LlamaConfig, 2048, 8192, 32, 8),
    "Llama-3.1-8B": (LlamaConfig, 4096, 14336, 32, 8),
    "Qwen2.5-0.5B": (Qwen2Config, 896, 4864, 14, 2),
    "SmolLM2-135M's widths": (LlamaConfig, 576, 1536, 9, 3),
    "toy": (LlamaConfig, 32, 48, 4, 2),
}


def config_of(name: str, layers: int = 1, vocabulary: int = 8) -> PretrainedConfig:
    """A model with these widths. The vocabulary may be small where no tokens are embedded."""
    shared = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None}
    if name == "GPT-2":
        return GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared)
    kind, hidden, intermediate, heads, kv_heads = _WIDTHS[name]
    return kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        **shared,
    )


def causal(name: str, layers: int, vocabulary: int, dtype: torch.dtype) -> nn.Module:
    """With a head, random weights."""
    return AutoModelForCausalLM.from_config(config_of(name, layers, vocabulary), dtype=dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In place; except the rotary embedding's fp32 frequencies, which are a buffer."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def reference_ids(tokens: tuple[int, int]) -> Tensor:
    """So many sequences of so many tokens of the Python reference, by SmolLM2's tokenizer."""
    batch, sequence = tokens
    return models.python_reference_tokens()[: batch * sequence].view(tokens)


def _as_it_is(model: nn.Module) -> Callable:  # with a name, so that a `Work` can be pickled
    return model


@contextmanager
def _uncast(model: nn.Module, context: Context) -> Iterator[None]:
    with context(), disable_input_dtype_casting(model):
        yield


class Work(NamedTuple):
    """What is run: a model without a head gives y of x's shape, one with a head the loss of ``labels``.

    ``bare``: frozen, without adapters; ``masters``: with adapters as PEFT makes them, in fp32, for
    implementations to copy; ``x``: embeddings (batch, sequence, hidden); ``wrap``: makes of a model what is
    called.
    """

    bare: nn.Module
    masters: nn.Module
    x: Tensor
    grad_output: Tensor | None = None
    labels: Tensor | None = None
    wrap: Callable[[nn.Module], Callable] = _as_it_is

    def step(self, name: str, context: Context, operators: dict[str, int], rate: float = 0.0) -> Step:
        """A step of the bare model or of a copy of the masters; ``rate``: AdamW's.

        x requires a gradient, so that the bare frozen model has a backward too.
        """
        model = self.bare if name == BARE else copy.deepcopy(self.masters)
        if name == STOCK_16:
            cast(model, self.x.dtype)
        if name == STOCK_UNCAST:
            context = functools.partial(_uncast, model, context)
        call = self.wrap(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        x = self.x.detach().requires_grad_()

        def forward() -> Tensor:
            if self.labels is None:
                return call(inputs_embeds=x).last_hidden_state
            return call(inputs_embeds=x, labels=self.labels).loss

        optimizer = torch.optim.AdamW(trained, lr=rate) if trained and rate else None
        return Step(Form(forward, (x, *trained), context, model), self.grad_output, optimizer, operators)


def adapted(
    bare: nn.Module,
    scale: float,
    targets: str | list[str] = "all-linear",
    adapter: str = MICA,
    **config,
) -> nn.Module:
    """A copy with adapters whose A has values of this scale, as after training.

    ``adapter``: MiCA or plain LoRA, whose B has columns of the length 1, as MiCA's has.
    """
    is_lora = adapter == PLAIN_LORA
    init = True if is_lora else "mica"
    model = models.wrap(copy.deepcopy(bare), rank=RANK, targets=targets, init_lora_weights=init, **config)
    if is_lora:
        generator = torch.Generator().manual_seed(0)
        for B in models.bases(model).values():
            B.data.copy_(torch.randn(B.shape, generator=generator) * len(B) ** -0.5)
    return models.randomise(model, scale)
