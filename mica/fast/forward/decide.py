"""The forwards of PEFT's LoRA layers over linear layers and embeddings: first decide, then compute.

An adapter of a linear layer is one operator (`Adapted`), which also multiplies the base weight, or is given
what the base layer has returned; or PEFT's own code runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners import lora
from torch import Tensor, nn

from mica.dtypes import SIXTEEN_BIT
from mica.fast.forward import fast, layer_calls
from mica.fast.forward.dora import Scaled
from mica.fast.forward.eligibility import (
    REFERENCE,
    Adapter,
    Choices,
    OnOperators,
    OnPeft,
    adapters_of,
    class_of,
    is_dora,
    quantised_layers,
    read_adapters,
    read_base,
    read_magnitude,
    runs_adapter,
    why_not_dense,
    why_not_frozen,
)
from mica.fast.forward.layer_calls import Input
from mica.fast.settings import compute_dtype, settings
from mica.kernels import runtime
from mica.memory import LAYER_TYPES
from mica.ops.embedding import embedding
from mica.ops.linear import linear
from mica.ops.operator import AUTOCAST, is_autocast
from mica.paths import choose
from mica.paths.dropout import drawn_seed
from mica.paths.operands import Operands
from mica.paths.tuning import Kind


def decided(decide: Callable, may_be_cpp: bool = False) -> Callable:
    """A patch that replaces a layer's forward: ``decide`` returns an object, and calling that with x gives y.

    Args:
        decide: ``decide(layer, x, *args, **kwargs)`` decides how a call runs. Called with the layer alone, it
            leaves out what only a call shows.
        may_be_cpp: Whether C++ knows such layers: it is tried first, and without it small calls are PEFT's.
    """

    def patch(stock):
        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            if not settings.enabled:
                return stock(self, x, *args, **kwargs)
            reason = None
            if may_be_cpp and not args and not kwargs and not torch.compiler.is_dynamo_compiling():
                y = fast.call_cpp(self, x)
                if y is not None:
                    return y
                reason = fast.why_small(self, x)
            if reason is None:
                how = decide(self, x, *args, **kwargs)
                if type(how) is not OnPeft:
                    if may_be_cpp and fast.settle(x):
                        return forward(self, x)  # from C++, now that there may be some
                    layer_calls.note(self, x=x)
                    return how(x)
                reason = how.reason if runs_adapter(self) else None
            layer_calls.note(self, reason)
            return stock(self, x, *args, **kwargs)

        return forward

    return patch


@dataclass
class Adapted(OnOperators):
    """A linear layer with its active adapters, each of which is one operator, and one node of autograd.

    Attributes:
        base: The base layer.
        operands: Those of each adapter, without a seed. The first has the base weight and multiplies it; or
            none has, and the base layer is called.
        why_called: Why the base layer is called; None if it is not.
    """

    base: nn.Module
    operands: list[Operands]
    why_called: str | None

    def __call__(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        y = self.base(x) if self.why_called else None
        for operands in self.operands:
            own_seed = drawn_seed(operands.dropout_p, x.device) if seed is None else seed
            y = linear(x, *operands._replace(seed=own_seed, base_output=y))
        return y

    def choices(self, x: Input | None) -> Choices:
        for operands in self.operands:
            dtypes = (*_dtypes(x, operands), operands.lora_A.dtype, operands.lora_B.dtype)
            kinds = dict.fromkeys(("linear", "linear_backward"))
            if operands.weight is not None:
                kinds = _kinds_of(operands, dtypes, x)
            for function, kind in kinds.items():
                known = choose.LORA + function if operands.trains_B else function
                device = operands.lora_A.device
                yield function, choose.choice_of(known, device, operands.rank, dtypes, kind)

    def why_python(self, x: Input | None) -> str | None:
        first, *_ = self.operands
        return choose.why_not_cpp(first.lora_A.device, _dtypes(x, first))


def _dtypes(x: Input | None, operands: Operands) -> tuple[torch.dtype, torch.dtype]:
    """Those in which x and the low-rank products are multiplied."""
    if x is not None and x.autocast_dtype is not None:
        return x.autocast_dtype, x.autocast_dtype
    like_x = operands.lora_A if operands.weight is None else operands.weight
    dtype = like_x.dtype if x is None else x.dtype
    return dtype, compute_dtype(dtype, operands.lora_A.dtype) or dtype


def _kinds_of(operands: Operands, dtypes: tuple, x: Input | None) -> dict[str, Callable[[], Kind]]:
    """Functions that give the kinds of a layer's passes, in a call with x where that still fits the layer."""
    out_features, in_features = operands.weight.shape
    has_dtype = x is not None and (x.autocast_dtype is not None or x.dtype is operands.weight.dtype)
    if has_dtype and x.shape[-1] == in_features:
        matrix = x.as_matrix()
    else:
        matrix = torch.empty(0, in_features, device="meta")
    grad_output = matrix.new_empty(len(matrix), out_features)  # contiguous, as PyTorch returns it
    return {
        "linear": partial(choose.kind_of, operands, dtypes, matrix),
        "linear_backward": partial(choose.kind_of, operands, dtypes, grad_output, matrix),
    }


