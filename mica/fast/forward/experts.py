"""The forward of a layer of experts whose stacks have MiCA adapters, without forming W + s·B·A.

PEFT wraps the module of experts in one `lora.ParamWrapper` for each adapted parameter. Where that module is
one of transformers' (it dispatches through the registry of experts functions), the outermost wrapper's
forward is that of the registry's grouped function, on `mica.ops.experts`. Anything else is PEFT's path, which
forms the whole stack in every forward; `why_not` says why, or the call does (`calls.note_peft`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state
from transformers.integrations import moe

from mica.dtypes import FLOATING, SIXTEEN_BIT
from mica.fast.forward import call_counts, expert_params
from mica.fast.forward.eligibility import (
    adapter_weights,
    adapters_of,
    depends_on_call,
    global_hooks,
    is_mica,
    is_plain,
    runs_adapter,
    why_not_active,
    why_not_frozen,
    why_not_trained,
)
from mica.fast.settings import compute_dtype, settings
from mica.ops.dispatch import is_transformed
from mica.ops.experts import experts_linear
from mica.ops.routing import from_experts, route


class _Stack(NamedTuple):
    """One adapted stack of experts in its present state."""

    lora_A: Tensor  # (E, rank, in_features)
    lora_B: Tensor  # (E, out_features, rank)
    scaling: float


class Experts(NamedTuple):
    """A module of experts and its adapted stacks by the names of their parameters."""

    module: nn.Module
    stacks: dict[str, _Stack]
    wrappers: list[nn.Module]  # around the module, from the outermost on
    implementation: Callable | None  # transformers' function for them; None: the class's own forward


@moe.use_experts_implementation
class _Probe(nn.Module):
    """What transformers' decorator makes of a class: every forward that dispatches has this one's code."""

    def __init__(self, config):
        super().__init__()

    def forward(self):
        raise NotImplementedError


_DISPATCHING = _Probe.forward.__code__
# The registry's functions whose formula `_forward` is, as they are at import.
_KNOWN = (moe.grouped_mm_experts_forward, moe.batched_mm_experts_forward)


def forward(stock):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        reason = None
        if settings.enabled:
            experts = read(self)
            reason = experts if type(experts) is str else _why_not_call(experts, x, args, kwargs)
            if reason is None:
                return _forward(experts, x, *args)
        call_counts.note(self)
        if reason is not None and any(runs_adapter(wrapper) for wrapper in _wrappers(self)):
            call_counts.note_peft(self, reason)
        return stock(self, x, *args, **kwargs)

    return forward


def _forward(experts: Experts, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As transformers' grouped_mm_experts_forward.

    x (num_tokens, hidden), top_k_index and top_k_weights (num_tokens, top_k) -> (num_tokens, hidden).
    """
    for wrapper in experts.wrappers:
        call_counts.note(wrapper)
    module = experts.module
    routing = route(top_k_index, module._parameters["down_proj"].shape[0])
    hidden = _project(_first_of(module), experts, x, routing.offsets, routing.tokens, routing.inverse)
    hidden = module._apply_gate(hidden) if _has_gate(module) else module.act_fn(hidden)
    hidden = _project("down_proj", experts, hidden, routing.offsets)
    if getattr(module, "has_post_expert_norm", False):
        hidden = module.post_expert_norm(hidden)
    return from_experts(hidden, top_k_weights, routing).to(x.dtype)


def _has_gate(module: nn.Module) -> bool:
    return getattr(module, "has_gate", True)  # before transformers 5.4 all had one


def _first_of(module: nn.Module) -> str:
    return "gate_up_proj" if _has_gate(module) else "up_proj"


def _project(name: str, experts: Experts, x: Tensor, offsets: Tensor, *tokens_and_inverse: Tensor) -> Tensor:
    module, stack = experts.module, experts.stacks.get(name)
    weight = module._parameters[name]
    bias = module._parameters[f"{name}_bias"] if module.has_bias else None
    dtype = _product_dtype(experts, x, weight)
    x = x.to(dtype)
    if module.is_transposed:
        weight = weight.transpose(1, 2)
    if stack is None:  # not adapted: an adapter of rank 0
        num_experts, out_features, in_features = weight.shape
        sizes = (num_experts, 0, in_features), (num_experts, out_features, 0)
        stack = _Stack(*map(weight.new_empty, sizes), 1.0)
    operands = x, offsets, weight, *stack, bias
    if dtype is weight.dtype:
        return experts_linear(*operands, compute_dtype(x), *tokens_and_inverse)
    with torch.autocast(x.device.type, enabled=False):  # the operator's own rule is the grouped function's
        return experts_linear(*operands, None, *tokens_and_inverse)


def _product_dtype(experts: Experts, x: Tensor, weight: Tensor) -> torch.dtype:
    """In which transformers multiplies x by the stack: only F.linear and bmm follow autocast."""
    if experts.implementation is moe.grouped_mm_experts_forward:
        return weight.dtype
    is_on = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if is_on else weight.dtype


def _wrappers(outermost) -> list[nn.Module]:
    """Those around one module, from the outermost on."""
    found = []
    while expert_params.is_wrapper(outermost):
        found.append(outermost)
        outermost = outermost._modules["base_layer"]
    return found


def why_not(outermost) -> str | None:
    """None if the experts may run on this backend, else the reason; of all wrappers around the module."""
    experts = read(outermost)
    return experts if isinstance(experts, str) else None


