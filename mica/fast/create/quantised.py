"""Quantised base layers: which of PEFT's layer classes wrap them, and their weight as floating numbers.

MiCA starts from the weight that the layer computes with, so the library's own call dequantises it, and the
packed numbers are never read. The original weight would not do: in SmolLM2-135M at r = 16 the minor
subspaces of W and of nf4(W) share 83 % on average, 19 % in the worst of 210 layers. PEFT's classes are
recognised by name: no quantisation library is imported here, installed or not.

A new library, whose layers PEFT can wrap, needs a function that dequantises, a row in `_KINDS`, its name in
`COVERED`, and in `packed_weight` the attribute that holds the packed weight. Then add

- the hash of the forward of PEFT's class, if it has its own, to `QUANTISED` in mica/fast/known_peft.py:
  without it another release of PEFT is not compared, and no test notices;
- a model to `KINDS` in tests/support/quantised_models.py, which many tests run over, and its
  arithmetic to `dequantised` there; its name to the lists in tests/mica/fast/test_saving.py and
  test_unsuitable.py;
- the library to the extra `quantised` of pyproject.toml: without it these tests are skipped;
- a line to mica/fast/README.md and mica/fast/SETUPS.md, which list what is covered and what is refused.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn

from mica.errors import UnsuitableLayerError
from mica.fast.forward.eligibility import class_of


def _bitsandbytes():
    """The library, which has been imported by now: one of its layers exists."""
    return sys.modules["bitsandbytes"]


def _bitsandbytes_4bit(layer) -> Tensor | None:
    base = layer.get_base_layer()
    if getattr(base.weight, "quant_state", None) is None:
        return None
    codes, state = _unpacked_codes(base.weight)
    return _bitsandbytes().functional.dequantize_4bit(codes, state)


def is_packed_for_cpu(weight: Tensor | None) -> bool:
    """Whether bitsandbytes has repacked a 4-bit weight for its CPU kernel.

    One call in eval mode on a CPU with AVX512-BF16 does that for good (bitsandbytes 0.50.2). The layer still
    computes right, but then, silently,

    - `dequantize_4bit`, and so PEFT's merge, returns other numbers (off by 1.4 times the weight);
    - no gradient passes through the layer any longer, in training mode either;
    - `state_dict`, and so every checkpoint, undoes it wrongly: without double quantisation the scales stay
      transposed, which changes each weight with more than 64 in_features (128: by 0.58 of it); with it they
      are quantised once more at every save.
    """
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def _unpacked_codes(weight: Tensor) -> tuple[Tensor, object]:
    """The codes of a 4-bit weight and their `QuantState`, as before the repacking for the CPU kernel.

    The weight is unchanged. Repacking has rounded the scales to bf16; they are returned so, in fp32.
    """
    if not is_packed_for_cpu(weight):
        return weight.data, weight.quant_state
    state = copy.copy(weight.quant_state)
    state.original_nested = False  # else the scales would be quantised again
    unpack = vars(_bitsandbytes().functional)["_convert_weight_packed_for_cpu_inverse"]
    codes, state = unpack(weight.data, state)
    if state.absmax.dim() == 2:  # still as the kernel reads them, (blocks of in_features, out_features)
        state.absmax = state.absmax.t().reshape(-1)
    state.absmax = state.absmax.float()
    state.state2 = None  # the state of quantised scales, which repacking has deleted
    return codes, state


def keep_unpacked(model: nn.Module) -> None:
    """Unpack all 4-bit layers of a model that is to be trained, and have bitsandbytes repack none of them.

    Those without an adapter too, because the gradient passes through them. See `is_packed_for_cpu`. On one
    core 256 tokens take 1/5 to 1/13 of the time of repacked layers, a single token 4 to 6 times as long.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if is_packed_for_cpu(module.weight):
            module.weight.data, module.weight.quant_state = _unpacked_codes(module.weight)
            module.quant_state = module.weight.quant_state


def _bitsandbytes_8bit(layer) -> Tensor | None:
    base = layer.get_base_layer()
    if base.weight.is_floating_point():
        return base.weight if base.state.has_fp16_weights else None
    # Not `dequantize_module_weight`: on the CPU it replaces the parameter by a copy without its scales, and
    # the layer's next call fails if it has been called before (PEFT 0.21.2, bitsandbytes 0.50).
    return dequantize_bnb_weight(base.weight, state=base.state)


def _own_call(layer) -> Tensor:
    return dequantize_module_weight(layer.get_base_layer())


class Kind(NamedTuple):
    """A kind of quantised layers.

    Attributes:
        name: Its name in messages.
        dequantise: A function from PEFT's layer to its weight, (out_features, in_features), in a floating
            dtype; it returns None where the library has yet to quantise the weight.
    """

    name: str
    dequantise: Callable[[nn.Module], Tensor | None]


_KINDS = {
    "peft.tuners.lora.bnb.Linear4bit": Kind("bitsandbytes 4-bit", _bitsandbytes_4bit),
    "peft.tuners.lora.bnb.Linear8bitLt": Kind("bitsandbytes 8-bit", _bitsandbytes_8bit),
    "peft.tuners.lora.hqq.HqqLoraLinear": Kind("HQQ", _own_call),
    "peft.tuners.lora.torchao.TorchaoLoraLinear": Kind("torchao", _own_call),
}
COVERED = "bitsandbytes 4-bit and 8-bit, HQQ and torchao"


def _name_of(layer_type: type) -> str:
    return f"{layer_type.__module__}.{layer_type.__qualname__}"


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of quantised layer that PEFT's ``layer`` wraps; None if it is not covered here."""
    return _KINDS.get(_name_of(class_of(layer)))


def is_covered(layer_type: type) -> bool:
    """Whether this class of PEFT's is covered."""
    return _name_of(layer_type) in _KINDS


def is_unknown_to_peft(layer: nn.Module) -> bool:
    """Whether bitsandbytes has quantised the weight of a layer that PEFT takes for a plain one.

    An adapter with a B of its own, from a file, runs there all the same.
    """
    base = type(layer.get_base_layer())
    is_quantised = issubclass(base, nn.Linear) and base.__module__.startswith("bitsandbytes.")
    return is_quantised and kind_of(layer) is None


def packed_weight(layer: nn.Module) -> Tensor:
    """The tensor that holds the packed weight, wherever the library stores it: only for its device."""
    base = layer.get_base_layer()
    tensors = [getattr(base, name, None) for name in ("W_q", "weight")]
    return next(tensor for tensor in tensors if isinstance(tensor, Tensor))


@torch.no_grad()
def dequantise(layer: nn.Module, name: str) -> Tensor:
    """The weight that a quantised layer computes with, (out_features, in_features), in a floating dtype.

    It is computed anew at each call, on the layer's device; the layer is unchanged.

    Args:
        layer: PEFT's layer over the quantised one, of a kind that is covered.
        name: What messages call the layer.

    Raises:
        UnsuitableLayerError: The layer is not quantised yet.
    """
    kind = kind_of(layer)
    weight = kind.dequantise(layer)
    if weight is None:
        raise UnsuitableLayerError(
            f"MiCA needs the weight that the layer computes with, but {name} ({kind.name}) is not quantised "
            "yet: move the model to its device first."
        )
    return weight.detach()
