"""Tensor parallelism: layers of which every process holds a part, as transformers (from 5.17 on) shards them.

A weight is a DTensor, and a style stands in the place of its module's forward. PEFT gives one factor of the
adapter the same style, the other one is whole in every process, and PEFT's own code runs both. Here adapters
are created: B is the part of what one process computes from the whole weight. Everything but `local_shard`
and the widths is a collective: every process must call it, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

try:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
except ImportError:  # PyTorch without torch.distributed: no tensor is one
    DTensor = ()

# The plans that PEFT gives adapters, and the dimension of the weight (out_features, in_features) they split.
_SPLIT = {"colwise": 0, "rowwise": 1}


def plan_of(base_layer: nn.Module) -> str | None:
    """The name of its plan, None without tensor parallelism. PEFT marks a base layer that gets an adapter."""
    return base_layer.__dict__.get("_hf_tp_plan")


def _is_split(weight: Tensor, dim: int | None) -> bool:
    """Whether each process has one part along this dimension, and nothing else is done to the weight."""
    if dim is None or not isinstance(weight, DTensor):
        return False
    return tuple(weight.placements) in ((Shard(dim),), (Shard(dim - 2),))


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
    if not isinstance(like, DTensor):
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
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def widen(layer: nn.Module, adapter_name: str) -> None:
    """Tell the adapter's sharded factor its whole width, as the styles read it.

    PEFT 0.21.2 creates it as wide as this process's part; transformers 5.24 takes that for the whole
    width, and a rowwise layer's first forward in training raises "shape is invalid".
    """
    base_layer = layer.base_layer
    plan = plan_of(base_layer) if type(base_layer) is nn.Linear else None
    if plan == "colwise":
        layer.lora_B[adapter_name].out_features = base_layer.out_features
    elif plan == "rowwise":
        layer.lora_A[adapter_name].in_features = base_layer.in_features
