"""A hash of the base model for the price of a few reads.

B belongs to the weights that it was computed from, and A was trained on them. A hash of all would read the
whole base; `of` reads the headers and a piece of each tensor.
"""

import hashlib
import json
import struct
from contextlib import suppress
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

BASE = "base_weights"  # its name in summary.json and in the marker of a checkpoint
PIECE = 4096  # bytes
_VOLATILE = ("transformers_version", "_name_or_path")  # of who has written config.json, and where


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


def _of(folder: Path) -> str:
    config = json.loads((folder / CONFIG_NAME).read_bytes())
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    total = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8)

    files = [folder / SAFE_WEIGHTS_NAME]  # what transformers reads of all that may lie there
    if not files[0].is_file():
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_bytes())
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    for path in files:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))  # of the header: JSON, tensor -> dtype, shape, place
            header = file.read(min(size, 10**8))  # the format's limit
            total.update(header)
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            for tensor in tensors.values():
                first, last = tensor["data_offsets"]
                middle = (first + last) // 2
                file.seek(8 + size + middle)
                total.update(file.read(min(PIECE, last - middle)))
    return total.hexdigest()
