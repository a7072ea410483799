"""Plain text to blocks of tokens: reading, packing, and the split into training and held-out blocks."""

from pathlib import Path
from typing import NamedTuple

import torch

from mica.errors import UsageError


class Blocks(NamedTuple):
    """Token ids, int64. ``train``: (num_train_blocks, sequence_length), ``held_out``: the same width."""

    train: torch.Tensor
    held_out: torch.Tensor


def read_texts(paths: list[Path]) -> list[str]:
    """Return the contents of UTF-8 files. Raises UsageError, naming the file, for anything unusable."""
    texts = []
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(f"--text {path}: not UTF-8 text (at byte {error.start})") from error
        except OSError as error:  # missing, a directory, no permission
            raise UsageError(f"--text {path}: cannot be read: {error.strerror}") from error
        if not text.strip():
            raise UsageError(f"--text {path}: the file is empty")
        texts.append(text)
    return texts


def _join(documents: list[list[int]], separator: int | None) -> list[int]:
    stream = []
    for document in documents:
        if stream and separator is not None:
            stream.append(separator)
        stream += document
    return stream


def pack(
    documents: list[list[int]], sequence_length: int, held_out: float, separator: int | None = None
) -> Blocks:
    """Pack token ids into blocks of ``sequence_length`` and hold out the end of every document.

    ``documents`` holds the token ids of one file each; ``held_out`` is a fraction in (0, 1). A document
    of n whole blocks gives its last ``int(n * held_out)`` blocks to the held-out set; the rest of
    the documents is joined, with the token ``separator`` in between, and cut into training blocks. The
    unfilled last block is dropped. Where every document is too short to give a block, the joined
    documents count as one and give at least one block.

    Raises UsageError if there is not enough text for one training and one held-out block.
    """

    def num_held_out(document):
        return int(len(document) // sequence_length * held_out)

    counts = [num_held_out(document) for document in documents]
    if not any(counts):
        documents = [_join(documents, separator)]
        counts = [max(1, num_held_out(documents[0]))]
        if len(documents[0]) < 2 * sequence_length:
            raise UsageError(
                f"--text: {len(documents[0])} tokens found, {2 * sequence_length} needed: one training and "
                f"one held-out block of --sequence-length {sequence_length}"
            )
    heads, tails = [], []
    for document, count in zip(documents, counts, strict=True):
        cut = len(document) - count * sequence_length
        heads.append(document[:cut])
        tails += document[cut:]
    stream = _join(heads, separator)
    stream = stream[: len(stream) // sequence_length * sequence_length]
    return Blocks(
        train=torch.tensor(stream).view(-1, sequence_length),
        held_out=torch.tensor(tails).view(-1, sequence_length),
    )


def spread(blocks: torch.Tensor, limit: int) -> torch.Tensor:
    """Return at most ``limit`` of ``blocks``, evenly spaced, so that every file keeps its share."""
    if len(blocks) <= limit:
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, limit).round().long()]
