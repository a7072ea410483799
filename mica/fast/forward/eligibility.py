"""Which layers may run on this backend. Every other layer runs PEFT's own code, and the reason is reported.

What is decided about a call, `OnPeft` or `OnOperators` with all that they need, is what the layer's forward
runs and what `mica.fast.explain` prints. Where nothing depends on the base layer being called, its weight is
read directly (`read_base`). The checks are cheap (see bench), free of side effects and traceable by
torch.compile.

In mica/native/check.h C++ recognises a layer to which no reason applies: a new reason goes there too, and
its case into `CHANGES` of tests/support/layer_changes.py, whose layers are linear. One of embeddings gets a
test in tests/mica/fast/test_eligibility.py. Experts have reasons of their own, in experts.py, with cases in
tests/mica/fast/test_experts_eligibility.py. The list for users is under Limits in mica/fast/README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch._C import _get_tracing_state
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._symbolic_trace import is_fx_tracing
from torch.nn import functional
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from mica.fast import known_peft
from mica.fast.forward import tensor_parallel
from mica.fast.forward.layer_calls import Input
from mica.fast.settings import settings
from mica.memory import LAYER_TYPES
from mica.paths import choose

# None if PEFT has moved them: `patching` then warns, and nothing here is reached.
MiCALinearVariant = getattr(variants, "MiCALinearVariant", None)
MiCAEmbeddingVariant = getattr(variants, "MiCAEmbeddingVariant", None)
_VARIANTS = (MiCALinearVariant, MiCAEmbeddingVariant)


# The paths of a layer, each better than the one after it.
KERNEL, PEFT = "kernel", "peft"
REFERENCE, ERROR = choose.REFERENCE, choose.ERROR


# Each function of `mica.paths` that a forward and its backward call, and how it runs
Choices = Iterator[tuple[str, choose.Choice]]


class OnPeft(NamedTuple):
    """PEFT's own code runs.

    Attributes:
        reason: Why, in words.
    """

    reason: str

    def explained(self, x: Input | None) -> tuple[str, str]:
        return PEFT, self.reason


class OnOperators:
    """The operators of `mica.ops` run: an instance is called with the layer's x."""

    why_called: str | None = None  # why the base layer is called, instead of its weight being read

    def choices(self, x: Input | None) -> Choices:
        """x: what is known of a call's x; None: nothing."""
        raise NotImplementedError

    def why_python(self, x: Input | None) -> str | None:
        """Why C++ never calls this layer on the reference path; None where it may."""
        return None

    def explained(self, x: Input | None) -> tuple[str, str]:
        """The path, and why it is not the one before it in the list above, or what was measured of it."""
        reasons = []
        path = KERNEL
        for function, choice in self.choices(x):
            is_backward = function.endswith("_backward")
            said = choice.reason or choice.measured
            if said is not None:
                reasons.append(f"in the backward: {said}" if is_backward else str(said))
            if choice.reason is not None:
                path = ERROR if choice.form == ERROR else REFERENCE
                why_python = self.why_python(x)
                if path == REFERENCE and not is_backward and why_python is not None:
                    reasons.append(f"called from Python: {why_python}")
                break
        if self.why_called:
            reasons.append(f"base layer called: {self.why_called}")
        return path, "; ".join(reasons)


def own(cls: type[nn.Module], name: str = "forward") -> Callable | None:
    """The method as its class defines it; None if it had been replaced before this import."""
    method = getattr(cls, name)
    known = getattr(method, "__globals__", None) is vars(sys.modules[cls.__module__])
    return method if known else None


# What the operators compute. Code that replaces one of these for all modules expects its own to run.
_REPEATED = nn.Linear, Conv1D, nn.Identity, nn.Dropout, DoraLinearLayer
FORWARDS = {cls: own(cls) for cls in _REPEATED}
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


