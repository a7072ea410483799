"""Quantised models without a hub: a small model whose `nn.Linear`s are replaced, each library its own way."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.models import INDICES, tiny_llama, wrap
from tests.support.moe_models import exact_basis

# Those of Llama. lm_head stays as it is.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _filled(layer, linear):
    """On the CPU, which is where it is quantised."""
    layer.weight.data.copy_(linear.weight.data)
    if linear.bias is not None:
        layer.bias.data.copy_(linear.bias.data)
    return layer.to("cpu")


def bnb_4bit(linear, quant_type="nf4", quant_storage=torch.uint8, double=False, compute_dtype=None):
    bnb = pytest.importorskip("bitsandbytes")
    options = {"quant_type": quant_type, "quant_storage": quant_storage, "compute_dtype": compute_dtype}
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer = bnb.nn.Linear4bit(*sizes, compress_statistics=double, **options)
    return _filled(layer.to(linear.weight.dtype), linear)


def bnb_8bit(linear):
    bnb = pytest.importorskip("bitsandbytes")
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    return _filled(bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False), linear)


def hqq(linear, compute_dtype=torch.float32):
    core = pytest.importorskip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=4, group_size=8, axis=1)
    return core.HQQLinear(linear, config, compute_dtype=compute_dtype, device="cpu")


def torchao_int8(linear):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


def _torchao_model(model):
    """What transformers leaves on a model that it has quantised; PEFT merges by it."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    model.hf_quantizer = SimpleNamespace(quantization_config=config)


# name -> (how a layer is replaced, what the model is told)
KINDS = {
    "nf4": (bnb_4bit, {"is_loaded_in_4bit": True}),
    "fp4": (lambda linear: bnb_4bit(linear, "fp4"), {"is_loaded_in_4bit": True}),
    "nf4 double, bf16 storage": (
        lambda linear: bnb_4bit(linear, quant_storage=torch.bfloat16, double=True),
        {"is_loaded_in_4bit": True},
    ),
    "nf4, fp32 storage, bf16 compute": (
        lambda linear: bnb_4bit(linear, quant_storage=torch.float32, compute_dtype=torch.bfloat16),
        {"is_loaded_in_4bit": True},
    ),
    "int8": (bnb_8bit, {"is_loaded_in_8bit": True}),
    "hqq": (hqq, {}),
    "hqq, bf16 compute": (lambda linear: hqq(linear, torch.bfloat16), {}),
    "torchao int8": (torchao_int8, {"then": _torchao_model}),
}


def quantise(model, kind):
    """The model with all its `nn.Linear`s but lm_head replaced by quantised ones."""
    replace, told = KINDS[kind] if isinstance(kind, str) else (kind, {})
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, replace(child))
    told = dict(told)
    told.pop("then", lambda model: None)(model)
    for name, value in told.items():
        setattr(model, name, value)
    return model


def dequantised(base):
    """The weight (out_features, in_features) in fp64, by each library's arithmetic written out or called."""
    if hasattr(base, "W_q"):
        return base.dequantize().double()
    weight = base.weight
    if type(weight).__name__ == "Params4bit":
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if type(weight).__name__ == "Int8Params":
        scales = weight.SCB if weight.SCB is not None else base.state.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    return weight.dequantize().double()


def llama(kind=None):
    """One layer, quantised; unquantised for None. In bf16 where bf16 is computed in."""
    model = tiny_llama(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    if "bf16 compute" in (kind or ""):
        model.to(torch.bfloat16)
    return quantise(model, kind) if kind else model


def adapted(kind, **config):
    """`llama` with MiCA on all its quantised layers."""
    return wrap(llama(kind), targets=TARGETS, **config)


def logits(model):
    model.train()  # in eval mode bitsandbytes repacks 4-bit weights on some CPUs
    return model(input_ids=INDICES).logits


def assert_spans(B, weight):
    """B Bᵀ is the projector on the minor subspace of the weight."""
    exact, B = exact_basis(weight, B.shape[1]), B.detach().double()
    assert (B @ B.T - exact @ exact.T).abs().max() <= 1e-5
