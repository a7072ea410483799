"""Which layers may run on this backend. Every other layer runs PEFT's own code, and the reason is reported.

Where nothing depends on the base layer being called, its weight is read directly (`why_called` is None): base
product and adapter are one operator. The checks are cheap (see bench), free of side effects and traceable by
torch.compile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import variants
from torch import nn
from torch._C import _get_tracing_state
from torch.fx._symbolic_trace import is_fx_tracing
from torch.nn import functional
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from mica.dtypes import SIXTEEN_BIT
from mica.fast.forward import tensor_parallel
from mica.fast.forward.tensor_parallel import local
from mica.ops.dispatch import PLAIN

# None if PEFT has moved them: `patching` then warns, and nothing here is reached.
MiCALinearVariant = getattr(variants, "MiCALinearVariant", None)
MiCAEmbeddingVariant = getattr(variants, "MiCAEmbeddingVariant", None)
_VARIANTS = (MiCALinearVariant, MiCAEmbeddingVariant)


def own(cls: type[nn.Module], name: str = "forward") -> Callable | None:
    """The method as its class defines it; None if it had been replaced before this import."""
    method = getattr(cls, name)
    known = getattr(method, "__globals__", None) is vars(sys.modules[cls.__module__])
    return method if known else None


# What the operators compute. Code that replaces one of these for all modules expects its own to run.
FORWARDS = {cls: own(cls) for cls in (nn.Linear, Conv1D, nn.Identity, nn.Dropout)}
CALL = own(nn.Module, "__call__")  # the classes inherit it
LINEAR = torch._C._nn.linear  # functional.linear

# PEFT's layer classes over quantised weights, added when first used: importing them needs their
# libraries. Emptied once PEFT has its functions back.
quantised_layers: set[type] = set()


def requests_mica(config) -> bool:
    """Whether PEFT's configuration requests MiCA, in any spelling."""
    kind = getattr(config, "init_lora_weights", None)
    return isinstance(kind, str) and kind.lower() == "mica"


def is_mica(layer: nn.Module, name: str) -> bool:
    """Whether the named adapter is MiCA on this layer; False if it is not a LoRA layer."""
    return isinstance(layer, lora.LoraLayer) and type(layer.lora_variant.get(name)) in _VARIANTS


def class_of(layer: nn.Module) -> type[nn.Module]:
    """The layer's class; of one that is an FSDP2 unit, the class that `fully_shard` has derived its own from.

    While the forward of such a unit runs, its weights are gathered, plain tensors.
    """
    kind = type(layer)
    if kind.__name__.startswith("FSDP"):  # looked at first, because the import takes a second
        from torch.distributed.fsdp import FSDPModule

        if kind.__bases__[0] is FSDPModule:
            return kind.__bases__[1]
    return kind


def adapters_of(layer) -> list[str]:
    """The active adapters that this layer has, in their active order."""
    modules = layer._modules
    adapters = modules["lora_A"]._modules or modules["lora_embedding_A"]
    return [name for name in layer.active_adapters if name in adapters]