def decide(layer, x: Tensor | None = None, *args, **kwargs) -> OnOperators | OnPeft:
    """How a linear layer or an embedding runs, with all of its active adapters.

    Args:
        layer: PEFT's layer.
        x: The input of a call, (..., in_features), or indices; None where no call is looked at.
        args, kwargs: The other arguments of the call.
    """
    if args or kwargs:
        return OnPeft(_why_not_arguments(kwargs))
    adapters = read_adapters(layer)
    if type(adapters) is str:
        return OnPeft(adapters)
    if isinstance(layer, lora.Embedding):
        return _embedded(layer, *adapters, x)
    reason = None if x is None else _why_not_call(layer, x, adapters)
    if reason is not None:
        return OnPeft(reason)

    (name, *_) = adapters_of(layer)
    if is_dora(layer, name):
        return _scaled(layer, name, adapters[0], x)
    return _adapted(layer, adapters, x)


def _adapted(layer, adapters: list[Adapter], x: Tensor | None) -> Adapted:
    """How it runs with these adapters as MiCA or plain LoRA."""
    weight = bias = why_called = None
    base = read_base(layer)
    if type(base) is str:
        why_called = base
    elif x is not None and not _multiplies(x, base[0]):
        why_called = f"an input of {x.dtype} with a base weight of {base[0].dtype}"
    else:
        weight, bias = base
    operands = []
    for lora_A, lora_B, scaling, dropout_p, trains_B in adapters:
        dtype = None if x is None else compute_dtype(x.dtype, lora_A.dtype)
        operands.append(Operands(weight, lora_A, lora_B, scaling, bias, dtype, dropout_p, trains_B=trains_B))
        weight = bias = None
    return Adapted(layer._modules["base_layer"], operands, why_called)


def _scaled(layer, name: str, adapter: Adapter, x: Tensor | None) -> Scaled | OnPeft:
    """How it runs with DoRA: PEFT drops elements where the layer is in training mode."""
    if not layer.training:
        adapter = adapter._replace(dropout_p=0.0)
    magnitude = read_magnitude(layer, name)
    if type(magnitude) is str:
        return OnPeft(magnitude)
    inner = _adapted(layer, [adapter], x)
    plain = _adapted(layer, [adapter._replace(dropout_p=0.0)], x)
    bias = layer.base_layer.bias
    has_bias = not adapter.dropout_p and (x is None or _product_dtype(x) not in SIXTEEN_BIT)
    if not plain.why_called:
        (operands,) = plain.operands
        if not has_bias:
            plain.operands = [operands._replace(bias=None)]
        return Scaled(layer, adapter, magnitude, inner, plain, operands.weight, operands.bias, has_bias)
    reason = why_not_frozen("base bias", bias)
    if class_of(layer) not in quantised_layers or reason is not None:
        return OnPeft(f"DoRA, and {reason or inner.why_called}")
    return Scaled(layer, adapter, magnitude, inner, plain, None, bias, has_bias)


