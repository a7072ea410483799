"""What a layer of transformers allocates, counted on fake tensors: no memory, no values, no effects."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mica.counting import Alive, held

GIVEN = "_gradient_checkpointing_func"  # the attribute with the function that checkpoints a layer
_FSDP2 = "__composable_api"  # how attributes begin in which it keeps process groups
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Cost(NamedTuple):
    """Bytes that a layer allocates, above what was there before its forward."""

    kept: float  # after the forward, for the backward: its output, too
    peak: float  # at any time of its forward and backward, with what is kept


class Curve:
    """What a layer takes by the length of a sequence, from the lengths that were counted.

    No less than it does where that is a polynomial of the second degree without negative coefficients, as
    eager attention's is.
    """

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._costs: list[Cost] = []

    def lacks(self, length: int) -> bool:
        """Whether this length should be counted: it is outside of those that were, or far from both sides."""
        index = bisect_left(self._lengths, length)
        if index == len(self._lengths) or index == 0:
            return self._lengths[index : index + 1] != [length]
        return self._lengths[index] != length and self._lengths[index] > 2 * self._lengths[index - 1]

    def add(self, length: int, cost: Cost) -> None:
        index = bisect_left(self._lengths, length)
        self._lengths.insert(index, length)
        self._costs.insert(index, cost)

    def at(self, length: int) -> Cost:
        index = bisect_left(self._lengths, length)
        if index == len(self._lengths):
            growth = (length / self._lengths[-1]) ** 2
            return Cost(*(growth * value for value in self._costs[-1]))
        above = self._costs[index]
        if index == 0:
            return above
        low, high = self._lengths[index - 1 : index + 1]
        share = (length - low) / (high - low)
        return Cost(*(x + share * (y - x) for x, y in zip(self._costs[index - 1], above, strict=True)))


def peak(costs: list[Cost], number: int, h: int, rest: float) -> float:
    """Bytes that a step takes with its first ``number`` layers checkpointed.

    Args:
        costs: Those of the layers.
        number: How many are checkpointed; of these the input alone is kept.
        h: Bytes of a layer's input.
        rest: Bytes that what comes after the layers takes.
    """
    level = most = 0.0
    for index, cost in enumerate(costs):
        most = max(most, level + cost.peak + h)  # with the gradient of its output
        level += h if index < number else cost.kept
    return max(most, level + rest)


def shapes_of(args: tuple, kwargs: dict, length: int) -> Hashable:
    """What decides about a layer's memory in its operands but the length: a dimension of that size is -1."""

    def described(leaf: object) -> Hashable:
        if not isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, bool | None) else type(leaf)
        if leaf.dim() < 2 and not leaf.is_floating_point():  # where packed documents begin
            return leaf.dtype
        return leaf.dtype, leaf.requires_grad, tuple(-1 if size == length else size for size in leaf.shape)

    operands = tuple(described(leaf) for leaf in tree_leaves((args, kwargs)))
    return operands, _autocast_dtype(args)


def _autocast_dtype(args: tuple) -> torch.dtype | None:
    device = next((leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def count(layer: nn.Module, args: tuple, kwargs: dict) -> Cost:
    """What a forward of the layer allocates, and its backward; nothing is computed.

    Raises whatever an operation raises that needs values.
    """
    mode = FakeTensorMode()
    fake = _on_fakes(layer, mode)
    device = next(layer.parameters()).device.type
    dtype = torch.get_autocast_dtype(device)
    is_on = torch.is_autocast_enabled(device)
    args, kwargs = tree_map_only(
        Tensor, lambda x: mode.from_tensor(x.detach()).requires_grad_(x.requires_grad), (args, kwargs)
    )
    autocast = torch.autocast(device, dtype, is_on, cache_enabled=False)
    with mode, autocast, Alive() as alive:
        for tensor in (*held(fake), *tree_leaves((args, kwargs))):
            if isinstance(tensor, Tensor):
                alive.note(tensor)
        before = alive.peak = alive.bytes
        output = fake.forward(*args, **kwargs)
        kept = alive.bytes - before
        h = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if h.requires_grad:
            h.backward(torch.empty_like(h))
    return Cost(kept, alive.peak - before)


def _on_fakes(layer: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the layer without values, without checkpointing and without hooks of its own (FSDP2's)."""
    copied = object.__new__(type(layer))
    memo: dict[int, object] = {id(layer): copied}
    parameters = list(layer.parameters())
    for parameter in parameters:  # of bitsandbytes' class, too, which is no longer one without its values
        values = mode.from_tensor(parameter.detach().as_subclass(Tensor))
        memo[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
    state = {
        name: value
        for name, value in vars(layer).items()
        if name not in (*_HOOKS, GIVEN) and not name.startswith(_FSDP2)
    }
    with FakeCopyMode(mode):
        for parameter in parameters:
            if type(parameter) is not nn.Parameter:  # its scales
                vars(memo[id(parameter)]).update(copy.deepcopy(vars(parameter), memo))
        vars(copied).update(copy.deepcopy(state, memo))
    vars(copied).update({name: {} for name in _HOOKS}, gradient_checkpointing=False)
    return copied