def adapter_weights(layer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B of one adapter, for any kind of layer."""
    if isinstance(layer, lora.Embedding):
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    modules = layer._modules
    return weight_of(modules["lora_A"]._modules[name]), weight_of(modules["lora_B"]._modules[name])


def weight_of(module: nn.Module, name: str = "weight") -> torch.Tensor | None:
    """``module.weight`` without `nn.Module.__getattr__`, which takes 0.5 µs."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def is_stored_transposed(layer) -> bool:
    """Whether the base weight is (in_features, out_features) or (num_embeddings, embedding_dim)."""
    return isinstance(layer, lora.Embedding) or getattr(layer, "fan_in_fan_out", False)


class Adapter(NamedTuple):
    """One adapter of a layer in its present state."""

    name: str
    lora_A: torch.Tensor  # (rank, in_features); of an embedding (rank, num_embeddings)
    lora_B: torch.Tensor  # (out_features, rank)
    scaling: float | torch.Tensor
    dropout_p: float  # 0 in eval mode


class Operands(NamedTuple):
    """The operands of `mica.ops.linear`, as the layer stores them."""

    weight: torch.Tensor  # (out_features, in_features); a Conv1D's is transposed
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float | torch.Tensor
    bias: torch.Tensor | None


def scaled(factor: torch.Tensor, scaling) -> tuple[torch.Tensor, float]:
    """lora_B (or lora_A), and the scaling as the number that the operators take.

    PEFT's compiled hotswap makes the scaling a tensor, so that a new value needs no new graph: then the
    factor is multiplied by it.
    """
    if isinstance(scaling, torch.Tensor):
        return factor * scaling.to(factor.dtype), 1.0
    return factor, float(scaling)


def why_not(layer, names: Sequence[str] | None = None) -> str | None:
    """None if the layer may run on this backend with these adapters (the active ones), else the reason."""
    adapters = read(layer, names)
    return adapters if isinstance(adapters, str) else None


def read(layer, names: Sequence[str] | None = None) -> list[Adapter] | str:
    """These adapters (the active ones) if the layer may run on this backend with them, else the reason.

    Nothing is cached: everything is read from the layer at every call, so the next call sees a hook, another
    dtype or a switched adapter. It takes 5 µs, since submodules and weights are not looked up through
    `nn.Module.__getattr__` (0.5 µs each) and missing attributes not at all (1.5 µs).
    """
    kind = class_of(layer)
    if kind is lora.Linear or kind in quantised_layers:
        read_one = _read_linear
    elif kind is lora.Embedding:
        read_one = _read_embedding
    else:
        return f"layers of type {kind.__module__}.{kind.__name__} are not covered"
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "the adapter is merged into the weight"
    if _get_tracing_state() is not None:  # a traced graph, say for ONNX, must run without this package
        return "torch.jit is tracing the model"
    if layer.__dict__.get("_tp_info") is not None:
        return "tensor parallelism of transformers before 5.17"
    reason = tensor_parallel.why_not(layer._modules["base_layer"])
    if reason is not None:
        return reason
    names = adapters_of(layer) if names is None else names
    if not names:
        return why_not_active(layer)
    adapters, scalings = [], layer.scaling
    for name in names:
        if not is_mica(layer, name):
            return f"adapter {name!r} is not MiCA"
        scaling = scalings[name]
        reason = None if type(scaling) is float else _why_not_scaling(scaling)
        adapter = reason or read_one(layer, name, scaling)
        if type(adapter) is str:
            return adapter
        adapters.append(adapter)
    if kind is lora.Embedding and len(names) > 1:
        return f"an embedding with several active adapters, {names}"
    return adapters


def why_not_active(layer) -> str:
    return f"none of the active adapters {list(layer.active_adapters)} is on this layer"


def _why_not_scaling(scaling) -> str | None:
    if isinstance(scaling, torch.Tensor):
        if scaling.requires_grad:
            return "its scaling is trained"
        return None if scaling.dim() <= 1 and scaling.numel() == 1 else "its scaling is more than one number"
    return None if isinstance(scaling, (float, int)) else "its scaling is neither a number nor a tensor"


def _read_linear(layer, name: str, scaling) -> Adapter | str:
    modules, base = layer._modules, layer._modules["base_layer"]
    lora_A, lora_B, dropout = (
        modules["lora_A"]._modules[name],
        modules["lora_B"]._modules[name],
        modules["lora_dropout"]._modules[name],
    )
    for factor in (lora_A, lora_B):
        if type(factor) is not nn.Linear:
            is_unit = class_of(factor) is not type(factor)  # its weight is gathered at its own call only
            return f"the adapter's modules are {'FSDP units' if is_unit else 'not plain nn.Linear'}"
    dropout_p = 0.0
    if type(dropout) is not nn.Identity:
        if type(dropout) is not nn.Dropout:
            return f"dropout of type {type(dropout).__name__}"
        if dropout.p >= 1.0:
            return "lora_dropout of 1"
        if dropout.training:
            dropout_p = dropout.p
    if weight_of(lora_B, "bias") is not None:
        return "lora_bias=True"
    if weight_of(lora_A, "bias") is not None:
        return "a bias on the lora_A"
    if global_hooks():
        return "global module hooks are registered"
    if functional.linear is not LINEAR:
        return "somebody has replaced torch.nn.functional.linear"
    A, B = local(base, weight_of(lora_A)), local(base, weight_of(lora_B))
    plan = tensor_parallel.plan_of(base)
    return (
        _why_not_read_directly("lora_A", lora_A, plan == "rowwise")
        or _why_not_read_directly("lora_B", lora_B, plan == "colwise")
        or _why_not_read_directly("lora_dropout", dropout)
        or why_not_trained(A)
        or why_not_frozen("lora_B", B)
        or Adapter(name, A, B, scaling, dropout_p)
    )


def why_called(layer) -> str | None:
    """None if the base weight of a linear layer may be read, and so fused; else why the base is called.

    Whatever depends on that call (quantisation, hooks, offloading, a trained weight) then works as it does
    without an adapter, and the adapter's two products are added to its output.
    """
    base = layer._modules["base_layer"]
    if class_of(layer) is not lora.Linear or (type(base) is not nn.Linear and type(base) is not Conv1D):
        return f"a base layer of type {type(base).__name__}"
    return (
        _why_not_read_directly("base layer", base, tensor_parallel.plan_of(base) is not None)
        or why_not_frozen("base weight", local(base, weight_of(base)))
        or why_not_frozen("base bias", local(base, weight_of(base, "bias")))
    )


def _read_embedding(layer, name: str, scaling) -> Adapter | str:
    base = layer.base_layer
    if not isinstance(base, nn.Embedding):
        return f"a base layer of type {type(base).__name__}"
    if base.max_norm is not None:
        return "an embedding with max_norm"
    if base.scale_grad_by_freq or base.sparse:
        return "an embedding with scale_grad_by_freq or sparse gradients"
    if layer.input_fns or layer.output_fns:
        return "tensor parallelism"
    lora_A, lora_B = adapter_weights(layer, name)
    return (
        _why_not_plain("base weight", base.weight)
        or why_not_trained(lora_A)
        or why_not_frozen("lora_B", lora_B)
        or Adapter(name, lora_A, lora_B, scaling, 0.0)
    )


def depends_on_call(module: nn.Module) -> bool:
    """Whether calling the module does more than, or something other than, its class's forward."""
    return _has_hooks(module) or "forward" in module.__dict__


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _why_not_read_directly(part: str, module: nn.Module, is_sharded: bool = False) -> str | None:
    """Why the module has to be called: its formula alone would not do what a call does.

    is_sharded: tensor parallelism has put a style in the place of its forward.
    """
    kind = type(module)
    if _has_hooks(module):
        return f"hooks on the {part}"
    if is_sharded and not tensor_parallel.is_styled(module, kind.forward):
        return f"the {part} has another forward than that of its tensor-parallel plan"
    if "forward" in module.__dict__ and not is_sharded:
        return f"the {part} has a forward of its own (offloading or another patch)"
    if kind.forward is not FORWARDS[kind]:
        return f"somebody has replaced {kind.__name__}.forward"
    if kind.__call__ is not CALL and not is_fx_tracing():  # which replaces it meanwhile, `make_fx` too
        owner = kind if nn.Module.__call__ is CALL else nn.Module
        return f"somebody has replaced {owner.__name__}.__call__"
    return None


def global_hooks() -> bool:
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def _why_not_plain(part: str, tensor: torch.Tensor) -> str | None:
    if type(tensor) not in PLAIN:
        return f"the {part} is a {type(tensor).__name__}, not a plain tensor"
    if tensor.is_meta or hasattr(tensor, "ds_id"):
        return f"the {part} is offloaded or partitioned"
    if not tensor.is_floating_point():
        return f"the {part} has dtype {tensor.dtype}"
    if tensor.layout is not torch.strided:
        return f"the {part} has layout {tensor.layout}"
    return None


def why_not_trained(lora_A: torch.Tensor) -> str | None:
    reason = _why_not_plain("lora_A", lora_A)
    if reason is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return reason
    return "the lora_A was made in inference mode" if lora_A.is_inference() else None  # it gets no gradient


def why_not_frozen(part: str, tensor: torch.Tensor | None) -> str | None:
    if tensor is None:
        return None
    reason = _why_not_plain(part, tensor)
    return f"the {part} is trainable" if reason is None and tensor.requires_grad else reason


def is_plain(x: torch.Tensor) -> bool:
    """Not nested, sparse, mkldnn or of a tensor subclass."""
    return type(x) in PLAIN and x.layout is torch.strided and not x.is_nested


def _why_not_call(layer, x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> str | None:
    """None if PEFT would compute this call's adapter in a dtype that the operators support, else the reason.

    Without autocast: adapters in the dtype of the activations, or fp32 masters of 16-bit activations (which
    PEFT may cast). With autocast: everything but fp64.
    """
    if not is_plain(x) or not x.is_floating_point():
        return _why_not_plain("input", x) or "the input is nested"
    if torch.is_autocast_enabled(x.device.type):
        fits = torch.float64 not in (x.dtype, lora_A.dtype, lora_B.dtype)
    else:
        is_master = lora_A.dtype == torch.float32 and x.dtype in SIXTEEN_BIT
        fits = lora_A.dtype == x.dtype or (is_master and layer.cast_input_dtype_enabled)
        fits = fits and lora_A.dtype == lora_B.dtype
    if fits:
        return None
    return f"an input of {x.dtype} with lora_A of {lora_A.dtype} and lora_B of {lora_B.dtype}"


def adapters_for(layer, x: torch.Tensor, names: Sequence[str] | None = None) -> list[Adapter] | str:
    """`read` of a linear layer; the reason also if it may not run on this backend on this x."""
    adapters = read(layer, names)
    if type(adapters) is not str:
        for adapter in adapters:
            reason = _why_not_call(layer, x, adapter.lora_A, adapter.lora_B)
            if reason is not None:
                return reason
    return adapters


def runs_adapter(layer) -> bool:
    """Whether PEFT's own code runs an adapter here: one is active, and not merged."""
    return not layer.disable_adapters and not layer.merged and bool(adapters_of(layer))


def fused_operands(layer, x: torch.Tensor, adapter: Adapter) -> Operands | None:
    """For base product and adapter in one operator; None where the base layer has to be called."""
    base = layer._modules["base_layer"]
    if why_called(layer) is not None:
        return None
    weight = local(base, weight_of(base))
    if torch.is_autocast_enabled(x.device.type):  # which gives x and the weight one dtype
        fuses = weight.dtype != torch.float64
    else:
        fuses = x.dtype == weight.dtype
    _, lora_A, lora_B, scaling, _ = adapter
    return Operands(weight, lora_A, lora_B, scaling, local(base, weight_of(base, "bias"))) if fuses else None


def why_not_embedding(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> str | None:
    """`_why_not_call` for an embedding: PEFT computes its adapter in the adapter's dtype or autocast's."""
    if not is_plain(x):
        return "indices that are not a plain tensor"
    if torch.is_autocast_enabled(x.device.type):
        fits = torch.float64 not in (lora_A.dtype, lora_B.dtype)
    else:
        fits = lora_A.dtype == lora_B.dtype
    return None if fits else f"lora_A of {lora_A.dtype} and lora_B of {lora_B.dtype}"