def is_lora(layer: nn.Module, name: str) -> bool:
    """Whether the named adapter is plain LoRA, which may train lora_B, and the settings include that."""
    return settings.lora and name not in layer.lora_variant and not isinstance(layer, lora.Embedding)


def is_dora(layer: nn.Module, name: str) -> bool:
    """Whether the named adapter is DoRA on a linear layer, and the settings include that."""
    is_included = settings.lora and known_peft.DORA not in known_peft.left
    return is_included and type(layer.lora_variant.get(name)) is variants.DoraLinearVariant


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


def adapter_weights(layer, name: str) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of one adapter, for any kind of layer."""
    if isinstance(layer, lora.Embedding):
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    modules = layer._modules
    return weight_of(modules["lora_A"]._modules[name]), weight_of(modules["lora_B"]._modules[name])


def weight_of(module: nn.Module, name: str = "weight") -> Tensor | None:
    """``module.weight`` without `nn.Module.__getattr__`, which takes 0.5 µs."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def is_stored_transposed(layer) -> bool:
    """Whether the base weight is (in_features, out_features) or (num_embeddings, embedding_dim)."""
    return isinstance(layer, lora.Embedding) or getattr(layer, "fan_in_fan_out", False)


class Adapter(NamedTuple):
    """One adapter of a layer in its present state.

    Attributes:
        lora_A: (rank, in_features); of an embedding (rank, num_embeddings).
        lora_B: (out_features, rank).
        scaling: lora_alpha / rank.
        dropout_p: The probability with which an element of x is dropped; 0 in eval mode.
        trains_B: Whether lora_B may be trained, now or later, as in plain LoRA.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    trains_B: bool = False


def _adapter(
    lora_A: Tensor, lora_B: Tensor, scaling, dropout_p: float = 0.0, trains_B: bool = False
) -> Adapter:
    """PEFT's compiled hotswap makes the scaling a tensor, so that a new value needs no new graph: then lora_A
    is multiplied by it. The B that several adapters share stays as it is.

    In fp32 at least: a scaling that is rounded to bf16 is off by up to 0.4 %, and so is the whole update.
    """
    if isinstance(scaling, Tensor):
        wide = torch.promote_types(lora_A.dtype, torch.float32)
        scaled = lora_A.to(wide) * scaling.to(wide)
        return Adapter(scaled.to(lora_A.dtype), lora_B, 1.0, dropout_p, trains_B)
    return Adapter(lora_A, lora_B, float(scaling), dropout_p, trains_B)


def read_adapters(layer) -> list[Adapter] | str:
    """The active adapters if the layer may run on this backend with them, else the reason.

    Nothing is cached: everything is read from the layer at every call, so the next call sees a hook, another
    dtype or a switched adapter. It takes 5 µs, since submodules and weights are not looked up through
    `nn.Module.__getattr__` (0.5 µs each) and missing attributes not at all (1.5 µs).
    """
    kind = class_of(layer)
    if kind is lora.Linear or kind in quantised_layers:
        read = _read_linear
    elif kind is lora.Embedding:
        read = _read_embedding
    else:
        return f"layers of type {kind.__module__}.{kind.__name__} are not covered"
    reason = why_not_state(layer)
    if reason is not None:
        return reason
    names = adapters_of(layer)
    if not names:
        return why_not_active(layer)

    adapters = []
    for name in names:
        if not is_mica(layer, name) and not is_lora(layer, name) and not is_dora(layer, name):
            return why_not_covered(layer, name)
        if len(names) > 1 and is_dora(layer, name):
            return f"several active adapters, {names}, of which {name!r} is DoRA"
        scaling = layer.scaling[name]
        reason = None if type(scaling) is float else _why_not_scaling(scaling)
        if reason is not None:
            return reason
        adapter = read(layer, name, scaling)
        if type(adapter) is str:
            return adapter
        adapters.append(adapter)
    if kind is lora.Embedding and len(names) > 1:
        return f"an embedding with several active adapters, {names}"
    return adapters


def why_not_covered(layer, name: str) -> str:
    """Why an adapter is PEFT's that is neither MiCA nor, with ``lora=True``, plain LoRA or DoRA."""
    variant = layer.lora_variant.get(name)
    if type(variant) is variants.DoraLinearVariant and not settings.lora:
        return f"adapter {name!r} is DoRA, which mica.fast.enable(lora=True) includes"
    if variant is not None:
        return f"adapter {name!r} is of PEFT's variant {type(variant).__name__}"
    if isinstance(layer, lora.Embedding):
        return f"adapter {name!r} is LoRA on an embedding"
    return f"adapter {name!r} is LoRA, which mica.fast.enable(lora=True) includes"


