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
    """A hash of the configuration, of names, dtypes and shapes of the weights, and of some of their bytes.

    ``location``: a folder, or a name on the Hub, of which the copy in the cache counts. None where the
    safetensors and the configuration are not all there. Names and times of files do not matter.
    """
    try:
        if Path(location).is_dir():
            return _of(Path(location)) if location else None
        config = try_to_load_from_cache(location, CONFIG_NAME)
        return _of(Path(config).parent) if isinstance(config, str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None  # who loads the model says what is wrong


def _of(folder: Path) -> str:
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    total = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8)
    places = []
    for path in _weights(folder):
        header = _header(path)
        total.update(header)
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        begin = 8 + len(header)
        offsets = sorted(tensor["data_offsets"] for tensor in tensors.values())
        places.append((path, [(begin + first, begin + last) for first, last in offsets]))
    every = -(-sum(len(spans) for _, spans in places) // TENSORS) or 1
    for path, spans in places:
        with path.open("rb") as file:
            for first, last in spans[::every]:
                for piece in _pieces(file, first, last):
                    total.update(piece)
    return total.hexdigest()


def _weights(folder: Path) -> list[Path]:
    """The files that transformers reads, of all that may lie in the folder."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _header(path: Path) -> bytes:
    """JSON of safetensors' format: tensor -> dtype, shape, and where it is behind the header."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return file.read(min(size, 10**8))  # the format's limit


def _pieces(file: BinaryIO, first: int, last: int) -> Iterator[bytes]:
    """From the middle and the end of a tensor; all of a small one."""
    middle = first if last - first <= 2 * PIECE else (first + last - PIECE) // 2
    for at in (middle, max(middle + PIECE, last - PIECE)):
        file.seek(at)
        yield file.read(min(PIECE, max(0, last - at)))
