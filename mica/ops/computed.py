"""Values that the backward computes again, and how PyTorch's nodes of autograd are told.

A `Computed` is a function of tensors that autograd keeps anyway (`Part`), or of others that are computed. A
node that would save such a value is given the `Computed` instead, by PyTorch's documented hooks.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mica.memory import LAYER_TYPES

# What the nodes of autograd say of a tensor that they have saved.
EDITED = (
    "{} of an adapted layer has been modified by an inplace operation after the layer's forward. What the "
    "backward needs is kept as it came, without a copy: edit a clone instead, or call the backward before."
)
OPERANDS = "x, lora_A, lora_B or the weight"

_EDITED = (
    "{} (a tensor of shape {} and {}) was modified in place after the forward, but the backward of a MiCA "
    "layer computes the layer's x from it again. Modify a clone of it, or call the backward before."
)


class Part:
    """A tensor as it is now, which autograd keeps anyway.

    alias: shares its memory and its version. name: used in error messages; empty for the layer's operands.
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
            raise RuntimeError(edited if self._name else EDITED.format(OPERANDS))
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
        """Counts once as a user of each part, however many users it has."""
        if self._users == 0:
            for part in self.parts:
                if isinstance(part, Computed):
                    part.add_user()
        self._users += 1

    def uncast(self) -> tuple[Computed, torch.dtype | None]:
        """What is cast to which dtype; this itself where it is no cast of something computed."""
        if type(self.function) is Cast and isinstance(self.parts[0], Computed):
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


def unpack(packed: Tensor | Part | Computed) -> Tensor:
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
# nodes
# ---------------------------------------------------------------------------------------------------

with torch.inference_mode(False), torch.enable_grad():
    _t = torch.zeros(1, 2, requires_grad=True, device="cpu")
    _OUTPUTS = (
        _t * _t,
        _t.to(torch.float64),
        F.silu(_t),
        F.gelu(_t),
        _t.pow(2),
        F.layer_norm(_t, (2,)),
        _t + 1,
        _t.clone(),
        _t.transpose(0, 1),
        _t.view(2),
        torch.ops.aten._unsafe_view(_t, [2]),
    )
    _PARTS = _t.transpose(0, 1), _t.split(1, dim=1)[0], _t.split([1, 1], dim=1)[0], _t[:, :1]
PRODUCT, CAST, SILU, GELU, POWER, LAYER_NORM, SUM, CLONE, TRANSPOSE, *VIEWS = (
    type(output.grad_fn) for output in _OUTPUTS
)
PARTS = [type(part.grad_fn) for part in _PARTS]


def kept_by(node, name: str) -> Tensor | None:
    """A tensor that a node keeps, without its graph, if nobody packs it and it is an ordinary one."""
    if getattr(node, f"_raw_saved_{name}").unpack_hook is not None:
        return None
    return to_keep(getattr(node, f"_saved_{name}"))


def part_of(node, name: str, position: int, called: str) -> Part | Computed | None:
    """What a node keeps of its input at this position, by `kept_by`, or has computed again.

    An output that can be computed again from what its own node keeps, such as DoRA's, is kept no longer.
    """
    saved = getattr(node, f"_raw_saved_{name}")
    if saved.unpack_hook is unpack:
        return saved.data
    value = kept_by(node, name)
    if value is None:
        return None
    computed = None if value._version else _output_again(node.next_functions[position], value)
    if computed is None:
        return Part(value, called)
    relieve(saved, computed)
    return computed


def _output_again(edge: tuple, value: Tensor) -> Computed | None:
    """The ``value``, a view of a node's output, whose function can compute that again."""
    made_by, _ = before_views(*edge, (*VIEWS, *PARTS))
    function = getattr(type(made_by), "_forward_cls", None)  # of nodes of functions in Python
    if not hasattr(function, "output_again"):
        return None
    whole = getattr(made_by, "again", lambda: None)()
    if whole is None:
        whole = function.output_again(made_by)
    if whole is None:
        return None
    made_by.again = weakref.ref(whole)  # G and U may be halves of it
    layout = value.shape, value.stride(), value.storage_offset()
    return Computed(lambda output: output.as_strided(*layout), whole)


def before_views(node, number: int, views: Sequence[type] = VIEWS) -> tuple:
    """The edge of autograd to what has made the tensor of which this is a view."""
    while type(node) in views:
        node, number = node.next_functions[0]
    return node, number


def to_keep(tensor: Tensor | None) -> Tensor | None:
    """It without its graph, or a copy; None: it is no ordinary tensor, or has no memory now."""
    if type(tensor) not in LAYER_TYPES or tensor.layout is not torch.strided:
        return None
    if tensor.untyped_storage().nbytes() == 0:  # so FSDP2 and DeepSpeed ZeRO-3 leave a weight until it is due
        return None
    kept = tensor.detach()
    return kept.clone() if tensor.dim() == 1 else kept


def relieve(saved, computed: Computed) -> None:
    """Make the node recompute this tensor instead of saving it."""
    saved.register_hooks(lambda _: computed, unpack)
    computed.add_user()


def identity(tensor: Tensor) -> tuple:
    """Tensors for which this is equal hold the same values in the same places: parts and views are others.

    By the storage, which tensors without values have too: 0.03 µs more than by the address.
    """
    memory = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
    return *memory, tensor.dtype, tensor._version, tensor.is_neg()


def output_before(node, position: int):
    """What is known of the node's input at this position: dtype, device, shape."""
    made_by, number = node.next_functions[position]
    return None if made_by is None else made_by._input_metadata[number]


def nodes_before(node, most: int) -> Iterator:
    """The node and those before it, the nearest first, so many at most.

    None behind a layer's, where that one's call has looked, and none along a chain of residual sums.
    """
    seen = {node}
    waiting = deque(seen)
    while waiting and most:
        most -= 1
        node = waiting.popleft()
        yield node
        if isinstance(node, _OF_FUNCTIONS) or type(node).__name__ == "CppFunction":
            continue
        for before, _ in node.next_functions:
            if type(node) is type(before) is SUM:
                continue
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)


_OF_FUNCTIONS = torch.autograd.function.BackwardCFunction  # nodes of functions in Python


class Cast(NamedTuple):
    dtype: torch.dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)