def _product_dtype(x: Tensor) -> torch.dtype:
    """That in which a layer multiplies x."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x.device.type) else x.dtype


def _why_not_arguments(kwargs: dict) -> str:
    """Why a call that has more arguments than x is PEFT's."""
    if kwargs.get("adapter_names") is not None:
        return "a mixed batch (adapter_names)"
    return "a call with further arguments"


def _multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the operators multiply x by this weight; autocast gives the two one dtype."""
    if is_autocast(x.device.type):
        return weight.dtype != torch.float64
    return x.dtype == weight.dtype


def is_dense(x: Tensor) -> bool:
    """Not nested, sparse, mkldnn or of a tensor subclass."""
    return type(x) in LAYER_TYPES and x.layout is torch.strided and not x.is_nested


def _why_not_call(layer, x: Tensor, adapters: list[Adapter]) -> str | None:
    """None if PEFT would compute this call's adapters in dtypes that the operators support, else the reason.

    Without autocast: adapters in the dtype of the activations, or fp32 masters of 16-bit activations (which
    PEFT may cast). With autocast: everything but fp64.
    """
    if not is_dense(x) or not x.is_floating_point():
        return why_not_dense("input", x) or "the input is nested"
    autocast = is_autocast(x.device.type)
    if autocast and x.device.type not in AUTOCAST:
        return f"autocast on {x.device.type}"
    for lora_A, lora_B, *_ in adapters:
        if autocast:
            fits = torch.float64 not in (x.dtype, lora_A.dtype, lora_B.dtype)
        else:
            is_master = lora_A.dtype == torch.float32 and x.dtype in SIXTEEN_BIT
            fits = lora_A.dtype == x.dtype or (is_master and layer.cast_input_dtype_enabled)
            fits = fits and lora_A.dtype == lora_B.dtype
        if not fits:
            return f"an input of {x.dtype} with lora_A of {lora_A.dtype} and lora_B of {lora_B.dtype}"
    return None


# ---------------------------------------------------------------------------------------------------
# embeddings
# ---------------------------------------------------------------------------------------------------


@dataclass
class Embedded(OnOperators):
    """The base layer is called, and the adapter's rows, one operator, are added to its output.

    Attributes:
        layer: PEFT's layer.
        adapter: Its active adapter.
    """

    layer: nn.Module
    adapter: Adapter

    def __call__(self, x: Tensor) -> Tensor:
        lora_A, lora_B, scaling, *_ = self.adapter
        result = self.layer.base_layer(x)
        update = embedding(x, lora_A, lora_B, scaling, self.layer.base_layer.padding_idx, None)
        embed_scale = self.layer._get_embed_scale()  # Gemma's embeddings scale their output
        if embed_scale is not None:
            update = update * embed_scale.to(update.dtype)
        return (result + update).to(result.dtype)

    def explained(self, x: Input | None) -> tuple[str, str]:
        why = runtime.why_unavailable(self.adapter.lora_A.device)
        return REFERENCE, why or "embeddings have no kernels"


def _embedded(layer, adapter: Adapter, x: Tensor | None) -> Embedded | OnPeft:
    """How an embedding runs with its active adapter; x are the indices."""
    reason = None if x is None else _why_not_indices(x, adapter.lora_A, adapter.lora_B)
    return Embedded(layer, adapter) if reason is None else OnPeft(reason)


def _why_not_indices(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> str | None:
    """PEFT computes an embedding's adapter in the adapter's dtype or autocast's."""
    if not is_dense(x):
        return "indices that are not a plain tensor"
    if is_autocast(x.device.type):
        if x.device.type not in AUTOCAST:
            return f"autocast on {x.device.type}"
        fits = torch.float64 not in (lora_A.dtype, lora_B.dtype)
    else:
        fits = lora_A.dtype == lora_B.dtype
    return None if fits else f"lora_A of {lora_A.dtype} and lora_B of {lora_B.dtype}"


linear_forward = decided(decide, may_be_cpp=True)
embedding_forward = decided(decide)
