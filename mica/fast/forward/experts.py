"""The forward of a layer of experts whose parameters have MiCA or LoRA adapters, without forming W + s·B·A.

PEFT wraps the module of experts in one `lora.ParamWrapper` for each adapted parameter. Where that module is
one of transformers' (it dispatches through the registry of experts functions), the outermost wrapper's
forward is that of the registry's grouped function, on `mica.ops.experts`. Anything else is PEFT's path, which
forms the whole stack in every forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from mica.dtypes import FLOATING, SIXTEEN_BIT
from mica.fast.forward import expert_params, layer_calls
from mica.fast.forward.decide import decided, is_dense
from mica.fast.forward.eligibility import (
    Adapter,
    Choices,
    OnOperators,
    OnPeft,
    adapter_weights,
    adapters_of,
    depends_on_call,
    has_global_hooks,
    is_lora,
    is_mica,
    why_not_active,
    why_not_covered,
    why_not_frozen,
    why_not_state,
    why_not_trained,
)
from mica.fast.forward.layer_calls import Input
from mica.fast.frameworks import home_of
from mica.fast.settings import compute_dtype
from mica.ops.experts import experts_base, experts_linear
from mica.ops.operator import AUTOCAST, is_autocast
from mica.ops.routing import from_experts, route
from mica.paths import choose
from mica.paths.products import is_transformed


@dataclass
class Projection(OnOperators):
    """One projection of all experts.

    Attributes:
        name: The name of the module's parameter.
        weight: The parameter as (E, out_features, in_features).
        bias: (E, out_features), or None.
        adapter: The adapter, with lora_A (E, rank, in_features) and lora_B (E, out_features, rank), or None.
        dtype: The dtype in which transformers multiplies x by the weight.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    adapter: Adapter | None
    dtype: torch.dtype

    def __call__(self, x: Tensor, offsets: Tensor, *tokens_and_inverse: Tensor) -> Tensor:
        x = x.to(self.dtype)
        follows = self.dtype is self.weight.dtype  # else autocast, whose rule is not the grouped function's
        with nullcontext() if follows else torch.autocast(x.device.type, enabled=False):
            if self.adapter is None:
                return experts_base(x, offsets, self.weight, self.bias, *tokens_and_inverse)
            lora_A, lora_B, scaling, _, trains_B = self.adapter
            dtype = compute_dtype(self.dtype, lora_A.dtype) if follows else None
            operands = self.weight, lora_A, lora_B, scaling, self.bias, dtype
            return experts_linear(x, offsets, *operands, *(tokens_and_inverse or (None, None)), trains_B)

    def choices(self, x: Input | None) -> Choices:
        lora_A, lora_B, *_ = self.adapter
        follows = self.dtype is self.weight.dtype
        product_dtype = (compute_dtype(self.dtype, lora_A.dtype) if follows else None) or self.dtype
        dtypes = (self.dtype, product_dtype, lora_A.dtype, lora_B.dtype)
        lora = choose.LORA if self.adapter.trains_B else ""
        for function in (f"{lora}experts_linear", f"{lora}experts_linear_backward"):
            yield function, choose.choice_of(function, lora_A.device, lora_A.shape[1], dtypes)


