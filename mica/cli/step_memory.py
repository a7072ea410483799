"""The memory of a training step, counted with a model without values: nothing of it is allocated.

What a step allocates follows from shapes and dtypes alone. On the meta device PyTorch's operators, those of
bitsandbytes and this package's give shapes, and a mode adds up the storages that are alive; there is no
autocast on that device. PyTorch's own `torch.distributed._tools.mem_tracker.MemTracker` raises where a
parameter is frozen.

A step is recorded in parts: what is before the layers, each layer, the loss, and the same backwards. A part
adds as much to whatever is there already, so that a model of any depth, with any number of checkpointed
layers, follows from one layer of each kind, to the byte (tests/mica/cli/test_step_memory.py).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mica.errors import UsageError

# For ``attn_implementation``. PyTorch's own choice looks at values, and needs a GPU for flash attention.
ATTENTION = "counted"  # a name with "flash" in it would be looked for on the Hub
# Operators of bitsandbytes that allocate more than they return: its kernel for any device calls others.
_COMPOSITE = ("bitsandbytes::gemm_4bit", "bitsandbytes::int8_scaled_mm")
_ANY_DEVICE = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
# transformers 5.24 has renamed it
ENABLE_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(PreTrainedModel, name)
)
_CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": False}  # its 5 kB are a CPU's, of no device


def _flash_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """For the backward it keeps q, k, v, the output and a number for each row; no mask."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    output, *_ = flash(query, key, value, dropout, is_causal=True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _flash_attention)


class StepMemory(NamedTuple):
    """Bytes that a step allocates, in addition to the weights."""

    kept: int  # after the forward, for the backward: the loss and its graph
    peak: int  # at any time of the step, with the gradients


class Part(NamedTuple):
    """A part of a step: by how many bytes it changes what is allocated, and at most exceeds what was."""

    change: int
    peak: int


class Layer(NamedTuple):
    """A layer's parts of a step, and the bytes of its weights and of those of them that are trained."""

    forward: Part
    backward: Part
    weights: int
    trained: int


class Step(NamedTuple):
    """A step in parts, in their order, and the bytes of what is in no layer."""

    before: Part
    layers: list[Layer]
    loss: Part
    loss_backward: Part
    after: Part
    other_weights: int
    other_trained: int

    @property
    def weights(self) -> int:
        """Bytes of all weights, with adapters and buffers."""
        return self.other_weights + sum(layer.weights for layer in self.layers)

    @property
    def trained(self) -> int:
        """Bytes of all that is trained."""
        return self.other_trained + sum(layer.trained for layer in self.layers)

    def of_layers(self, kinds: list[int]) -> Step:
        """The step of a model with as many layers, each like that of this index."""
        return self._replace(layers=[self.layers[kind] for kind in kinds])

    def checkpointed_first(self, number: int, checkpointed: Step) -> Step:
        """With so many layers as they are in ``checkpointed``, in which all are checkpointed."""
        if number == 0:
            return self
        return checkpointed._replace(layers=[*checkpointed.layers[:number], *self.layers[number:]])

    def memory(self) -> StepMemory:
        """What the parts allocate, one after the other."""
        forward = [layer.forward for layer in self.layers]
        backward = [layer.backward for layer in reversed(self.layers)]
        level = peak = 0
        for part in (self.before, *forward, self.loss, self.loss_backward, *backward, self.after):
            peak = max(peak, level + part.peak)
            level += part.change
            if part is self.loss:
                kept = level
        return StepMemory(kept, peak)


@contextmanager
def dropout_of_devices() -> Iterator[None]:
    """Dropout inside keeps a mask of bytes, as on a GPU; elsewhere PyTorch's keeps one in the dtype of x.

    No mode of PyTorch would do: within `backward` none sees what checkpointed layers compute again.
    """
    functional = nn.functional
    own = functional.dropout
    functional.dropout = _native_dropout
    try:
        yield
    finally:
        functional.dropout = own


def _native_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, training)[0]


class _Alive(TorchDispatchMode):
    """Adds up the storages of all tensors that operators return, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.parts: list[Part] = []
        self.ends_part = False  # before the next operator, when what is only held by a call has gone
        self._storages: dict[int, weakref.ref] = {}
        self._begin()

    def _begin(self) -> None:
        self._start = self._peak = self.bytes

    def end_part(self, *_) -> None:
        """One part of the step is over, and the next begins."""
        self.parts.append(Part(self.bytes - self._start, self._peak - self._start))
        self._begin()

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def forget(_) -> None:
            del self._storages[key]
            self.bytes -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.bytes += size
        self._peak = max(self._peak, self.bytes)

    def weights_of(self, module: nn.Module) -> int:
        """Bytes that the module has, but for what was noted before."""
        before = self.bytes
        for tensor in _held(module):
            self.note(tensor)
        self._begin()
        return self.bytes - before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.ends_part:
            self.ends_part = False
            self.end_part()
        if func._schema.name in _COMPOSITE:
            with self:
                return func.redispatch(_ANY_DEVICE, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result


def _held(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a module, and the scales of those that bitsandbytes has quantised."""
    yield from module.buffers()
    for parameter in module.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        for holder in (parameter, state, getattr(state, "state2", None)):
            held = getattr(holder, "__dict__", {}).values()
            yield from (value for value in held if isinstance(value, Tensor))


