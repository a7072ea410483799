"""What the backward computes again instead of keeping it.

A layer needs its x for the gradient of A. Where x was computed element by element from tensors that autograd
keeps anyway for PyTorch's own backward, those are enough: the same operators give the same bits again.

    x = act(G)·U               of a gated MLP: G and U are kept; neither x nor act(G) has to be
    x = act(G)                 of an MLP without a gate
    x = weight·(h·rstd)        of an RMS norm, unless `recompute_norms(False)`: h is kept in its own 16 bits,
                               not in the 32 that two of PyTorch's nodes keep

Casts may stand between them. act is SiLU, GELU (also by tanh) or a square (of a ReLU), or all is one function
of Liger's. This is done by PyTorch's documented hooks: `torch.autograd.graph.saved_tensors_hooks` around the
layer's call, and ``SavedTensor.register_hooks`` of the nodes that would keep act(G) and the 32 bits of h. No
model is patched.

To add an activation, one whose node keeps its input ("self"; ReLU, sigmoid and tanh keep their result, and
nothing is gained): an output of it into `OUTPUTS`, before the last; its node into the line below and into
`_KINDS`; its function into `_of_activation`; a row into `MADE` of tests/mica/ops/test_kept.py; its name into
mica/fast/README.md. C++ takes the nodes from `OUTPUTS`.

Whoever sets saved-tensor hooks of their own (offloading, checkpointing) gets x. An edit in place of what x is
computed from raises in the backward. An edit that autograd does not count (``tensor.data``, NumPy's views),
or of a value that is no longer saved, is not seen: the backward takes what it finds. The weight of a norm is
copied: optimizers change it without a count, and FSDP2 and DeepSpeed ZeRO-3 take its memory away.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mica import native
from mica.dtypes import SIXTEEN_BIT
from mica.memory import LAYER_TYPES

# What the nodes of autograd say of a tensor that they have saved.
EDITED = (
    "x, lora_A, lora_B or the weight of an adapted layer has been modified by an inplace operation after "
    "the layer's forward. They are kept as they came, without a copy: edit a clone of x instead."
)

# An x of fewer numbers is small, and simply saved: to find how it was made takes 20 µs, as long as a product
# of a small x. An MLP then keeps x and act(G), at most 0.5 MiB in 16 bits: SmolLM2-135M 15 MiB, with 85
# tokens. C++ reads this and `_norms` at each call.
SMALL = 2**17
_norms = True


def recompute_norms(on: bool) -> None:
    """Whether layers that are called from now on may compute the output of an RMS norm again."""
    global _norms
    _norms = on


# ---------------------------------------------------------------------------------------------------
# values that are computed again
# ---------------------------------------------------------------------------------------------------


class Part:
    """A tensor as it is now, which autograd keeps anyway.

    alias: shares its memory and its version. name: the text for what x is computed from; an operand of the
    layer has none.
    """

    __slots__ = ("_alias", "_name", "_version")

    def __init__(self, alias: Tensor, name: str = "") -> None:
        self._alias = alias
        self._version = alias._version
        self._name = name

    def value(self, held: Held | None = None) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was edited in place.
        """
        if self._alias._version != self._version:
            shape = tuple(self._alias.shape)
            edited = _EDITED.format(self._name, shape, self._alias.dtype)
            raise RuntimeError(edited if self._name else EDITED)
        return self._alias