def read(outermost) -> Experts | str:
    """The module of experts and its adapters if it may run on this backend, else the reason.

    Read again at every call, as `mica.fast.forward.eligibility.read`.
    """
    if _get_tracing_state() is not None:
        return "torch.jit is tracing the model"
    if global_hooks():
        return "hooks on all modules"
    stacks: dict[str, _Stack] = {}
    chain = _wrappers(outermost)
    for wrapper in chain:
        stack = _read_wrapper(wrapper)
        if type(stack) is str:
            return stack
        if stack is not None:
            stacks[wrapper.parameter_name] = stack
    if not stacks:
        return why_not_active(outermost)
    module = chain[-1]._modules["base_layer"]
    if any(depends_on_call(inner) for inner in (*chain[1:], module)):
        return "hooks on the experts, or a forward of their own (offloading or another patch)"
    reason = _why_not_module(module, stacks)
    if reason is not None:
        return reason
    chosen = _implementation(module)
    if type(chosen) is str:
        return chosen
    return Experts(module, stacks, chain, chosen)


def _read_wrapper(wrapper) -> _Stack | str | None:
    """The wrapper's one active adapter, None if it has none, or why it cannot run."""
    if wrapper.disable_adapters:
        return "adapters are disabled"
    if wrapper.merged:
        return "the adapter is merged into the weight"
    names = adapters_of(wrapper)
    if not names:
        return None
    if len(names) > 1:
        return f"experts with several active adapters, {names}"
    (name,) = names
    if not is_mica(wrapper, name):
        return f"adapter {name!r} is not MiCA"
    if not expert_params.is_stack(wrapper):
        return f"{wrapper.parameter_name} is not a stack of experts: PEFT adds s·B·A to it"
    scaling = wrapper.scaling[name]
    if type(scaling) is not float:
        return "its scaling is not a number"
    lora_A, lora_B = adapter_weights(wrapper, name)
    if lora_A.dtype != lora_B.dtype:
        return "lora_A and lora_B differ in dtype"
    return (
        why_not_trained(lora_A)
        or why_not_frozen("lora_B", lora_B)
        or _Stack(expert_params.lora_A_of(wrapper, name), expert_params.lora_B_of(wrapper, name), scaling)
    )


def _why_not_module(module: nn.Module, stacks: dict[str, _Stack]) -> str | None:
    function = type(module).forward
    if getattr(function, "__code__", None) is not _DISPATCHING:
        return f"{type(module).__name__} does not use transformers' experts interface"
    if module.__dict__.get("_hf_tp_plan") is not None:
        return "tensor parallelism"
    if getattr(module, "_is_expert_parallel", False):
        return "expert parallelism"
    projections = (_first_of(module), "down_proj")
    for name in stacks.keys() - set(projections):
        return f"an adapter on {name}"
    for name in projections:
        if name not in module._parameters:
            return f"{name} is not a plain parameter"
        reason = _why_not_parameters(module, name)
        if reason:
            return reason
    return None


def _why_not_parameters(module: nn.Module, name: str) -> str | None:
    weight = module._parameters[name]
    reason = why_not_frozen(name, weight)
    if reason is None and weight.dtype not in FLOATING:
        reason = f"{name} has dtype {weight.dtype}"
    if reason is None and module.has_bias:
        reason = why_not_frozen(f"{name}_bias", module._parameters.get(f"{name}_bias"))
    return reason


def _implementation(module: nn.Module) -> Callable | str | None:
    """The function that transformers would run; None for the class's own forward, or why neither is known.

    Of the classes' own forwards only those of transformers are taken for `_forward`'s formula: nobody else's
    need be. Most of them state the gate instead of calling ``_apply_gate``, which may have been replaced.
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
    if not _home(own).startswith("transformers.models."):
        return f"{type(module).__name__}, none of transformers' classes, has a forward of its own"
    if _has_gate(module) and "_apply_gate" not in own.__code__.co_names:
        is_known = _home(module._apply_gate).startswith("transformers.")
        return None if is_known else f"an _apply_gate that {type(module).__name__}'s forward does not call"
    return None


def _home(function: Callable) -> str:
    """The name of the module in which a function or a method was defined."""
    return getattr(function, "__globals__", {}).get("__name__", "")


def _why_not_call(experts: Experts, x: Tensor, args: tuple, kwargs: dict) -> str | None:
    """Why this call is PEFT's: arguments, shapes or dtypes that the operators do not support."""
    if len(args) != 2 or kwargs:
        return "a call with other arguments than x, the experts and their weights"
    top_k_index, top_k_weights = args
    if not is_plain(x) or x.dim() != 2 or not x.is_floating_point():
        return "an input that is no plain matrix of floating-point numbers"
    if top_k_weights.shape != top_k_index.shape:  # some had weights of all experts, before 5.4
        return "router weights that are not one for each expert of a token"
    if not torch.compiler.is_compiling() and is_transformed():
        return "torch.func or forward-mode differentiation"
    module, is_grouped = experts.module, experts.implementation is moe.grouped_mm_experts_forward
    autocast = torch.is_autocast_enabled(x.device.type) and not is_grouped
    if autocast and experts.implementation is None and module.has_bias:
        return "biases under autocast, which transformers' eager forward adds in fp32"
    for name in (_first_of(module), "down_proj"):
        weight, stack = module._parameters[name], experts.stacks.get(name)
        fits = torch.float64 not in (x.dtype, weight.dtype) if autocast else x.dtype == weight.dtype
        if not is_grouped and not fits:  # there a mixture of dtypes is cast to the weight's
            return f"an input of {x.dtype} with {name} of {weight.dtype}"
        dtype = _product_dtype(experts, x, weight)
        masters = (dtype, torch.float32) if dtype in SIXTEEN_BIT else (dtype,)
        if stack is not None and stack.lora_A.dtype not in masters:
            return f"products in {dtype} with lora_A of {stack.lora_A.dtype}"
    return None
