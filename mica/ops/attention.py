"""What attention keeps for its backward, and what is a copy of that."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from mica.ops.computed import (
    CLONE,
    TRANSPOSE,
    Computed,
    Part,
    before_views,
    kept_by,
    output_before,
    part_of,
    relieve,
)

_INPUTS = ("query", "key", "value")
_CALLED = "An input of attention"


def is_attention(node) -> bool:
    """Whether it is a node of one of the forms of `scaled_dot_product_attention` that keep their output."""
    return type(node).__name__.startswith("ScaledDotProduct") and hasattr(node, "_raw_saved_output")


def copied_output(node) -> Computed | None:
    """``output.transpose(1, 2).contiguous()`` in any shape: the output itself is kept."""
    copy, _ = before_views(node, 0)
    if copy is node or type(copy) is not CLONE:
        return None
    transpose = copy.next_functions[0][0]
    if type(transpose) is not TRANSPOSE or (transpose._saved_dim0, transpose._saved_dim1) != (1, 2):
        return None
    made_by, number = before_views(*transpose.next_functions[0])
    output = kept_by(made_by, "output") if is_attention(made_by) and number == 0 else None
    if output is None:
        return None
    heads = output_before(transpose, 0).shape
    shape = node._input_metadata[0].shape

    def function(output):
        return output.view(heads).transpose(1, 2).reshape(shape)

    return Computed(function, Part(output, "The output of attention"))


def keep_less(node) -> None:
    """What can be computed again of q, k and v, and v alone where they are one product that nobody keeps."""
    for position, name in enumerate(_INPUTS):
        part_of(node, name, position, _CALLED)
    q, k, v = (kept_by(node, name) for name in _INPUTS)
    if q is None or k is None or v is None:
        return
    memory = v.untyped_storage()
    is_shared = memory._cdata in (q.untyped_storage()._cdata, k.untyped_storage()._cdata)
    if is_shared or memory.nbytes() < 1.5 * v.nbytes:
        return
    spread = partial(_spread, stride=v.stride())  # products of another layout might be rounded in another way
    relieve(node._raw_saved_value, Computed(spread, Part(v.clone(), _CALLED)))


def _spread(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    return tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)
