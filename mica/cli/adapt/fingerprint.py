"""Hashes of contents: of a file, and of the base model for the price of a few reads.

B belongs to the weights that it was computed from, and A was trained on them. A hash of all would read the
whole base; `of` reads the headers and, of up to `TENSORS` tensors, two pieces.
"""

import hashlib
import json
import struct
from contextlib import suppress
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mica.cli.adapt import processes

BASE = "base_weights"  # the fact in the marker of a checkpoint
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


def facts(location: str) -> dict[str, str]:
    """`of` the base as a fact for the marker of a checkpoint; empty where it cannot be had.

    Every process must call this. Raises UsageError in all of them if they see different files.
    """
    found = processes.alike(of(location), f"the weights in {location}")
    return {BASE: found} if found else {}


def of(location: str) -> str | None:
    """A hash of the configuration, of names, dtypes and shapes of the weights, and of some of their bytes.

    ``location``: a folder, or a name on the Hub, of which the copy in the cache counts. None where the
    safetensors and the configuration are not all there. Names and times of files do not matter.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        folder = Path(location)
        if not location or not folder.is_dir():
            folder = Path(try_to_load_from_cache(location, CONFIG_NAME)).parent
        return _of(folder)
    return None  # who loads the model says what is wrong


def _of(folder: Path) -> str:
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    total = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8)
    files = [folder / SAFE_WEIGHTS_NAME]  # what transformers reads of all that may lie there
    if not files[0].is_file():
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    places = []
    for path in files:
        with path.open("rb") as file:  # size of the header; tensor -> dtype, shape, place; tensors
            (size,) = struct.unpack("<Q", file.read(8))
            header = file.read(min(size, 10**8))  # the format's limit
        total.update(header)
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        places.append((path, 8 + len(header), sorted(each["data_offsets"] for each in tensors.values())))
    every = -(-sum(len(offsets) for *_, offsets in places) // TENSORS) or 1
    for path, begin, offsets in places:
        with path.open("rb") as file:
            for first, last in offsets[::every]:
                # from the middle and the end of a tensor; all of a small one
                middle = first if last - first <= 2 * PIECE else (first + last - PIECE) // 2
                for at in (middle, max(middle + PIECE, last - PIECE)):
                    file.seek(begin + at)
                    total.update(file.read(min(PIECE, max(0, last - at))))
    return total.hexdigest()
