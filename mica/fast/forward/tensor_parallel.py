"""Tensor parallelism: layers of which every process holds a part, as transformers (from 5.17 on) shards them.

A weight is a DTensor, and a style stands in the place of its module's forward. PEFT gives one factor of the
adapter the same style, the other one is whole in every process. With the parts W_p, A_p, B_p of process p:

    colwise   y_p = x W_pᵀ + s·(x Aᵀ) B_pᵀ           dx = Σ dx_p, dA = Σ dA_p
    rowwise   y = Σ (x_p W_pᵀ + s·(x_p A_pᵀ) Bᵀ)     dx_p and dA_p need no sum

so that base and adapter share one all-reduce of activations per layer, where the styles take two. B is the
part of what one process computes from the whole weight. Everything here but `local` and the widths is a
collective: every process must call it, in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel, TensorParallelLayer
except ImportError:  # PyTorch without torch.distributed, or transformers before 5.17
    DTensor = None

# The plans that PEFT gives adapters, and the dimension of the weight (out_features, in_features) they split.
_SPLIT = {"colwise": 0, "rowwise": 1}


def plan_of(base_layer: nn.Module) -> str | None:
    """The name of its plan, None without tensor parallelism. PEFT marks a base layer that gets an adapter."""
    return base_layer.__dict__.get("_hf_tp_plan")


def why_not(base_layer: nn.Module) -> str | None:
    """None for a layer without tensor parallelism, or whose sharding is covered; else the reason."""
    plan = plan_of(base_layer)
    if plan is None:
        return None
    if type(base_layer) is not nn.Linear or not _is_split(base_layer.weight, _SPLIT.get(plan)):
        return f"tensor parallelism with plan {plan!r} of a base layer of type {type(base_layer).__name__}"
    return "tensor parallelism in a compiled graph" if torch.compiler.is_compiling() else None


def _is_split(weight: Tensor, dim: int | None) -> bool:
    """Whether each process has one part along this dimension, and nothing else is done to the weight."""
    if dim is None or DTensor is None or not isinstance(weight, DTensor):
        return False
    return tuple(weight.placements) in ((Shard(dim),), (Shard(dim - 2),))


def local(base_layer: nn.Module, tensor: Tensor | None) -> Tensor | None:
    """This process's part of a weight of the layer or of its adapter; without tensor parallelism itself.

    A frozen weight's part is the same object at every call: what is derived from B is cached by it. A trained
    weight's gradient arrives at the DTensor.
    """
    if plan_of(base_layer) is None or tensor is None:
        return tensor
    if tensor.requires_grad and isinstance(tensor, DTensor):
        return tensor.to_local()
    return local_shard(tensor)


# ---------------------------------------------------------------------------------------------------
# the forward that a style has installed
# ---------------------------------------------------------------------------------------------------


# The code of the one function that is defined within that one.
_CONSTANTS = () if DTensor is None else TensorParallelLayer.install_forward.__code__.co_consts
_INSTALLED = next((constant for constant in _CONSTANTS if hasattr(constant, "co_freevars")), None)
_FREE = {"module", "original_forward", "self", "mesh"}


def is_styled(module: nn.Module, forward) -> bool:
    """Whether the module's own forward is a covered style around ``forward``, the function of its class.

    Nothing but the variables of the installed function tells: a style leaves no other trace in the module.
    """
    installed = module.__dict__.get("forward")
    if _INSTALLED is None or getattr(installed, "__code__", None) is not _INSTALLED:
        return False
    names = installed.__code__.co_freevars
    if set(names) != _FREE:
        return False
    cells = dict(zip(names, (cell.cell_contents for cell in installed.__closure__), strict=True))
    style, original = cells["self"], cells["original_forward"]
    if cells["module"] is not module or getattr(original, "__self__", None) is not module:
        return False
    if original.__func__ is not forward or not getattr(style, "use_local_output", False):
        return False
    layouts = (style.input_layouts, style.output_layouts)
    if type(style) is ColwiseParallel:
        return layouts == (Replicate(), Shard(-1))
    return type(style) is RowwiseParallel and layouts == (Shard(-1), Replicate())


# ---------------------------------------------------------------------------------------------------
# sums over the processes
# ---------------------------------------------------------------------------------------------------


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.mark_dirty(tensor)
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # a hook or another node may have it too
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Sharding(NamedTuple):
    """How a layer that `why_not` covers is split, and among which processes."""

    plan: str  # "colwise" or "rowwise"
    group: dist.ProcessGroup

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place; the gradient, the same in all of them, passes through."""
        return _Summed.apply(tensor, self.group)

    def sum_gradient(self, tensor: Tensor) -> Tensor:
        """The tensor, the same in all processes; each has a part of its gradient, and all get the sum."""
        if torch.is_grad_enabled() and tensor.requires_grad:
            return _SummedGradient.apply(tensor, self.group)
        return tensor


def sharding(base_layer: nn.Module) -> Sharding | None:
    """None without tensor parallelism."""
    plan = plan_of(base_layer)
    return None if plan is None else Sharding(plan, base_layer.weight.device_mesh.get_group())


# ---------------------------------------------------------------------------------------------------
# creating an adapter
# ---------------------------------------------------------------------------------------------------


def is_gathered(base_layer: nn.Module) -> bool:
    """Whether the whole weight has to be `gathered` for the solver, and can be."""
    weight, plan = getattr(base_layer, "weight", None), plan_of(base_layer)
    if plan == "embedding_rowwise":
        return isinstance(base_layer, nn.Embedding) and _is_split(weight, 0)
    return type(base_layer) is nn.Linear and _is_split(weight, _SPLIT.get(plan))


def gathered(base_layer: nn.Module) -> Tensor:
    """The weight as it is stored, whole and without a graph."""
    weight = base_layer.weight.data  # ``detach`` of some inference tensors has no views
    return weight.full_tensor() if is_gathered(base_layer) else weight


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor that is sharded as ``like``; no communication."""
    if DTensor is None or not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


@torch.no_grad()
def write(parameter: Tensor, whole: Tensor) -> None:
    """Give the parameter this process's part, in the dtype and on the device that it has."""
    # ``.data`` of a DTensor would leave its local tensor
    local_shard(parameter).data.copy_(part_of(whole.to(parameter.device), parameter))


def local_shard(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds."""
    with torch.no_grad():
        return parameter.to_local() if DTensor is not None and isinstance(parameter, DTensor) else parameter


def widen(layer: nn.Module, adapter_name: str) -> None:
    """Tell the adapter's sharded factor its whole width, as the styles read it.

    PEFT 0.21.2 creates it as wide as this process's part; transformers 5.24 takes that for the whole
    width, and a rowwise layer's first forward in training raises "shape is invalid".
    """
    base_layer = layer.base_layer if hasattr(layer, "base_layer") else layer
    plan = plan_of(base_layer) if type(base_layer) is nn.Linear else None
    if plan == "colwise":
        layer.lora_B[adapter_name].out_features = base_layer.out_features
    elif plan == "rowwise":
        layer.lora_A[adapter_name].in_features = base_layer.in_features
