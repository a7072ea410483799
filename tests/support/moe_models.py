"""Tiny mixture-of-experts language models in fp32, one of each layout that transformers has.

In bf16 they run too: PyTorch's grouped products want rows of a multiple of 16 bytes.

``qwen3_moe`` and ``mixtral`` store a stack as (experts, out, in), with gate and up one after the other;
``gpt_oss`` stores (experts, in, out), gate and up interleaved, with biases.
"""

import copy

import torch
import transformers
from torch import nn

from mica.fast.forward.expert_params import is_wrapper
from tests.support.models import adapted_layers, factors, oriented, wrap

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = {"qwen3_moe": "mlp.gate.weight", "mixtral": "mlp.gate.weight", "gpt_oss": "mlp.router.weight"}

_SHARED = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}


def _made(name, **sizes):
    """In eval mode, with normal weights in every stack and router: transformers leaves some 0 or NaN."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_SHARED | sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def qwen3_moe(experts=6, **config):
    """gate_up_proj (experts, 48, 32), down_proj (experts, 32, 24)."""
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": experts}
    return _made("Qwen3Moe", **sizes | config)


def mixtral(experts=4, **config):
    """gate_up_proj (experts, 80, 32), down_proj (experts, 32, 40)."""
    sizes = {"intermediate_size": 40, "num_local_experts": experts}
    return _made("Mixtral", **sizes | config)


def gpt_oss(experts=4, **config):
    """gate_up_proj (experts, 32, 80), down_proj (experts, 40, 32): (experts, in, out)."""
    sizes = {"intermediate_size": 40, "num_local_experts": experts, "attention_dropout": 0.0}
    return _made("GptOss", **sizes | config)


BUILDERS = {"qwen3_moe": qwen3_moe, "mixtral": mixtral, "gpt_oss": gpt_oss}


def wrap_experts(model, rank=4, target_parameters=None, stock=False, target_modules=(), **config):
    """`wrap` with MiCA on the stacks (or ``target_parameters``), and no target modules.

    ``stock``: on stock PEFT, which has plain LoRA only there.
    """
    config = {"init_lora_weights": True if stock else "mica", **config}
    return wrap(
        model, rank, list(target_modules), stock, target_parameters=target_parameters or STACKS, **config
    )


def wrap_all(model, **config):
    """`wrap_experts` on the routers too."""
    return wrap_experts(model, target_parameters=[*STACKS, ROUTER[model.config.model_type]], **config)


def tokens(batch=2, length=7):
    """Token ids (batch, length)."""
    return torch.randint(
        0, _SHARED["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0)
    )


def second(model, **changes):
    """A second adapter with the first one's configuration, but for the changes."""
    config = copy.deepcopy(model.peft_config["default"])
    for name, value in changes.items():
        setattr(config, name, value)
    model.add_adapter("second", config)
    return model


def wrappers(model):
    """name -> PEFT's wrapper, of every adapted parameter."""
    return {name: module for name, module in model.named_modules() if is_wrapper(module)}


class Stack(nn.Module):
    """A module with one parameter of the given weight, as a layer ``experts`` of ``Holder``."""

    def __init__(self, weight, name, **attributes):
        super().__init__()
        setattr(self, name, nn.Parameter(weight, requires_grad=weight.is_floating_point()))
        vars(self).update(attributes)

    def forward(self, x):
        return x


def holder(weight, name="down_proj", **attributes):
    return nn.ModuleDict({"experts": Stack(weight, name, **attributes)})


def wrap_holder(model):
    return wrap_experts(model, 2, ["experts.down_proj"])


def exact_basis(weight, rank):
    """By the definition, in fp64: (..., out, rank)."""
    return torch.linalg.svd(weight.detach().double(), full_matrices=False).U[..., -rank:]


def assert_exact(model, adapter="default", weight_of=oriented):
    """Each B is its weight's minor subspace, orthonormal: the same vectors in the same order."""
    for layer in adapted_layers(model).values():
        B = factors(layer, adapter)[1].detach()
        rank = B.shape[-1]
        exact, double = exact_basis(weight_of(layer), rank), B.double()
        assert (exact - double @ (double.mT @ exact)).norm(dim=(-2, -1)).max() <= 1e-4
        # Vector by vector, up to signs: the singular values of these weights differ
        assert ((double * exact).sum(-2).abs() > 1 - 1e-6).all()
        assert (B.mT @ B - torch.eye(rank)).abs().max() <= 1e-6