def _trained(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def record(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """What ``loss()`` of the model and its backward allocate. The gradients are cleared again."""
    _, layers = decoder_layers(model)
    with dropout_of_devices(), _Alive() as alive:
        weights = [alive.weights_of(layer) for layer in layers]
        other_weights = alive.weights_of(model)
        result = _run_in_parts(layers, loss, alive)
        result.backward()
        alive.end_part()
    model.zero_grad()
    before, *forward = alive.parts[: len(layers) + 1]
    loss_forward, loss_backward, *backward, after = alive.parts[len(layers) + 1 :]
    trained = [_trained(layer) for layer in layers]
    of_layers = zip(forward, reversed(backward), weights, trained, strict=True)
    recorded = [Layer(*of_layer) for of_layer in of_layers]
    other_trained = _trained(model) - sum(trained)
    return Step(before, recorded, loss_forward, loss_backward, after, other_weights, other_trained)


def _run_in_parts(layers: Iterable[nn.Module], loss: Callable[[], Tensor], alive: _Alive) -> Tensor:
    """``loss()``, with an end of a part at each border of layers, now and in its backward."""

    def enter(_, args) -> None:
        alive.end_part()
        args[0].register_hook(alive.end_part)

    def leave(_, args, output) -> None:
        alive.ends_part = True
        h = output[0] if isinstance(output, tuple) else output
        h.register_hook(alive.end_part)

    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    *_, last = layers
    hooks.append(last.register_forward_hook(leave))
    result = loss()
    alive.end_part()
    for hook in hooks:  # a recomputed layer would call them again
        hook.remove()
    return result


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """What the decoder calls the list of its layers, and the list.

    Raises UsageError if it has none whose layers can be checkpointed one by one.
    """
    for name, module in model.get_decoder().named_children():
        if isinstance(module, nn.ModuleList) and isinstance(next(iter(module)), GradientCheckpointingLayer):
            return name, module
    what = "has no list of layers that can be checkpointed one by one"
    raise UsageError(f"{type(model).__name__} {what}, by which a step is counted")


def shorten(model: nn.Module, adapted: Iterable[nn.Module]) -> list[int]:
    """Leave one layer of each kind in the model, which keep their names; ``adapted``: modules.

    The first layer is a kind of its own: the embeddings that it gets outlive it. Returns for each layer that
    was there the index of the one that is left of its kind.
    """
    _, layers = decoder_layers(model)
    config = model.get_decoder().config
    types = getattr(config, "layer_types", None) or [""] * len(layers)
    adapted = {id(module) for module in adapted}
    kinds = []
    for index, layer in enumerate(layers):
        inside = tuple(name for name, module in layer.named_modules() if id(module) in adapted)
        kinds.append((index == 0, types[index], repr(layer), inside))
    left = list(dict.fromkeys(kinds))
    for index, kind in enumerate(kinds):
        if kinds.index(kind) != index:
            delattr(layers, str(index))  # `del` would rename the others
    config.num_hidden_layers = len(left)
    if any(types):
        config.layer_types = [kind[1] for kind in left]
    return [left.index(kind) for kind in kinds]


def checkpoint_first(model: nn.Module, number: int) -> None:
    """Checkpoint so many layers: the first, whose backward comes when the others' memory is free."""
    getattr(model, ENABLE_CHECKPOINTING)(_CHECKPOINTING)
    _, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < number


def loss_of(model: nn.Module, ids: Tensor, in_chunks: bool) -> Callable[[], Tensor]:
    """A function that computes a causal language model's loss.

    ``in_chunks``: without the logits of all tokens at once.
    """
    if not in_chunks:
        return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss

    def loss() -> Tensor:
        h = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        return chunked_loss(h.flatten(0, -2), model.get_output_embeddings().weight)

    return loss


def chunked_loss(h: Tensor, weight: Tensor) -> Tensor:
    """Allocates what Liger's fused linear cross entropy does for a frozen output layer; the loss is 0.

    The logits of some tokens at a time, which their gradient overwrites, and already in the forward the
    gradient of h (tokens, hidden_size). `torch.nn.functional.linear_cross_entropy` in chunks keeps the same.
    """
    return _ChunkedLoss.apply(h, weight)


class _ChunkedLoss(torch.autograd.Function):

    @staticmethod
    def forward(ctx, h, weight):
        (tokens, width), vocabulary = h.shape, len(weight)
        chunks = math.ceil(vocabulary / width)
        size = 2 ** math.ceil(math.log2(tokens / chunks))
        grad = torch.zeros_like(h)
        losses = h.new_zeros(tokens, dtype=torch.float32)
        for h_chunk, grad_chunk in zip(h.split(size), grad.split(size), strict=True):
            logits = h_chunk @ weight.t()
            grad_chunk.copy_(logits @ weight)
        ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_output), None
