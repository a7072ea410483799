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

from bench.measure.machine import DEVICE, ON_ACCELERATOR
from bench.results.names import BARE, DORA, MICA, STOCK_16, STOCK_UNCAST
from bench.suites.layer import Form
from bench.suites.steps import CONTEXTS, OURS, Step, operators
from tests.support import models

Context = Callable[[], AbstractContextManager]

RANK = 16
SMOLLM2 = "SmolLM2-135M"
A_SCALE = 0.02  # of the values of A: an update that bf16 adapters can carry at width 4096
_WIDTHS = {  # hidden, intermediate, heads, heads of k and v
    "Llama-3.2-1B": (LlamaConfig, 2048, 8192, 32, 8),
    "Llama-3.1-8B": (LlamaConfig, 4096, 14336, 32, 8),
    "Qwen2.5-0.5B": (Qwen2Config, 896, 4864, 14, 2),
    "SmolLM2-135M's widths": (LlamaConfig, 576, 1536, 9, 3),
    "64 / 128": (LlamaConfig, 64, 128, 4, 2),
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


@contextmanager
def _uncast(model: nn.Module, context: Context) -> Iterator[None]:
    with context(), disable_input_dtype_casting(model):
        yield


# What is called, with a model and embeddings; functions with a name, so that a `Work` can be pickled


def hidden_states(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x).last_hidden_state


def loss(labels: Tensor, model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x, labels=labels).loss


def under_autocast(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> Tensor:
    """As Trainer calls it with ``bf16=True``: the forward only."""
    with torch.autocast(DEVICE, torch.bfloat16):
        return call(model, x)


class Work(NamedTuple):
    """What is run: ``call(model, x)`` gives y of x's shape, or a loss, for which there is no ``grad_output``.

    ``bare``: frozen, without adapters; ``masters``: with adapters as PEFT makes them, in fp32, for
    implementations to copy; ``x``: embeddings (batch, sequence, hidden).
    """

    bare: nn.Module
    masters: nn.Module
    x: Tensor
    grad_output: Tensor | None
    adapter: str
    call: Callable[[nn.Module, Tensor], Tensor]

    def step(
        self,
        name: str,
        context: Context | None = None,
        on_kernels: bool = ON_ACCELERATOR,
        forwards: int = 1,
        rate: float = 0.0,
    ) -> Step:
        """A step of the bare model or of a copy of the masters.

        x requires a gradient, so that the bare frozen model has a backward too. ``context``: what it runs in,
        by default that of its name; ``forwards``: see `operators`; ``rate``: AdamW's, 0 without an optimizer.
        """
        context = context or CONTEXTS[name]
        model = self.bare if name == BARE else copy.deepcopy(self.masters)
        if name == STOCK_16:
            cast(model, self.x.dtype)
        if name == STOCK_UNCAST:
            context = functools.partial(_uncast, model, context)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        x = self.x.detach().requires_grad_()
        form = Form(lambda: self.call(model, x), (x, *trained), context, model)
        optimizer = torch.optim.AdamW(trained, lr=rate) if trained and rate else None
        ran = {}
        if name in OURS:
            layers = len(models.adapted_layers(self.masters))
            has_dropout = any(type(module) is nn.Dropout for module in self.masters.modules())
            ran = operators(layers, on_kernels, forwards, self.adapter, has_dropout)
        return Step(form, self.grad_output, optimizer, ran)


def work_on(
    bare: nn.Module,
    shape: tuple[int, ...],
    adapter: str = MICA,
    targets: str | list[str] = "all-linear",
    call: Callable[[nn.Module, Tensor], Tensor] = hidden_states,
    **config,
) -> Work:
    """Random embeddings of this shape through a model, which is frozen here, and a copy with adapters."""
    bare.train().requires_grad_(False).to(DEVICE)
    masters = adapted(bare, A_SCALE, targets, adapter, **config).train()
    x, dy = torch.randn(2, *shape, device=DEVICE, dtype=next(bare.parameters()).dtype).unbind()
    return Work(bare, masters, x, dy, adapter, call)


def adapted(
    bare: nn.Module,
    scale: float,
    targets: str | list[str] = "all-linear",
    adapter: str = MICA,
    **config,
) -> nn.Module:
    """A copy with MiCA, plain LoRA or DoRA; what it trains has values of this scale, as after training."""
    init = "mica" if adapter == MICA else True
    if adapter == DORA:
        config["use_dora"] = True
    model = models.wrap(copy.deepcopy(bare), rank=RANK, targets=targets, init_lora_weights=init, **config)
    return models.randomise(model, scale)