def why_not_state(layer) -> str | None:
    """Why no adapter of the layer runs on this backend now, whichever are active."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "the adapter is merged into the weight"
    if _get_tracing_state() is not None:  # a traced graph, say for ONNX, must run without this package
        return "torch.jit is tracing the model"
    is_split = tensor_parallel.plan_of(layer._modules["base_layer"]) is not None
    if is_split or layer.__dict__.get("_tp_info") is not None:  # the second before transformers 5.17
        return "tensor parallelism"
    return None


def why_not_active(layer) -> str:
    return f"none of the active adapters {list(layer.active_adapters)} is on this layer"


def _why_not_scaling(scaling) -> str | None:
    if isinstance(scaling, Tensor):
        if scaling.requires_grad:
            return "its scaling is trained"
        return None if scaling.dim() <= 1 and scaling.numel() == 1 else "its scaling is more than one number"
    return None if isinstance(scaling, (float, int)) else "its scaling is neither a number nor a tensor"


def _read_linear(layer, name: str, scaling) -> Adapter | str:
    modules = layer._modules
    lora_A = modules["lora_A"]._modules[name]
    lora_B = modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    reason = (
        _why_not_factor("lora_A", lora_A) or _why_not_factor("lora_B", lora_B) or _why_not_dropout(dropout)
    )
    if reason is not None:
        return reason
    if has_global_hooks():
        return "global module hooks are registered"
    if functional.linear is not LINEAR:
        return "torch.nn.functional.linear has been monkey-patched"

    A = weight_of(lora_A)
    B = weight_of(lora_B)
    trains_B = not is_mica(layer, name)
    reason = (
        why_not_read_directly("lora_A", lora_A)
        or why_not_read_directly("lora_B", lora_B)
        or why_not_read_directly("lora_dropout", dropout)
        or why_not_trained("lora_A", A)
        or (why_not_trained if trains_B else why_not_frozen)("lora_B", B)
    )
    if reason is not None:
        return reason
    is_dropping = type(dropout) is nn.Dropout and dropout.training
    return _adapter(A, B, scaling, dropout.p if is_dropping else 0.0, trains_B)


def _why_not_factor(part: str, factor: nn.Module) -> str | None:
    if type(factor) is not nn.Linear:
        is_unit = class_of(factor) is not type(factor)  # its weight is gathered at its own call only
        return f"the adapter's modules are {'FSDP units' if is_unit else 'not plain nn.Linear'}"
    if weight_of(factor, "bias") is None:
        return None
    return "lora_bias=True" if part == "lora_B" else "a bias on the lora_A"


def _why_not_dropout(dropout: nn.Module) -> str | None:
    if type(dropout) is nn.Identity:
        return None
    if type(dropout) is not nn.Dropout:
        return f"dropout of type {type(dropout).__name__}"
    return None if 0.0 <= dropout.p < 1.0 else f"lora_dropout of {dropout.p:g}"


def read_magnitude(layer, name: str) -> Tensor | str:
    """The norms (out_features) that DoRA trains, or why PEFT's code has to run."""
    module = layer._modules["lora_magnitude_vector"]._modules[name]
    if type(module) is not DoraLinearLayer:
        return f"the adapter's magnitude is of type {type(module).__name__}"
    magnitude = weight_of(module)
    reason = why_not_read_directly("lora_magnitude_vector", module) or why_not_dense("magnitude", magnitude)
    if reason is not None:
        return reason
    device = weight_of(layer._modules["lora_A"]._modules[name]).device
    if magnitude.device != device:  # ephemeral_gpu_offload
        return f"the magnitude is on {magnitude.device}, and lora_A on {device}"
    return magnitude


