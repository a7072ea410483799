"""A weight's content as a key: for the cache on disk, and to say whether processes hold the same weight."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from mica.memory import in_memory
from mica.row_checksums import WORDS, row_checksums


@torch.no_grad()
def content_hash(weight: Tensor) -> str:
    """64 hexadecimal digits for the bits of ``weight`` (out_features, in_features), its shape and dtype.

    It hashes a sum of each row (``row_checksums``), of 64 bits each: a change of a single number, or of signs
    alone, always changes the sum of its row, and other accidents miss a row once in 2^31 times or less. It is
    no protection from someone who makes a weight to have the key of another one.

    The key is the same on every device, on which the sums are made, and only they are copied. Rows are those
    of the memory, so that a column-major weight (an embedding's ``weight.T``) has another key than its
    row-major copy; otherwise strides, offset and padding do not matter. Bits are compared, not numbers: 0.0
    and -0.0 differ, and so do NaNs with different payloads.

    Args:
        weight: (out_features, in_features), not empty, of any strides.
    """
    rows = in_memory(weight.detach()).view(WORDS[weight.itemsize])
    order = "rows"
    if not weight.is_contiguous() and weight.stride(0) < weight.stride(1):
        rows = rows.T
        order = "columns"
    # in words of 8 bytes, two of the uppermost bits would cancel
    has_whole_words = rows.shape[1] * rows.element_size() % 4 == 0
    sums = row_checksums(rows, torch.int32 if has_whole_words else torch.int16).cpu().numpy()
    header = f"{weight.dtype} {tuple(weight.shape)} {order}\n".encode()
    return hashlib.blake2b(header + sums.tobytes(), digest_size=32).hexdigest()