class Computed:
    """``function(*parts)``, computed when a backward asks, and held until all who need it have had it.

    Held for one backward in one thread, on one stream, and at most until that backward ends.
    """

    __slots__ = ("__weakref__", "_users", "function", "parts")

    def __init__(self, function: Callable[..., Tensor], *parts: Part | Computed) -> None:
        self.function = function
        self.parts = parts
        self._users = 0

    def add_user(self) -> None:
        """Of its parts it is one user, however many it has itself."""
        if self._users == 0:
            for part in self.parts:
                if isinstance(part, Computed):
                    part.add_user()
        self._users += 1

    def uncast(self) -> tuple[Computed, torch.dtype | None]:
        """What is cast to which dtype; this itself where it is no cast of something computed."""
        if type(self.function) is _Cast and isinstance(self.parts[0], Computed):
            return self.parts[0], self.function.dtype
        return self, None

    def factors(self) -> tuple[Part, Computed] | tuple[None, None]:
        """Those of a product of what is kept and what is computed."""
        if self.function is torch.mul:
            for kept, computed in (self.parts, self.parts[::-1]):
                if isinstance(kept, Part) and isinstance(computed, Computed):
                    return kept, computed
        return None, None

    def value(self, held: Held | None) -> Tensor:
        """The value, of parts that need no gradient; ``held`` is changed."""
        if held is None:
            return self.function(*[part.value(None) for part in self.parts])
        value, left = held.pop(self, (None, self._users))
        if value is None:
            value = self.function(*[part.value(held) for part in self.parts])
        if left > 1:
            held[self] = value, left - 1
            if len(held) > _HELD:
                held.popitem(last=False)
        return value


Held = OrderedDict[Computed, tuple[Tensor, int]]  # the values, and how many users have yet to ask for each
_HELD = 3  # at most: more would add up where a part of the model takes no part in a backward
_backward = threading.local()  # .key and .held: of the one that this thread is in


def _held() -> Held | None:
    """What is held for this backward; None in a compiled one, and outside, where a node is looked at."""
    task = torch._C._current_graph_task_id()
    if task < 0 or torch.compiler.is_compiling():
        return None
    key = task, torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    if getattr(_backward, "key", None) != key:
        _backward.key = key
        _backward.held = OrderedDict()
        at_end = partial(_backward.held.clear)
        torch.autograd.Variable._execution_engine.queue_callback(at_end)
        weakref.finalize(at_end, at_end.func)  # a backward that raises drops its callbacks without a call
    return _backward.held


