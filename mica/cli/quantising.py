"""bitsandbytes' configurations, and its layers on the meta device: a model whose memory is counted."""

from argparse import Namespace
from unittest.mock import patch

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import is_bitsandbytes_available

from mica.errors import UsageError


def quantisation(model: nn.Module, args: Namespace) -> BitsAndBytesConfig | None:
    """By ``args.bits``, where 4 are QLoRA's, or the checkpoint; None without.

    Raises UsageError for both, for other libraries, and if bitsandbytes is missing.
    """
    given = getattr(model.config, "quantization_config", None)
    if given is None and args.bits is None:
        return None
    what = None
    if given is not None and args.bits is not None:
        what = f"is quantised already: leave --bits {args.bits} out"
    elif given is not None and given.get("quant_method", "bitsandbytes") != "bitsandbytes":
        what = f"is quantised by {given['quant_method']}: only layers of bitsandbytes are counted"
    elif not is_bitsandbytes_available():
        what = "4 or 8 bits need bitsandbytes: pip install bitsandbytes"
    if what is not None:
        raise UsageError(f"{args.model}: {what}")
    if given is not None:
        return BitsAndBytesConfig.from_dict(given)
    return of_bits(args.bits, model.dtype)


def of_bits(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """8 bits; or 4, nf4 with quantised scales, as QLoRA (arXiv 2305.14314), computing in ``dtype``."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


@patch.dict("bitsandbytes.functional.name2qmap", clear=True)  # where it would keep a code without values
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
            options = ("compress_statistics", "quant_type", "quant_storage")
            options = {name: getattr(weight, name) for name in options}
            weight.data, weight.quant_state = functional.quantize_4bit(weight.data.to(dtype), **options)
            layer.quant_state = weight.quant_state
            weight.bnb_quantized = True
            # PEFT's DoRA copies a layer to read its weight
            weight.__deepcopy__ = lambda memo, own=weight: own
        elif kind == "Int8Params":
            weight.data, weight.SCB, _ = functional.int8_vectorwise_quant(weight.data.half())
            weight.CB = weight.data
            layer.state.threshold = 0.0  # which columns are outliers depends on values