@dataclass
class Experts(OnOperators):
    """A module of experts: transformers' grouped_mm_experts_forward.

    Attributes:
        module: The module.
        wrappers: PEFT's wrappers around the module, from the outermost on.
        projections: The one into the experts' hidden features, and the one out of them.
        routing: top_k_index and top_k_weights, each (num_tokens, top_k).
    """

    module: nn.Module
    wrappers: list[nn.Module]
    projections: list[Projection]
    routing: tuple[Tensor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """x (num_tokens, hidden) -> (num_tokens, hidden)."""
        for wrapper in self.wrappers[1:]:
            layer_calls.note(wrapper)
        module = self.module
        first, down = self.projections
        top_k_index, top_k_weights = self.routing
        routing = route(top_k_index, down.weight.shape[0])
        hidden = first(x, routing.offsets, routing.tokens, routing.inverse)
        hidden = module._apply_gate(hidden) if _has_gate(module) else module.act_fn(hidden)
        hidden = down(hidden, routing.offsets)
        if getattr(module, "has_post_expert_norm", False):
            hidden = module.post_expert_norm(hidden)
        return from_experts(hidden, top_k_weights, routing).to(x.dtype)


@moe.use_experts_implementation
class _Probe(nn.Module):
    """What transformers' decorator makes of a class: every forward that dispatches has this one's code."""

    def __init__(self, config):
        super().__init__()

    def forward(self):
        raise NotImplementedError


_DISPATCHING = _Probe.forward.__code__
# The registry's functions whose formula `Experts` has, as they are at import.
_KNOWN = (moe.grouped_mm_experts_forward, moe.batched_mm_experts_forward)


def _has_gate(module: nn.Module) -> bool:
    return getattr(module, "has_gate", True)  # before transformers 5.4 all had one


def _names(module: nn.Module) -> tuple[str, str]:
    """The projections into the experts' hidden features and out of them."""
    return "gate_up_proj" if _has_gate(module) else "up_proj", "down_proj"


def decide(outermost, x: Tensor | None = None, *args, **kwargs) -> Experts | OnPeft:
    """How the experts inside nested wrappers run; read anew at every call, as `eligibility.read_adapters`."""
    if has_global_hooks():
        return OnPeft("hooks on all modules")
    module, wrappers, adapters = outermost, [], {}
    while expert_params.is_wrapper(module):
        adapter = _read_wrapper(module)
        if type(adapter) is str:
            return OnPeft(adapter)
        if adapter is not None:
            adapters[module.parameter_name] = adapter
        wrappers.append(module)
        module = module._modules["base_layer"]
    if not adapters:
        return OnPeft(why_not_active(outermost))
    if any(depends_on_call(inner) for inner in (*wrappers[1:], module)):
        return OnPeft("hooks on the experts, or a forward of their own (offloading or another patch)")
    reason = _why_not_module(module, adapters)
    if reason is not None:
        return OnPeft(reason)
    chosen = _implementation(module)
    if type(chosen) is str:
        return OnPeft(chosen)
    projections = [_projection(module, name, adapters.get(name), chosen) for name in _names(module)]
    if x is not None:
        reason = _why_not_call(module, projections, chosen, x, args, kwargs)
    return OnPeft(reason) if reason else Experts(module, wrappers, projections, args)


def decide_one(wrapper, outermost) -> Projection | OnPeft:
    """`decide` for the parameter that one of the wrappers adapts, for `mica.fast.explain`."""
    if not adapters_of(wrapper):
        return OnPeft(why_not_active(wrapper))
    how = decide(outermost)
    if type(how) is OnPeft:
        return how
    return next(projection for projection in how.projections if projection.name == wrapper.parameter_name)


def _projection(module: nn.Module, name: str, adapter: Adapter | None, implementation) -> Projection:
    weight = module._parameters[name]
    dtype, device_type = weight.dtype, weight.device.type
    if implementation is not moe.grouped_mm_experts_forward and is_autocast(device_type):
        dtype = torch.get_autocast_dtype(device_type)  # F.linear and bmm follow it
    bias = module._parameters[f"{name}_bias"] if module.has_bias else None
    return Projection(name, weight.transpose(1, 2) if module.is_transposed else weight, bias, adapter, dtype)


def _read_wrapper(wrapper) -> Adapter | str | None:
    """The wrapper's one active adapter, None if it has none, or why it cannot run."""
    reason = why_not_state(wrapper)
    if reason is not None:
        return reason
    names = adapters_of(wrapper)
    if not names:
        return None
    if len(names) > 1:
        return f"experts with several active adapters, {names}"
    (name,) = names
    trains_B = is_lora(wrapper, name)
    if not trains_B and not is_mica(wrapper, name):
        return why_not_covered(wrapper, name)
    if not expert_params.is_stack(wrapper):
        return f"{wrapper.parameter_name} is not a stack of experts: PEFT adds s·B·A to it"
    scaling = wrapper.scaling[name]
    if type(scaling) is not float:
        return "its scaling is not a number"
    lora_A, lora_B = adapter_weights(wrapper, name)
    if lora_A.dtype != lora_B.dtype:
        return "lora_A and lora_B differ in dtype"
    reason = why_not_trained("lora_A", lora_A)
    reason = reason or (why_not_trained if trains_B else why_not_frozen)("lora_B", lora_B)
    if reason is not None:
        return reason
    views = expert_params.lora_A_of(wrapper, name), expert_params.lora_B_of(wrapper, name)
    return Adapter(*views, scaling, 0.0, trains_B)


def _why_not_module(module: nn.Module, adapters: dict[str, Adapter]) -> str | None:
    function = type(module).forward
    if getattr(function, "__code__", None) is not _DISPATCHING:
        return f"{type(module).__name__} does not use transformers' experts interface"
    if getattr(module, "_is_expert_parallel", False):
        return "expert parallelism"
    for name in adapters.keys() - set(_names(module)):
        return f"an adapter on {name}"
    for name in _names(module):
        if name not in module._parameters:
            return f"{name} is not a plain parameter"
        weight = module._parameters[name]
        reason = why_not_frozen(name, weight)
        if reason is None and weight.dtype not in FLOATING:
            reason = f"{name} has dtype {weight.dtype}"
        if reason is None and module.has_bias:
            reason = why_not_frozen(f"{name}_bias", module._parameters.get(f"{name}_bias"))
        if reason:
            return reason
    return None


def _implementation(module: nn.Module) -> Callable | str | None:
    """The function that transformers would run; None for the class's own forward, or why neither is known.

    Only transformers' classes are taken to have that formula in their own forwards: nobody else's need
    have. Most of them state the gate instead of calling ``_apply_gate``, which may have been replaced.
    """
    name, function = module.config._experts_implementation, type(module).forward
    cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
    interface = cells["experts_interface"].cell_contents if "experts_interface" in cells else None
    chosen = (interface or moe.ALL_EXPERTS_FUNCTIONS).get(name)  # before 5.4 there was one interface
    if chosen in _KNOWN:
        return chosen
    if chosen is not None or name not in (None, "eager"):
        return f"experts_implementation={name!r}"
    own = cells["original_forward"].cell_contents
    if not home_of(own).startswith("transformers.models."):
        return f"{type(module).__name__}, none of transformers' classes, has a forward of its own"
    if _has_gate(module) and "_apply_gate" not in own.__code__.co_names:
        is_known = home_of(module._apply_gate).startswith("transformers.")
        return None if is_known else f"an _apply_gate that {type(module).__name__}'s forward does not call"
    return None


def _why_not_call(
    module: nn.Module, projections: list[Projection], implementation, x: Tensor, args: tuple, kwargs: dict
) -> str | None:
    """Why this call is PEFT's: arguments, shapes or dtypes that the operators do not support."""
    if len(args) != 2 or kwargs:
        return "a call with other arguments than x, the experts and their weights"
    top_k_index, top_k_weights = args
    if not is_dense(x) or x.dim() != 2 or not x.is_floating_point():
        return "an input that is no plain matrix of floating-point numbers"
    if top_k_weights.shape != top_k_index.shape:  # some had weights of all experts, before 5.4
        return "router weights that are not one for each expert of a token"
    if not torch.compiler.is_compiling() and is_transformed():
        return "torch.func or forward-mode differentiation"

    is_grouped = implementation is moe.grouped_mm_experts_forward
    autocast = is_autocast(x.device.type) and not is_grouped
    if autocast and x.device.type not in AUTOCAST:
        return f"autocast on {x.device.type}"
    if autocast and implementation is None and module.has_bias:
        return "biases under autocast, which transformers' eager forward adds in fp32"
    for projection in projections:
        reason = _why_not_dtypes(projection, x.dtype, autocast, is_grouped)
        if reason is not None:
            return reason
    return None


def _why_not_dtypes(
    projection: Projection, dtype: torch.dtype, autocast: bool, is_grouped: bool
) -> str | None:
    weight_dtype = projection.weight.dtype
    if is_grouped:
        fits = True  # a mixture of dtypes is cast to the weight's
    elif autocast:
        fits = torch.float64 not in (dtype, weight_dtype)
    else:
        fits = dtype == weight_dtype
    if not fits:
        return f"an input of {dtype} with {projection.name} of {weight_dtype}"
    if projection.adapter is None:
        return None
    adapter_dtype = projection.adapter.lora_A.dtype
    is_master = adapter_dtype == torch.float32 and projection.dtype in SIXTEEN_BIT
    if adapter_dtype != projection.dtype and not is_master:
        return f"products in {projection.dtype} with lora_A of {adapter_dtype}"
    return None


experts_forward = decided(decide)
