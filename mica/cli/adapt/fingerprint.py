"""Hashes of contents: of a file, and of the base model for the price of a few reads.

B belongs to the weights that it was computed from, and A was trained on them. A hash of all would read the
whole base; `of` reads the headers and, of up to `TENSORS` tensors, two pieces.
"""

import hashlib
import json
import math
import struct
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

BASE = "base_weights"  # its name in summary.json and in the marker of a checkpoint
TENSORS = 1024  # all of a dense model of 100 layers
PIECE = 4096  # bytes
_VOLATILE = ("transformers_version", "_name_or_path")  # of who has written config.json, and where


def of_file(path: Path, start: bytes = b"") -> bytes:
    """16 bytes: the hash of ``start`` and all of a file, at 1 GB/s."""
    total = hashlib.blake2b(start, digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            total.update(chunk)
    return total.digest()


def of(location: str) -> str | None:
    """A hash of the configuration, of names, dtypes and shapes of the weights, and of some of their bytes.

    ``location``: a folder, or a name on the Hub, of which the copy in the cache counts. None where the
    safetensors and the configuration are not all there. Names and times of files do not matter.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        folder = Path(location)
        if not location or not folder.is_dir():  # an empty name would be the working directory
            folder = Path(try_to_load_from_cache(location, CONFIG_NAME)).parent
        return _of(folder)
    return None  # who loads the model says what is wrong


class _Layout(NamedTuple):
    """Where the tensors of a safetensors file are: ``offsets``, sorted pairs of bytes after ``begin``."""

    path: Path
    begin: int
    offsets: list[tuple[int, int]]


def _of(folder: Path) -> str:
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    total = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8)

    layouts = []
    for path in _weight_files(folder):
        header = _header(path)
        total.update(header)
        layouts.append(_layout(path, header))

    tensors = sum(len(layout.offsets) for layout in layouts)
    every = max(1, math.ceil(tensors / TENSORS))
    for layout in layouts:
        with layout.path.open("rb") as file:
            for first, last in layout.offsets[::every]:
                for at, size in _pieces(first, last):
                    file.seek(layout.begin + at)
                    total.update(file.read(size))
    return total.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """What transformers reads of all that may lie there."""
    whole = folder / SAFE_WEIGHTS_NAME
    if whole.is_file():
        return [whole]
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _header(path: Path) -> bytes:
    """JSON: tensor -> dtype, shape, place. Eight bytes before it have its size."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return file.read(min(size, 10**8))  # the format's limit


def _layout(path: Path, header: bytes) -> _Layout:
    tensors = json.loads(header)
    tensors.pop("__metadata__", None)
    return _Layout(path, 8 + len(header), sorted(each["data_offsets"] for each in tensors.values()))


def _pieces(first: int, last: int) -> list[tuple[int, int]]:
    """Offset and size of two pieces of a tensor, from its middle and its end; all of a small one."""
    middle = first
    if last - first > 2 * PIECE:
        middle = (first + last - PIECE) // 2
    pieces = []
    for at in (middle, max(middle + PIECE, last - PIECE)):
        pieces.append((at, min(PIECE, max(0, last - at))))
    return pieces