def read_base(layer) -> tuple[Tensor, Tensor | None] | str:
    """(weight as (out_features, in_features), bias) of a linear layer, or why the base layer is called.

    Whatever depends on that call (quantisation, hooks, offloading, a trained weight) then works as it does
    without an adapter, and the adapter's two products are added to its output.
    """
    base = layer._modules["base_layer"]
    if class_of(layer) is not lora.Linear or (type(base) is not nn.Linear and type(base) is not Conv1D):
        return f"a base layer of type {type(base).__name__}"
    weight, bias = weight_of(base), weight_of(base, "bias")
    reason = (
        why_not_read_directly("base layer", base)
        or why_not_frozen("base weight", weight)
        or why_not_frozen("base bias", bias)
    )
    if reason is not None:
        return reason
    if type(base) is Conv1D:
        weight = weight.t()  # a view, no copy
    return weight, bias


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
    reason = (
        why_not_dense("base weight", base.weight)
        or why_not_trained("lora_A", lora_A)
        or why_not_frozen("lora_B", lora_B)
    )
    return _adapter(lora_A, lora_B, scaling) if reason is None else reason


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


def why_not_read_directly(part: str, module: nn.Module) -> str | None:
    """Why the module has to be called: its formula alone would not do what a call does."""
    kind = type(module)
    if _has_hooks(module):
        return f"hooks on the {part}"
    if "forward" in module.__dict__:
        return f"the {part} has a forward of its own (offloading or another patch)"
    if kind.forward is not FORWARDS[kind]:
        return f"{kind.__name__}.forward has been monkey-patched"
    if kind.__call__ is not CALL and not is_fx_tracing():  # which replaces it meanwhile, `make_fx` too
        owner = kind if nn.Module.__call__ is CALL else nn.Module
        return f"{owner.__name__}.__call__ has been monkey-patched"
    return None


# PyTorch's tables of hooks on all modules
GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def has_global_hooks() -> bool:
    return any(GLOBAL_HOOKS)


def why_not_dense(part: str, tensor: Tensor) -> str | None:
    # torch.export traces with fake tensors, and its program runs where this package is not
    is_exported = type(tensor) is FakeTensor and torch.compiler.is_exporting()
    if type(tensor) not in LAYER_TYPES or is_exported:
        return f"the {part} is a {type(tensor).__name__}, not a plain tensor"
    if hasattr(tensor, "ds_id"):
        return f"the {part} is partitioned"
    if not tensor.is_floating_point():
        return f"the {part} has dtype {tensor.dtype}"
    if tensor.layout is not torch.strided:
        return f"the {part} has layout {tensor.layout}"
    return None


def why_not_trained(part: str, factor: Tensor) -> str | None:
    if factor.dim() != 2:
        return f"the {part} is flat, as FSDP1 shards it (FSDP2 does not)"
    reason = why_not_dense(part, factor)
    if reason is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return reason
    return f"the {part} was made in inference mode" if factor.is_inference() else None  # it gets no gradient


def why_not_frozen(part: str, tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    reason = why_not_dense(part, tensor)
    return f"the {part} is trainable" if reason is None and tensor.requires_grad else reason


def runs_adapter(layer) -> bool:
    """Whether PEFT's own code runs an adapter in this forward: one is active, and not merged.

    Wrappers of parameters are nested: any of them counts.
    """
    while isinstance(layer, lora.LoraLayer):
        if not layer.disable_adapters and not layer.merged and adapters_of(layer):
            return True
        layer = layer._modules["base_layer"]
    return False
