"""Whether the base model is still the one that a run began with, for the price of a few reads.

B belongs to the weights that it was computed from, and A was trained on them. A hash of all would read the
whole base; this one reads the headers and, of up to `TENSORS` tensors, two pieces.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import try_to_load_from_cache
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mica.cli.adapt import checkpoints, processes

TENSORS = 1024  # all of a dense model of 100 layers
PIECE = 4096  # bytes
_VOLATILE = ("transformers_version", "_name_or_path")  # of who has written config.json, and where


def facts(location: str) -> dict[str, str]:
    """`of` the base as a fact for the marker of a checkpoint; empty where it cannot be had.

    Every process must call this. Raises UsageError in all of them if they see different files.
    """
    found = processes.alike(of(location), f"the weights in {location}")
    return {checkpoints.BASE: found} if found else {}


def of(location: str) -> str | None:
    """A hash of the configuration and of names, dtypes, shapes and some bytes of the weights of a model.

    ``location``: a folder, or a name on the Hub, of which the copy in the cache counts. None where the
    safetensors and the configuration are not all there. Names and times of files do not matter.
    """
    if not location:
        return None
    if not Path(location).is_dir():
        cached = try_to_load_from_cache(location, CONFIG_NAME)
        if not isinstance(cached, str):
            return None
        location = str(Path(cached).parent)
    try:
        return _of(Path(location))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None  # who loads the model says what is wrong


def _of(folder: Path) -> str:
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    total = hashlib.blake2b(digest_size=8)
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    total.update(json.dumps(kept, sort_keys=True).encode())
    files = {path: _tensors(path) for path in _weights(folder)}
    every = -(-sum(map(len, files.values())) // TENSORS)
    number = 0
    for path, tensors in files.items():
        with path.open("rb") as file:
            for name, dtype, shape, begin, end in tensors:
                total.update(json.dumps([name, dtype, shape]).encode())
                if number % every == 0:
                    for piece in _pieces(file, begin, end):
                        total.update(piece)
                number += 1
    return total.hexdigest()


def _weights(folder: Path) -> list[Path]:
    """The files that transformers reads, of all that may lie in the folder."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _tensors(path: Path) -> list[tuple[str, str, list[int], int, int]]:
    """Name, dtype, shape, begin and end in the file, in the order of the file (safetensors' format)."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(size, 10**8)))  # the format's limit
    header.pop("__metadata__", None)
    found = (
        (name, entry["dtype"], entry["shape"], *(8 + size + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    )
    return sorted(found, key=lambda tensor: tensor[3:])


def _pieces(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    """From the middle and the end of a tensor; all of a small one."""
    middle = begin if end - begin <= 2 * PIECE else (begin + end - PIECE) // 2
    for at in (middle, max(middle + PIECE, end - PIECE)):
        file.seek(at)
        yield file.read(min(PIECE, max(0, end - at)))