def _unpack(packed: Tensor | Part | Computed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    if isinstance(packed, Part):
        return packed.value()
    return value_of(packed)


def value_of(computed: Computed) -> Tensor:
    """Its value, for the backward that runs in this thread."""
    with torch._C._DisableAutocast():
        return computed.value(_held())


# ---------------------------------------------------------------------------------------------------
# the layer
# ---------------------------------------------------------------------------------------------------


def call(
    layer: Callable[..., Tensor], x: Tensor, *operands, dtype=None, computed=None, looks_after_y=False
) -> Tensor:
    """``layer(x, *operands)``, eager and with gradients, whose nodes save no x that can be computed again.

    dtype: to which the layer would cast x. computed: x, if the caller knows how. looks_after_y: the layer
    saves its output, too, and sees itself whether that was edited.
    """
    kind = type(x.grad_fn)
    if computed is None and x.numel() >= SMALL and (kind in _KINDS or kind.__name__ in _LIGER):
        computed = input_of(x)
    if (computed is None and not looks_after_y) or not _may_hook():
        return layer(x, *operands)
    if any(map(torch.is_inference, filter(torch.is_tensor, operands))):
        return layer(x, *operands)  # which PyTorch refuses, and says what helps

    if dtype is not None and x.dtype is not dtype:
        x = x.to(dtype)
        computed = Computed(_Cast(dtype), computed)
    if computed is not None:
        computed.add_user()
    packed = {_identity(x): computed or Part(x.detach())}
    with torch.no_grad():
        for operand in operands:
            if isinstance(operand, Tensor):  # a view has a base, for which kernels keep their copy of B
                packed[_identity(operand)] = Part(operand.view_as(operand))

    def pack(tensor: Tensor) -> Tensor | Part | Computed:
        # PyTorch gives a shallow copy of each tensor that the node saves, and checks no versions itself
        return packed.get(_identity(tensor), tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return layer(x, *operands)


def claim(x: Tensor) -> Computed | None:
    """`input_of`, with one user more: a layer in C++, which asks for `value_of`."""
    computed = input_of(x)
    if computed is not None:
        computed.add_user()
    return computed


def _identity(tensor: Tensor) -> tuple:
    """Tensors for which this is equal hold the same values in the same places: parts and views are others.

    By the storage, which tensors without values have too: 0.03 µs more than by the address.
    """
    memory = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
    return *memory, tensor.dtype, tensor._version, tensor.is_neg()


_last = threading.local()  # .x and .computed, both weakly: of the call before; None where x has to be saved


def input_of(x: Tensor) -> Computed | None:
    """How x can be computed again, if that keeps nothing which is not kept anyway.

    Layers that share x (q, k and v) share what is computed: they are called one after the other.
    """
    if x._version or not _may_hook():
        return None
    if getattr(_last, "x", _nothing)() is x:
        if _last.computed is None:
            return None
        computed = _last.computed()
        if computed is not None:
            return computed
    try:
        computed = _described(x.grad_fn, 2 if _norms else 1)
    except RuntimeError:  # freed already, or edited since
        return None
    if computed is not None and x.dtype is torch.bfloat16 and x.is_cpu:
        computed = _in_one_pass(computed) or computed
    _last.x = weakref.ref(x)
    _last.computed = None if computed is None else weakref.ref(computed)
    return computed


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


class _OfPython(torch.autograd.Function):
    """Liger's functions are of PyTorch's class of nodes that this one's is of, too."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()


with torch.inference_mode(False), torch.enable_grad():
    _t = torch.zeros(2, requires_grad=True, device="cpu")
    # An output of each operator that may have made an x that is computed again. C++ takes the first for the
    # product and the second for the cast; the last is Python's.
    OUTPUTS = (_t * _t, _t.to(torch.float64), F.silu(_t), F.gelu(_t), _t.pow(2), _OfPython.apply(_t))
_PRODUCT, _CAST, _SILU, _GELU, _POWER, _ = (type(output.grad_fn) for output in OUTPUTS)
_KINDS = {_PRODUCT, _CAST, _SILU, _GELU, _POWER}

_EDITED = (
    "{} (a tensor of shape {} and {}) was modified in place after the forward, but the backward of a MiCA "
    "layer computes the layer's x from it again. Modify a clone of it, or call the backward before."
)
_FACTORS = {"self": "The first factor of a product", "other": "The second factor of a product"}


def _kept(node, name: str) -> Tensor | None:
    """A tensor that a node keeps, without its graph, if nobody packs it and it is an ordinary one."""
    if getattr(node, f"_raw_saved_{name}").unpack_hook is not None:
        return None
    return _to_keep(getattr(node, f"_saved_{name}"))


def _to_keep(tensor: Tensor | None) -> Tensor | None:
    """It without its graph, or a copy; None: it is no ordinary tensor, or has no memory now."""
    if type(tensor) not in LAYER_TYPES or tensor.layout is not torch.strided:
        return None
    if tensor.untyped_storage().nbytes() == 0:  # so FSDP2 and DeepSpeed ZeRO-3 leave a weight until it is due
        return None
    kept = tensor.detach()
    return kept.clone() if tensor.dim() == 1 else kept


def _described(node, products: int) -> Computed | None:
    """How a node's output is computed by so many products (and casts) at most of what autograd keeps."""
    if type(node) is _CAST:
        return _of_cast(node, products)
    if type(node) is not _PRODUCT:
        return _of_activation(node)
    if products == 0:
        return None
    left = _factor(node, "self", 0, products - 1)
    if left is None:
        return None
    right = _factor(node, "other", 1, products - 1)
    return None if right is None else Computed(torch.mul, left, right)


def _of_cast(node, products: int) -> Computed | None:
    """A cast to another dtype on the same device."""
    before = _output_before(node, 0)
    after = node._input_metadata[0]
    if before is None or before.device != after.device:
        return None
    value = _described(node.next_functions[0][0], products)
    return None if value is None else Computed(_Cast(after.dtype), value)


def _output_before(node, position: int):
    """What is known of the node's input at this position: dtype, device, shape."""
    made_by, number = node.next_functions[position]
    return None if made_by is None else made_by._input_metadata[number]


def _of_activation(node) -> Computed | None:
    """act(G), of the G that the activation's node keeps; of Liger's act(G)·U."""
    if type(node).__name__ in _LIGER:
        return _of_liger(node)
    if type(node) is _SILU:
        function = F.silu
    elif type(node) is _GELU:
        function = partial(F.gelu, approximate=node._saved_approximate)
    elif type(node) is _POWER and node._saved_exponent == 2:
        function = torch.square
    else:
        return None
    gate = _kept(node, "self")
    return None if gate is None else Computed(function, Part(gate, f"What {node.name()} keeps"))


def _of_liger(node) -> Computed | None:
    """The output of one of Liger's functions, from the matrices that its node keeps."""
    if any(saved.unpack_hook is not None for saved in node._raw_saved_tensors):
        return None
    function = _LIGER[type(node).__name__](node)
    if function is None:
        return None
    shape = node._input_metadata[0].shape
    name = f"What {node.name()} keeps"
    tensors = [_to_keep(tensor) for tensor in node.saved_tensors]
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
        return _norm(offset + weight.float(), h, rstd[:, None], rounds=is_llama)

    return function


_LIGER = {
    "LigerSiLUMulFunctionBackward": _liger_mlp,
    "LigerGELUMulFunctionBackward": _liger_mlp,
    "LigerRMSNormFunctionBackward": _liger_norm,
}


def _factor(node, name: str, position: int, products: int) -> Part | Computed | None:
    """A factor of a product, kept by its node or computed; what is computed is kept by nobody any more."""
    saved = getattr(node, f"_raw_saved_{name}")
    if saved.unpack_hook is _unpack:
        return saved.data
    made_by = node.next_functions[position][0]
    value = _kept(node, name)
    if value is None:
        is_packed = saved.unpack_hook is not None
        return None if is_packed or made_by is None else _described(made_by, products)
    computed = _of_activation(made_by) if value._version == 0 else None
    if computed is not None:
        _relieve(saved, computed)
        return computed
    if _norms and products == 0:
        narrow = _narrow(node, saved, position, value)
        if narrow is not None:
            return narrow
    return Part(value, _FACTORS[name])


def _relieve(saved, computed: Computed) -> None:
    """The node keeps a value no longer, but has it computed."""
    saved.register_hooks(lambda _: computed, _unpack)
    computed.add_user()


def _narrow(node, saved, position: int, wide: Tensor) -> Computed | None:
    """h of an RMS norm, h.float()·rstd, whose node and that of h.float().pow(2) both keep the 32 bits."""
    cast = node.next_functions[position][0]
    square = node.next_functions[1 - position][0]
    for _ in range(_STEPS_TO_SQUARE):
        if square is None or type(square) is _POWER:
            break
        square = square.next_functions[0][0] if square.next_functions else None
    if type(cast) is not _CAST or type(square) is not _POWER or wide._version:
        return None
    before, same = _output_before(cast, 0), _kept(square, "self")
    is_lossless = before is not None and before.dtype in SIXTEEN_BIT and wide.dtype is torch.float32
    if not is_lossless or same is None or _identity(same) != _identity(wide):
        return None
    narrow = wide.to(before.dtype)
    computed = Computed(torch.Tensor.float, Part(narrow, "The input of a norm"))
    for relieved in saved, square._raw_saved_self:
        _relieve(relieved, computed)
    return computed


_STEPS_TO_SQUARE = 6  # rsqrt, + eps, mean, and some to spare


# ---------------------------------------------------------------------------------------------------
# a norm in one pass
# ---------------------------------------------------------------------------------------------------


class _Cast(NamedTuple):
    dtype: torch.dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)


def _in_one_pass(x: Computed) -> Computed | None:
    """weight·(h·rstd) in bfloat16, with casts between, by one loop of C++; None: x is something else."""
    if native.module_if_built() is None:
        return None
    product, _ = x.uncast()
    weight, normed = product.factors()
    if normed is None or weight.value().dtype not in (torch.bfloat16, torch.float32):
        return None
    normed, rounded_to = normed.uncast()
    rstd, h = normed.factors()
    if h is None or h.function is not torch.Tensor.float or rounded_to not in (None, torch.bfloat16):
        return None
    (narrow,) = h.parts
    return Computed(partial(_norm, rounds=rounded_to is not None), weight, narrow, rstd)


def _norm(weight: Tensor, h: Tensor, rstd: Tensor, *, rounds: bool) -> Tensor:
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
