"""The memory of a training step, counted with a model without values: nothing of it is allocated.

It is counted on the meta device (`mica.counting`), on which there is no autocast.

A step is recorded in parts: what is before the layers, each layer, the loss, and the same backwards. A part
adds as much to whatever is there already, so that a model of any depth, with any number of checkpointed
layers, follows from one layer of each kind, to the byte (tests/mica/cli/test_step_memory.py).
"""

import math
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mica.counting import Alive, held
from mica.errors import UsageError

# For ``attn_implementation``. PyTorch's own choice looks at values, and needs a GPU for flash attention.
ATTENTION = "counted"  # a name with "flash" in it would be looked for on the Hub
# transformers 5.24 has renamed it
ENABLE_CHECKPOINTING = "activation_checkpointing_enable"
if not hasattr(PreTrainedModel, ENABLE_CHECKPOINTING):
    ENABLE_CHECKPOINTING = "gradient_checkpointing_enable"


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


class Recorded(NamedTuple):
    """A step: what is before the layers, each layer, the loss, and the same backwards.

    ``weights``, ``trained``: bytes of the parameters of each layer, and of what is in none; the former with
    buffers and scales.
    """

    parts: list[Part]
    weights: list[int]
    trained: list[int]


def memory(plain: Recorded, checkpointed: Recorded, kinds: list[int], number: int) -> StepMemory:
    """What a step allocates of which the first ``number`` layers are checkpointed.

    ``plain``, ``checkpointed``: recorded with none and with all. ``kinds``: for each layer of the step the
    index of the recorded one. With some layers checkpointed the result may be low by a tensor or two of
    (tokens, hidden_size): what the call of the first other layer has the one before keep less of, which that
    one does not keep where it is checkpointed.
    """
    others = checkpointed.parts if number else plain.parts
    half = len(others) // 2
    forward, backward = [], []
    for index, kind in enumerate(kinds):
        parts = checkpointed.parts if index < number else plain.parts
        forward.append(parts[1 + kind])
        backward.insert(0, parts[-2 - kind])
    step = [others[0], *forward, *others[half - 1 : half + 1], *backward, others[-1]]
    levels = [0, *accumulate(part.change for part in step)]
    peaks = [level + part.peak for level, part in zip(levels, step, strict=False)]
    return StepMemory(kept=levels[len(step) // 2], peak=max(peaks))


def dropout_of_devices():
    """A context in which dropout keeps a mask of bytes, as on a GPU; elsewhere it has the dtype of x.

    No mode of PyTorch would do: within `backward` none sees what checkpointed layers compute again.
    """
    return patch.object(nn.functional, "dropout", _native_dropout)


def _native_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if training and p:
        input, _ = torch.native_dropout(input, p, training)
    return input


class _Parts(Alive):
    """Divides a step into parts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Part] = []
        self._start = 0
        self._is_left = False  # the last layer, but what only its call holds is still there

    def end_part(self, *_) -> None:
        """One part of the step is over, and the next begins."""
        self.parts.append(Part(self.bytes - self._start, self.peak - self._start))
        self._start = self.peak = self.bytes

    def enter(self, _, args) -> None:
        """A hook before each layer."""
        self.end_part()
        args[0].register_hook(self.end_part)

    def leave(self, _, args, output) -> None:
        """A hook after the last layer."""
        self._is_left = True
        h = output[0] if isinstance(output, tuple) else output
        h.register_hook(self.end_part)

    def __torch_dispatch__(self, *args, **kwargs):
        if self._is_left:
            self._is_left = False
            self.end_part()
        return super().__torch_dispatch__(*args, **kwargs)


def record(model: nn.Module, loss: Callable[[], Tensor]) -> Recorded:
    """What ``loss()`` of the model and its backward allocate. The gradients are cleared again."""
    layers = list(decoder_layers(model).values())
    weights, trained = [], []
    with dropout_of_devices(), _Parts() as alive:
        for module in (*layers, model):
            sizes = [(alive.note(tensor), tensor.requires_grad) for tensor in held(module)]
            weights.append(sum(size for size, _ in sizes))
            trained.append(sum(size for size, is_trained in sizes if is_trained))
        alive.end_part()
        hooks = [layer.register_forward_pre_hook(alive.enter) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(alive.leave))
        result = loss()
        alive.end_part()
        for hook in hooks:  # a recomputed layer would call them again
            hook.remove()
        result.backward()
        alive.end_part()
    model.zero_grad()
    return Recorded(alive.parts[1:], weights, trained)


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """What a forward has allocated while its result is held: the result, and what a backward would need."""
    with dropout_of_devices(), Alive() as alive:
        for tensor in held(model):
            alive.note(tensor)
        before = alive.bytes
        result = forward()  # noqa: F841
        return alive.bytes - before


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the decoder that can be checkpointed, by name. Raises UsageError if there are none."""
    named = model.get_decoder().named_modules()
    layers = {name: module for name, module in named if isinstance(module, GradientCheckpointingLayer)}
    if not layers:
        raise UsageError(f"{type(model).__name__} has no layers that can be checkpointed one by one")
    return layers


def shorten(model: nn.Module, adapted: Iterable[nn.Module]) -> list[int]:
    """Leave one layer of each kind in the model; they keep their names. ``adapted``: modules.

    What the layer before is like counts, too: a layer's call may have it keep less. So the first layer is a
    kind of its own; the embeddings that it gets outlive it. Returns for each layer that was there the index
    of the one that is left of its kind.
    """
    decoder = model.get_decoder()
    adapted = set(adapted)
    layers = decoder_layers(model)
    types = getattr(decoder.config, "layer_types", None) or [None] * len(layers)
    kinds = []
    before = None
    for (name, layer), layer_type in zip(layers.items(), types, strict=True):
        inside = tuple(inner for inner, module in layer.named_modules() if module in adapted)
        own = layer_type, repr(layer), inside
        kind = own, before
        before = own
        if kind in kinds:
            parent, _, index = name.rpartition(".")
            delattr(decoder.get_submodule(parent), index)  # `del` of a list would rename the others
        kinds.append(kind)
    left = list(dict.fromkeys(kinds))
    decoder.config.num_hidden_layers = len(left)
    if any(types):
        decoder.config.layer_types = [layer_type for (layer_type, *_), _ in left]
    return [left.index(kind) for kind in kinds]


def enable_checkpointing(model: nn.Module, **options) -> None:
    """Checkpoint all layers; ``options``: of `torch.utils.checkpoint.checkpoint`.

    The re-entrant kind gives frozen inputs no gradient.
    """
    getattr(model, ENABLE_CHECKPOINTING)({"use_reentrant": False, **options})


def checkpoint_first(model: nn.Module, number: int, **options) -> None:
    """Checkpoint so many layers: the first, whose backward comes when the others' memory is free."""
    enable_checkpointing(model, **options)
    for index, layer in enumerate(decoder_layers(model).values()):
        layer.gradient_checkpointing = index < number


def loss_of(model: nn.Module, ids: Tensor, in_chunks: bool) -> Callable[[], Tensor]:
    """A function that computes a causal language model's loss.

    ``in_chunks``: without the logits of all tokens at once.
    """
    if not in_chunks:
        return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss

    def loss() -> Tensor:
        h = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        return ChunkedLoss.apply(h.flatten(0, -2), model.get_output_embeddings().weight)

    return loss


class ChunkedLoss(torch.autograd.Function):
    """Allocates what Liger's fused linear cross entropy does for a frozen output layer; the loss is 0.

    Of h (tokens, hidden_size) and the weight (vocabulary, hidden_size). The logits of some tokens at a time,
    which their gradient overwrites, and already in the forward the gradient of h.
    `torch.nn.functional.linear_cross_entropy` in chunks keeps the same.
    """

    @staticmethod
    def forward(ctx, h, weight):
        (tokens, width), vocabulary = h.shape, len(weight)
        size = 2 ** math.ceil(math.log2(tokens / math.ceil(vocabulary / width)))
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
