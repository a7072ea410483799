"""Outputs of norms, and what their nodes keep: computed again instead, with the same bits."""

from __future__ import annotations

import weakref
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mica import native
from mica.dtypes import SIXTEEN_BIT
from mica.memory import has_no_values
from mica.ops.computed import (
    CAST,
    POWER,
    Computed,
    Part,
    identity,
    kept_by,
    output_before,
    relieve,
)

_INPUT = "The input of a norm"

# ---------------------------------------------------------------------------------------------------
# LayerNorm
# ---------------------------------------------------------------------------------------------------

# Its node does not keep eps, and without that its output cannot be had: computed by any formula from the mean
# and the rstd that the node does keep, 15 to 34 % of the elements are rounded in another way. The module has
# eps, and is known by its weight.
_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_owners = WeakTensorKeyDictionary()  # weight -> weak reference to its norm; to nothing where no norm is known
_proven = weakref.WeakKeyDictionary()  # norm -> eps, and whether an output computed with it had the same bits


def note(model: nn.Module) -> None:
    """Have it known that a model's norms may feed adapted layers."""
    _models.add(model)


def layer_norm(x: Tensor) -> Computed | None:
    """x as the output of an nn.LayerNorm of a noted model, by the same operator."""
    node = x.grad_fn
    norm = _owner(node._saved_weight)
    shape = node._saved_normalized_shape
    if norm is None or len(shape) != 1:
        return None
    names = ["input", "result2", "weight"]
    if node._saved_bias is not None:
        names.append("bias")
    tensors = [kept_by(node, name) for name in names]
    if any(tensor is None for tensor in tensors):
        return None

    eps = norm.eps

    def function(h, rstd, weight, bias=None):
        output, _, own_rstd = torch.native_layer_norm(h, shape, weight, bias, eps)
        _check_rstd(own_rstd, rstd)
        return output

    computed = Computed(function, *[Part(tensor, _INPUT) for tensor in tensors])
    if has_no_values(x):
        return computed
    proven_eps, is_same = _proven.get(norm, (None, False))
    if proven_eps != eps:  # once a norm, because a GPU is waited for
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        h, _, *factors = tensors
        with torch.no_grad(), torch._C._DisableAutocast():
            is_same = torch.equal(F.layer_norm(h, shape, *factors, eps=eps), x)
        _proven[norm] = eps, is_same
    return computed if is_same else None


_OTHER_EPS = (
    "the output of a LayerNorm cannot be computed again, as its eps was not that of the nn.LayerNorm "
    "with its weight: call that module, or switch this off by mica.fast.enable(recompute='activations')."
)


def _check_rstd(own: Tensor, kept: Tensor) -> None:
    """Raise RuntimeError where the eps was not that of the forward; on a GPU without waiting for it.

    A kernel may sum in another order where its operands lie otherwise, so not every bit is compared: a
    gradient is off by no more than this.
    """
    if not has_no_values(own):
        torch._assert_async(torch.isclose(own, kept, rtol=1e-3, atol=0, equal_nan=True).all(), _OTHER_EPS)


def _owner(weight: Tensor | None) -> nn.LayerNorm | None:
    """The norm of a noted model that has this weight; None: there is none, or several that differ."""
    if type(weight) is not nn.Parameter:
        return None
    if weight not in _owners:
        modules = [module for model in list(_models) for module in model.modules()]
        norms = [m for m in modules if isinstance(m, nn.LayerNorm) and m.weight is weight]
        is_clear = len({norm.eps for norm in norms}) == 1
        _owners[weight] = weakref.ref(norms[0]) if is_clear else lambda: None
    norm = _owners[weight]()
    return norm if norm is not None and norm.weight is weight else None


# ---------------------------------------------------------------------------------------------------
# RMS norms
# ---------------------------------------------------------------------------------------------------


def narrow(product, name: str, position: int) -> Computed | None:
    """h of an RMS norm, h.float()·rstd, whose node and that of h.float().pow(2) both keep the 32 bits.

    Args:
        product: The node of h.float()·rstd.
        name, position: Of the factor that may be h.float().
    """
    cast = product.next_functions[position][0]
    if type(cast) is not CAST:
        return None
    square = product.next_functions[1 - position][0]
    for _ in range(_STEPS_TO_SQUARE):
        if square is None or type(square) is POWER:
            break
        square = square.next_functions[0][0] if square.next_functions else None
    before = output_before(cast, 0)
    if type(square) is not POWER or before is None or before.dtype not in SIXTEEN_BIT:
        return None
    wide, same = kept_by(product, name), kept_by(square, "self")
    if wide is None or same is None or wide.dtype is not torch.float32:
        return None
    if wide._version or identity(same) != identity(wide):
        return None
    computed = Computed(Tensor.float, Part(wide.to(before.dtype), _INPUT))
    for relieved in getattr(product, f"_raw_saved_{name}"), square._raw_saved_self:
        relieve(relieved, computed)
    return computed


_STEPS_TO_SQUARE = 6  # rsqrt, + eps, mean, and some to spare


def in_one_pass(x: Computed) -> Computed | None:
    """weight·(h·rstd) in bfloat16, with casts between, by one loop of C++; None: x is something else."""
    if native.module_if_built() is None:
        return None
    product, _ = x.uncast()
    weight, normed = product.factors()
    if normed is None or weight.value().dtype not in (torch.bfloat16, torch.float32):
        return None
    normed, rounded_to = normed.uncast()
    rstd, h = normed.factors()
    if h is None or h.function is not Tensor.float or rounded_to not in (None, torch.bfloat16):
        return None
    (narrow,) = h.parts
    return Computed(partial(norm, rounds=rounded_to is not None), weight, narrow, rstd)


def norm(weight: Tensor, h: Tensor, rstd: Tensor, *, rounds: bool) -> Tensor:
    """weight·(h·rstd) in the dtype of h; ``rounds``: h·rstd is rounded to it as well."""
    module = None if torch.compiler.is_compiling() else native.module_if_built()
    x = None if module is None else module.norm(weight.float(), h, rstd, rounds)
    if x is not None:
        return x
    # of other shapes and dtypes, and of numbers that PyTorch may round in another way
    normed = h.float() * rstd
    if rounds:
        normed = normed.to(h.dtype)
    return (weight * normed).to(h.dtype)
