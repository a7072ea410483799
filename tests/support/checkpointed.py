"""Small adapted models whose layers are checkpointed, and what a step of one takes, by PyTorch's profiler."""

import gc
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import mica.fast
from mica.counting import held
from mica.fast import checkpointing
from tests.support.models import randomise, wrap

GIB = 2**30
VOCABULARY = 97


def llama(layers=4, dtype=torch.bfloat16, attention="sdpa", width=64, **config):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            attn_implementation=attention,
            use_cache=False,
        )
    )
    return adapted(model.to(dtype), **config)


def adapted(model, use_reentrant=False, **config):
    """With LoRA, whose B is not 0, trained and checkpointed."""
    mica.fast.enable(lora=True)
    config = {"init_lora_weights": False, "targets": "all-linear", **config}
    model = randomise(wrap(model.train(), **config), 0.02)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


def batch(length, size=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (size, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def step(model, *batches, seed=0):
    """The loss of each batch and the gradients of all, which are cleared."""
    torch.manual_seed(seed)
    losses = []
    for inputs in batches:
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return [*losses, *gradients]


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def numbers():
    """How many layers each run has checkpointed: in the last batch, at least, at most."""
    return [run.numbers for run in checkpointing.runs.values()]


def fixed_bytes(model):
    """Of weights, adapter, gradients and Adam's states."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held(model)}
    return sum(storages.values()) + 3 * trained


@contextmanager
def budget_for(model, size):
    """So many bytes beside what is fixed, of this model and of whatever else the process holds."""
    gc.collect()
    checkpointing.forget()
    taken, trained = checkpointing.taken_of(torch.device("cpu"))
    taken += 3 * sum(parameter.nbytes for parameter in trained)
    del trained  # or what a test deletes would stay
    mica.fast.enable(memory=(taken + size) / GIB)
    try:
        yield
    finally:
        mica.fast.enable(memory=None)


def most_bytes(function):
    """The most that was allocated at any time of a call, in addition to what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = profiled.profiler.kineto_results.events()
    level = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most
