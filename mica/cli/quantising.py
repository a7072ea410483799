"""bitsandbytes' layers on the meta device: a model in 4 or 8 bits whose memory is counted."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer


def of_bits(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """4 bits are QLoRA's: nf4, quantised scales, products in the model's dtype."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **nf4)


def of_checkpoint(config: dict) -> BitsAndBytesConfig | None:
    """What ``quantization_config`` of a checkpoint says; None for another library."""
    if config.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    return BitsAndBytesConfig.from_dict(config)


def quantise(model: nn.Module, config: BitsAndBytesConfig) -> None:
    """Replace the layers of a model without values that transformers replaces while it loads one.

    In place, and after any copy of the model: bitsandbytes' parameters cannot be copied on the meta device.
    """
    from bitsandbytes import functional

    dtype = model.dtype
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    quantizer.postprocess_model(model)
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        kind = type(weight).__name__
        if kind == "Params4bit":
            weight.data, weight.quant_state = functional.quantize_4bit(
                weight.data.to(dtype),
                compress_statistics=weight.compress_statistics,
                quant_type=weight.quant_type,
                quant_storage=weight.quant_storage,
            )
            layer.quant_state = weight.quant_state
            weight.bnb_quantized = True
        elif kind == "Int8Params":
            weight.data, weight.SCB, _ = functional.int8_vectorwise_quant(weight.data.half())
            weight.CB = weight.data
            layer.state.threshold = 0.0  # which columns are outliers depends on values
        if kind in ("Params4bit", "Int8Params") and layer.bias is not None:
            layer.bias.data = layer.bias.data.to(dtype)
