"""x for the backward, without saving x, in layers that run from Python: mica/native/kept.h says what and why.

A recipe is a function of the tensors that are saved in the place of x.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mica.ops.operator import TENSOR_TYPES, is_eager

_norms = False


def recompute_norms(on: bool) -> None:
    """Whether layers that are called from now on may compute the output of an RMS norm again."""
    global _norms
    _norms = on


def recomputes_norms() -> bool:
    return _norms


class Saved:
    """x itself is saved."""

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        (x,) = tensors
        return x


class Shared:
    """x is computed again, once for all layers that have it."""

    def __init__(self, x: Tensor, recipe: Recipe) -> None:
        self._x = weakref.ref(x)
        self._recipe = recipe
        self._lock = threading.Lock()
        self._layers = 0
        self._served = 0  # in this backward
        self._value: Tensor | None = None

    def is_of(self, x: Tensor) -> bool:
        return self._x() is x

    def add_layer(self) -> None:
        with self._lock:
            self._layers += 1

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """x in the backward of one of the layers, from the tensors that it has saved."""
        if torch.is_grad_enabled():  # for second derivatives, perhaps with respect to x
            x = self._x()
            return x if x is not None and x._version == 0 else self._recipe(iter(tensors))
        with self._lock:
            if self._value is None:
                self._value = self._recipe(iter(tensors))
            value = self._value
            self._served += 1
            if self._served >= self._layers:
                self._value = None
                self._served = 0
            return value


_SAVED = Saved()
_last = threading.local()  # .shared: weakly, that of the layer before


def input_of(x: Tensor) -> tuple[Saved | Shared, Sequence[Tensor]]:
    """How the backward gets x, and the tensors to save for that."""
    tensors: list[Tensor] = []
    recipe = _recipe_of(x, tensors)
    if recipe is None:
        return _SAVED, (x,)
    shared = getattr(_last, "shared", lambda: None)()
    if shared is None or not shared.is_of(x):
        shared = Shared(x, recipe)
        _last.shared = weakref.ref(shared)
    shared.add_layer()
    return shared, tensors


# ---------------------------------------------------------------------------------------------------
# how x is computed
# ---------------------------------------------------------------------------------------------------


Recipe = Callable[[Iterator[Tensor]], Tensor]


def _example() -> Tensor:
    return torch.zeros(1, requires_grad=True, device="cpu")


_PRODUCT = type((_example() * _example()).grad_fn)
_CAST = type(_example().to(torch.float64).grad_fn)


def _recipe_of(x: Tensor, tensors: list[Tensor]) -> Recipe | None:
    """How x is computed from tensors that are kept anyway, which are appended; None: from none.

    An RMS norm is two products: weight·(h·rstd).
    """
    node = x.grad_fn
    if type(node) is not _PRODUCT and type(node) is not _CAST:
        return None
    has_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if x._version or has_hooks or not is_eager(x):  # hooks would pack what is saved here
        return None
    try:
        return _described(node, 2 if _norms else 1, tensors)
    except RuntimeError:  # freed already, or edited since
        return None


def _described(node, products: int, tensors: list[Tensor]) -> Recipe | None:
    """How a node's output is computed by so many products (and casts) at most of what autograd keeps."""
    if type(node) is _CAST:
        dtype = node._input_metadata[0].dtype
        value = _described(node.next_functions[0][0], products, tensors)
        return None if value is None else lambda saved: value(saved).to(dtype)
    if type(node) is not _PRODUCT or products == 0:
        return None
    left = _factor(node, "self", 0, products - 1, tensors)
    if left is None:
        return None
    right = _factor(node, "other", 1, products - 1, tensors)
    return None if right is None else lambda saved: left(saved) * right(saved)


def _factor(node, name: str, position: int, products: int, tensors: list[Tensor]) -> Recipe | None:
    """A factor that the product's node keeps, or, if more products are allowed, one that is computed."""
    raw = getattr(node, f"_raw_saved_{name}")
    if getattr(raw, "unpack_hook", None) is not None:  # the user has packed it away
        return None
    factor = getattr(node, f"_saved_{name}")
    if factor is None:
        return _described(node.next_functions[position][0], products, tensors)
    if type(factor) not in TENSOR_TYPES or factor.layout is not torch.strided:
        return None
    tensors.append(factor)
    return next
