"""What the backward computes again instead of keeping it.

A layer needs its x for the gradient of A. Where x was computed element by element from tensors that autograd
keeps anyway for PyTorch's own backward, those are enough: the same operators give the same bits again.

    x = act(G)·U               of a gated MLP: G and U are kept; neither x nor act(G) has to be
    x = act(G)                 of an MLP without a gate
    x = weight·(h·rstd)        of an RMS norm, unless `recompute_norms(False)`: h is kept in its own 16 bits,
                               not in the 32 that two of PyTorch's nodes keep
    x = LayerNorm(h)           likewise; h is kept anyway
    x = attention's output     in another order of dimensions: the output is kept anyway

G, U, q, k and v may be computed again themselves: those that a layer with DoRA has made, which keeps what it
has scaled (`part_of`).

Casts may stand between them. act is SiLU, GELU (also by tanh) or a square (of a ReLU), or all is one function
of Liger's; of a GELU that is written out, two of five tensors are computed again. This is done by PyTorch's
documented hooks: `torch.autograd.graph.saved_tensors_hooks` around the layer's call, and
``SavedTensor.register_hooks`` of the nodes that would keep act(G) and the 32 bits of h. No model is patched.
Each call also looks at a few nodes before x, for what others of PyTorch's keep in vain: norms that feed no
layer, and v (norms.py, attention.py).

To add an activation, one whose node keeps its input ("self"; ReLU, sigmoid and tanh keep their result, and
nothing is gained): an output of it into computed.py; its function into `_of_activation`; a row into `MADE` of
tests/mica/ops/test_recompute.py; its name into mica/fast/README.md.

Whoever sets saved-tensor hooks of their own (offloading, checkpointing) gets x. An edit in place of what x is
computed from raises in the backward. An edit that autograd does not count (``tensor.data``, NumPy's views),
or of a value that is no longer saved, is not seen: the backward takes what it finds. The weight of a norm is
copied: optimizers change it without a count, and FSDP2 and DeepSpeed ZeRO-3 take its memory away.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mica.ops import attention, norms
from mica.ops.computed import (
    CAST,
    GELU,
    LAYER_NORM,
    POWER,
    PRODUCT,
    SILU,
    Cast,
    Computed,
    Part,
    identity,
    kept_by,
    nodes_before,
    output_before,
    part_of,
    relieve,
    to_keep,
    unpack,
)

# An x of fewer numbers is small, and simply saved: to find how it was made takes 20 µs, as long as a product
# of a small x. An MLP then keeps x and act(G), at most 0.5 MiB in 16 bits: SmolLM2-135M 15 MiB, with 85
# tokens. C++ reads this and `_norms` at each call.
MIN_NUMBERS = 2**17
# The nodes of autograd that a layer's call looks at, at most: those of an attention are about fifty.
_NODES = 64
_norms = True


def recompute_norms(on: bool) -> None:
    """Whether layers that are called from now on may compute the output of an RMS norm again."""
    global _norms
    _norms = on


# ---------------------------------------------------------------------------------------------------
# the layer
# ---------------------------------------------------------------------------------------------------


def call(layer: Callable[..., Tensor], x: Tensor, *operands, dtype=None, computed=None) -> Tensor:
    """``layer(x, *operands)``, eager and with gradients, whose nodes save no x that can be computed again.

    dtype: to which the layer would cast x. computed: x, if the caller knows how.
    """
    if computed is None and x.numel() >= MIN_NUMBERS:
        computed = arrange(x)
    if computed is None or not _may_hook():
        return layer(x, *operands)
    if any(map(torch.is_inference, filter(torch.is_tensor, operands))):
        return layer(x, *operands)  # which PyTorch refuses, and says what helps

    if dtype is not None and x.dtype is not dtype:
        x = x.to(dtype)
        computed = Computed(Cast(dtype), computed)
    computed.add_user()
    packed = {identity(x): computed}
    with torch.no_grad():
        for operand in operands:
            # A view has a base, for which kernels keep their copy of B. The output of a called base layer is
            # not saved, and an alias would keep it
            if isinstance(operand, Tensor) and operand.grad_fn is None:
                packed[identity(operand)] = Part(operand.view_as(operand))

    def pack(tensor: Tensor) -> Tensor | Part | Computed:
        # PyTorch gives a shallow copy of each tensor that the node saves, and checks no versions itself
        return packed.get(identity(tensor), tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer(x, *operands)


def claim(x: Tensor) -> Computed | None:
    """`arrange`, with one user more: a layer in C++, whose backward asks for `value_of`."""
    computed = arrange(x)
    if computed is not None:
        computed.add_user()
    return computed


_last = threading.local()  # .x and .computed, both weakly: of the call before; None where x has to be saved


def arrange(x: Tensor) -> Computed | None:
    """Arrange that x is computed again, if that keeps nothing which is not kept anyway; returns how.

    Nodes before x then save less (`_relieve_factor`, `_relieve_before`). Layers that share x (q, k and v)
    share what is computed: they are called one after the other.
    """
    if x.grad_fn is None or x._version or not _may_hook():
        return None
    if getattr(_last, "x", _nothing)() is x:
        if _last.computed is None:
            return None
        computed = _last.computed()
        if computed is not None:
            return computed
    try:
        if type(x.grad_fn) is LAYER_NORM:
            computed = norms.layer_norm(x) if _norms else None
        else:
            computed = _arrange_output(x.grad_fn, 2 if _norms else 1)
        _relieve_before(x.grad_fn)
    except RuntimeError:  # freed already, or edited since
        return None
    if computed is not None and x.dtype is torch.bfloat16 and x.is_cpu:
        computed = norms.in_one_pass(computed) or computed
    _last.x = weakref.ref(x)
    _last.computed = None if computed is None else weakref.ref(computed)
    return computed


def _relieve_before(node) -> None:
    """Have PyTorch's nodes before a layer keep less, where they keep what no layer needs.

    Those of norms that feed no adapted layer (of q and k, behind a layer's output), and of attention.
    """
    for before in nodes_before(node, _NODES):
        if _norms and type(before) is PRODUCT:
            norms.narrow(before, "self", 0)
        elif attention.is_attention(before):
            attention.keep_less(before)


def _nothing() -> None:
    """A weak reference to nothing."""


def _may_hook() -> bool:
    """Whether saved-tensor hooks are allowed here, and nobody else has set any, who wants to see x."""
    autograd = torch._C._autograd
    return (
        autograd._saved_tensors_hooks_is_enabled() and autograd._top_saved_tensors_default_hooks(True) is None
    )


# ---------------------------------------------------------------------------------------------------
# how a value was computed
# ---------------------------------------------------------------------------------------------------


_FACTORS = {"self": "The first factor of a product", "other": "The second factor of a product"}


def _arrange_output(node, products: int) -> Computed | None:
    """How a node's output is computed by so many products (and casts) at most of what autograd keeps."""
    if type(node) is CAST:
        return _of_cast(node, products)
    if type(node) is not PRODUCT:
        return _of_activation(node)
    if products == 0:
        return None
    left = _relieve_factor(node, "self", 0, products - 1)
    if left is None:
        return None
    right = _relieve_factor(node, "other", 1, products - 1)
    return None if right is None else Computed(torch.mul, left, right)


def _of_cast(node, products: int) -> Computed | None:
    """A cast to another dtype on the same device."""
    before = output_before(node, 0)
    after = node._input_metadata[0]
    if before is None or before.device != after.device:
        return None
    value = _arrange_output(node.next_functions[0][0], products)
    return None if value is None else Computed(Cast(after.dtype), value)


def _of_activation(node) -> Computed | None:
    """act(G), of the G that the activation's node keeps; of Liger's act(G)·U."""
    if type(node).__name__ in _LIGER:
        return _of_liger(node)
    if type(node) is SILU:
        function = F.silu
    elif type(node) is GELU:
        function = partial(F.gelu, approximate=node._saved_approximate)
    elif type(node) is POWER and node._saved_exponent == 2:
        function = torch.square
    else:
        return attention.copied_output(node)
    gate = part_of(node, "self", 0, f"What {node.name()} keeps")
    return None if gate is None else Computed(function, gate)


def _of_liger(node) -> Computed | None:
    """The output of one of Liger's functions, from the matrices that its node keeps."""
    if any(saved.unpack_hook is not None for saved in node._raw_saved_tensors):
        return None
    function = _LIGER[type(node).__name__](node)
    if function is None:
        return None
    shape = node._input_metadata[0].shape
    name = f"What {node.name()} keeps"
    tensors = [to_keep(tensor) for tensor in node.saved_tensors]
    if any(tensor is None for tensor in tensors):
        return None
    parts = [Part(tensor, name) for tensor in tensors]
    return Computed(lambda *tensors: function(*tensors).view(shape), *parts)


def _liger_mlp(node) -> Callable[..., Tensor]:
    """Called again. It keeps G and U, which its backward overwrites, and what else it takes as attributes."""
    names = [name for name in ("gate_multiplier", "down_multiplier") if hasattr(node, name)]
    multipliers = [getattr(node, name) for name in names]
    forward = type(node)._forward_cls.apply
    return lambda gate, up: forward(gate, up, *multipliers)


def _liger_norm(node) -> Callable[..., Tensor] | None:
    """The steps of its kernel with the rstd that it keeps: it does not keep eps, to be called again."""
    is_llama, is_gemma = node.casting_mode == 0, node.casting_mode == 1
    if not _norms or not (is_llama or is_gemma) or len(node._raw_saved_tensors) != 3:
        return None
    offset = node.offset

    def function(h, weight, rstd):
        return norms.norm(offset + weight.float(), h, rstd[:, None], rounds=is_llama)

    return function


_LIGER = {
    "LigerSiLUMulFunctionBackward": _liger_mlp,
    "LigerGELUMulFunctionBackward": _liger_mlp,
    "LigerRMSNormFunctionBackward": _liger_norm,
}


def _relieve_factor(node, name: str, position: int, products: int) -> Part | Computed | None:
    """A factor of a product, saved or recomputable; its node no longer saves one that is recomputable."""
    saved = getattr(node, f"_raw_saved_{name}")
    if saved.unpack_hook is unpack:
        return saved.data
    made_by = node.next_functions[position][0]
    value = kept_by(node, name)
    if value is None:
        is_packed = saved.unpack_hook is not None
        return None if is_packed or made_by is None else _arrange_output(made_by, products)
    computed = None
    if value._version == 0:
        computed = _of_activation(made_by) or _scaled(node, position)
    if computed is not None:
        relieve(saved, computed)
        return computed
    narrow = norms.narrow(node, name, position) if _norms and products == 0 else None
    return narrow or part_of(node, name, position, _FACTORS[name])


def _scaled(product, position: int) -> Computed | None:
    """A factor number·G, where the other comes from a power of G, whose node keeps G: GELU, written out."""
    scaled = product.next_functions[position][0]
    number = scaled._saved_other if type(scaled) is PRODUCT else None
    if number is None or number.dim() > 0 or not number.is_cpu:
        return None
    other = product.next_functions[1 - position][0]
    for node in nodes_before(other, _STEPS_TO_POWER) if other is not None else ():
        if type(node) is POWER and node.next_functions[0] == scaled.next_functions[0]:
            gate = part_of(node, "self", 0, f"What {node.name()} keeps")
            return None if gate is None else Computed(partial(torch.mul, other=number), gate)
    return None


_STEPS_TO_POWER = 12  # 1 + tanh(a·(G + b·G³)), and what is before G
