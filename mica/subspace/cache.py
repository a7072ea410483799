"""Minor subspaces kept on disk, for sweeps that initialise the same model again and again.

A result is found by the content of its weight, ``fingerprint``, so that a renamed, copied or quietly changed
checkpoint is told apart by what it holds. One file holds one weight, at the largest rank it was solved for,
which serves the smaller ranks. Only certified results are kept, nothing damaged is ever trusted, and no
trouble with the disk reaches the caller: it costs a recomputation and one line in the log. The folder may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import constants

from mica.subspace.result import MinorSubspace, narrowed

# To be raised whenever the solver's results, ``fingerprint`` or the files change.
VERSION = 1

ABANDONED_AFTER = 24 * 3600.0  # seconds, for the temporary file of a writer that was killed

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}

_OFF = ("", "0", "off", "false", "no")
_ON = ("1", "on", "true", "yes")

# Bytes of each of the two buffers of ``_row_digests``. On a CPU the work on a block should outweigh its five
# calls and stay in the cache: 64 KiB, 512 KiB, 2 MiB and 8 MiB give 1.9, 3.1, 3.4 and 2.2 GB/s.
_CPU_BUFFER = 512 << 10
_DEVICE_BUFFER = 4 << 20

_logger = logging.getLogger("mica")
_TEMPORARY_NAME = re.compile(r"[0-9a-f]{40}\.[0-9a-f]{32}\.tmp")  # nobody else's files are swept
_warned: set[Path] = set()
_warned_lock = threading.Lock()


def default_cache() -> SubspaceCache | None:
    """The cache that the environment variable ``MICA_CACHE`` names now, or None where it turns caching off.

    Unset, or "1", "on", "true", "yes": the folder ``mica`` of the Hugging Face cache (HF_HOME). "0", "off",
    "false", "no" and the empty string: None. Anything else is a folder; ``~`` is expanded.
    """
    setting = os.environ.get("MICA_CACHE", "on")
    if setting.strip().lower() in _OFF:
        return None
    if setting.strip().lower() in _ON:
        return SubspaceCache(Path(constants.HF_HOME) / "mica")
    return SubspaceCache(os.path.expanduser(setting))  # pathlib's raises where there is no home


class SubspaceCache:
    """Minor subspaces by weight content in ``folder``, which the first ``put`` creates.

    Any number of threads and processes may use one folder. No method raises because of the disk.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._swept = False

    def get(self, weight: torch.Tensor, rank: int, *, key: str | None = None) -> MinorSubspace | None:
        """The minor subspace of ``weight`` (out_features, in_features) of that rank, or None: recompute.

        Its tensors own their memory and are on the weight's device. It is certified: at the rank it was
        stored with it is what was stored, bit for bit; a smaller rank takes the last columns, if what was
        proven of all of them certifies these alone. Whichever ``method`` the caller has in mind, a stored
        result of any method answers.

        Args:
            weight: as ``minor_subspace`` takes it; a stack of matrices is never found.
            rank: of any size; one that was not stored is a miss.
            key: ``fingerprint(weight)``, where the caller has it.
        """
        if not _is_matrix(weight):
            return None
        stored = self._read(key or fingerprint(weight), weight)
        if stored is None or not 1 <= rank <= stored.basis.shape[1]:
            return None
        found = narrowed(stored, rank)
        if found is None:
            return None
        return dataclasses.replace(
            found,
            basis=found.basis.to(weight.device),
            singular_values=found.singular_values.to(weight.device),
        )

    def put(self, weight: torch.Tensor, subspace: MinorSubspace, *, key: str | None = None) -> None:
        """Keep ``subspace``, unless as many columns or more are stored for ``weight``.

        Left out without a word: what is not certified, stacks of matrices, and what holds numerically null
        directions of a tall weight, which are arbitrary: the solver warns of them, each time.
        """
        if not _is_matrix(weight) or not _is_worth_keeping(weight, subspace):
            return
        key = key or fingerprint(weight)
        stored = self._read(key, weight)
        if stored is None or stored.basis.shape[1] < subspace.basis.shape[1]:
            self._write(key, _encoded(key, subspace))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str, weight: torch.Tensor) -> MinorSubspace | None:
        path = self._path(key)
        try:
            # Read whole, not mapped: another process may replace or truncate the file at any time.
            return _decoded(path.read_bytes(), key, weight)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # whatever a damaged file can cause
            _warn_once(path, f"{path} is not a usable cached subspace, it is recomputed: {error!r}")
            return None

    def _write(self, key: str, content: bytes) -> None:
        """Whole or not at all: a temporary file of its own that takes the name when it is complete.

        Not forced to the disk, which takes up to 10 ms a layer: what a power failure leaves behind fails the
        checksum.
        """
        temporary = self.folder / f"{key}.{uuid.uuid4().hex}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._swept:
                self._swept = True
                self._sweep()
            try:
                temporary.write_bytes(content)
                os.replace(temporary, self._path(key))
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()  # there only after a failure
        except OSError as error:
            _warn_once(self.folder, f"{self.folder} cannot be written, subspaces are not cached: {error!r}")
        else:
            with _warned_lock:
                _warned.discard(self._path(key))

    def _sweep(self) -> None:
        oldest = time.time() - ABANDONED_AFTER
        for path in self.folder.iterdir():
            if _TEMPORARY_NAME.fullmatch(path.name):
                with contextlib.suppress(OSError):  # another process swept it
                    if path.stat().st_mtime < oldest:
                        path.unlink()


@torch.no_grad()
def fingerprint(weight: torch.Tensor) -> str:
    """40 hexadecimal digits for the bits of ``weight`` (out_features, in_features), its shape and dtype.

    The same on every device, where all but 8 bytes a row stays; the temporary memory is two rows or a few
    MiB. It goes along the memory, so that a column-major weight (an embedding's ``weight.T``) differs from
    its row-major copy; otherwise strides, offset and padding are of no account.

    Bits are bits: 0.0 and -0.0 differ, and so do NaNs of different payloads. With one thread of an EPYC
    (AVX-512): 3.0 GB/s for 4096 x 4096 fp32 (22 ms), 3.2 GB/s for bf16 and for the transposed view of a
    49152 x 576 bf16 embedding (18 ms), 2.9 GB/s where rows must be copied to be read as 64-bit words.

    Raises:
        ValueError: weight is not a non-empty 2-D tensor of fp64, fp32, bf16 or fp16 that holds data.
    """
    if not _is_matrix(weight):
        raise ValueError(
            "weight must be a non-empty 2-D tensor of dtype float64, float32, bfloat16 or float16, but got "
            f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}."
        )
    column_major = not weight.is_contiguous() and weight.stride(0) < weight.stride(1)
    bits = weight.detach().view(_BITS[weight.dtype])
    rows = _row_digests(bits.T if column_major else bits)
    what = f"mica {VERSION} {weight.dtype} {tuple(weight.shape)} {'columns' if column_major else 'rows'}\n"
    return hashlib.blake2b(what.encode() + rows.cpu().numpy().tobytes(), digest_size=20).hexdigest()


def _row_digests(bits: torch.Tensor) -> torch.Tensor:
    """A 64-bit digest of each row: (rows,) int64, from (rows, columns) int16, int32 or int64.

    A row is read as 64-bit words x_j, zeros added at its end, and its digest is Σ b_j mix(a_j x_j) mod 2^64
    with mix(y) = y xor (y >> 32) and odd pseudo-random a_j, b_j. Each step is one to one, hence a change
    within one word is always seen. Without ``mix`` it would be twice as fast, and blind to two changes of
    the topmost bits of words: two signs turned.
    """
    rows, columns = bits.shape
    per_word = 8 // bits.element_size()
    words = -(-columns // per_word)
    first, second = (_odd_numbers(words, seed).to(bits.device) for seed in (1, 2))
    buffer_bytes = _CPU_BUFFER if bits.device.type == "cpu" else _DEVICE_BUFFER
    height = min(rows, max(1, buffer_bytes // (8 * words)))
    products, shifted = (torch.empty(height, words, dtype=torch.int64, device=bits.device) for _ in range(2))
    padded = None
    if not _holds_words(bits, per_word):
        padded = torch.zeros(height, words * per_word, dtype=bits.dtype, device=bits.device)
    digests = []
    for block in bits.split(height):
        if padded is not None:
            padded[: len(block), :columns] = block
            block = padded[: len(block)]
        product, shift = products[: len(block)], shifted[: len(block)]
        torch.mul(block.view(torch.int64), first, out=product)
        torch.bitwise_right_shift(product, 32, out=shift)
        product.bitwise_xor_(shift.bitwise_and_(0xFFFFFFFF))  # the shift fills with the sign
        digests.append(product.mul_(second).sum(1))
    return torch.cat(digests)


def _holds_words(bits: torch.Tensor, per_word: int) -> bool:
    """Whether each row can be read in place as 64-bit words."""
    return (
        bits.stride(1) == 1
        and all(n % per_word == 0 for n in (bits.shape[1], bits.stride(0), bits.storage_offset()))
        and bits.data_ptr() % 8 == 0
    )


def _odd_numbers(count: int, seed: int) -> torch.Tensor:
    """(count,) odd int64, pseudo-random and the same everywhere: splitmix64."""
    state = (np.arange(count, dtype=np.uint64) + np.uint64(seed << 40)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = (state ^ (state >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(state.view(np.int64))


def _is_matrix(weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and weight.numel() > 0 and weight.dtype in _BITS and weight.device.type != "meta"


def _is_worth_keeping(weight: torch.Tensor, subspace: MinorSubspace) -> bool:
    if not subspace.certified or subspace.null_count or not _fits(weight, subspace):
        return False
    energy = subspace.singular_values.double().square().sum().item()  # infinite for an fp64 weight of 1e200
    return math.isfinite(energy + subspace.energy_excess + subspace.resolution)


def _fits(weight: torch.Tensor, subspace: MinorSubspace) -> bool:
    rank = subspace.singular_values.numel()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (
        1 <= rank <= min(weight.shape)
        and subspace.singular_values.shape == (rank,)
        and subspace.basis.shape == (weight.shape[0], rank)
        and subspace.basis.dtype == subspace.singular_values.dtype == dtype
    )


def _encoded(key: str, subspace: MinorSubspace) -> bytes:
    """The file: a safetensors file of the two tensors, the rest as strings in its metadata."""
    tensors = {
        name: getattr(subspace, name).detach().cpu().contiguous() for name in ("basis", "singular_values")
    }
    metadata = {
        "version": str(VERSION),
        "key": key,
        "rank": str(subspace.basis.shape[1]),
        "method": subspace.method,
        "certified": str(subspace.certified),
        "energy_excess": repr(float(subspace.energy_excess)),
        "resolution": repr(float(subspace.resolution)),
    }
    metadata["checksum"] = _checksum(*_parted(safetensors.torch.save(tensors, metadata)))
    return safetensors.torch.save(tensors, metadata)


def _decoded(content: bytes, key: str, weight: torch.Tensor) -> MinorSubspace:
    """The result, on the CPU, from the bytes of its file; an exception of any kind where they are not it."""
    header, data = _parted(content)
    metadata = header["__metadata__"]
    if metadata["checksum"] != _checksum(header, data):
        raise ValueError("the checksum is wrong")
    if metadata["version"] != str(VERSION) or metadata["key"] != key or metadata["certified"] != "True":
        raise ValueError("it is of another version or of another weight")
    subspace = MinorSubspace(
        **safetensors.torch.load(content),
        method=metadata["method"],
        certified=True,
        energy_excess=float(metadata["energy_excess"]),
        resolution=float(metadata["resolution"]),
    )
    if not _fits(weight, subspace):
        raise ValueError("its shapes or dtypes are not the weight's")
    return subspace


def _parted(content: bytes) -> tuple[dict, bytes]:
    """The header and the data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _checksum(header: dict, data: bytes) -> str:
    """Of names, shapes, dtypes and metadata, the checksum itself left out, and of all data."""
    metadata = {name: value for name, value in header["__metadata__"].items() if name != "checksum"}
    described = json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode()
    return hashlib.blake2b(described + b"\n" + data, digest_size=20).hexdigest()


def _warn_once(path: Path, message: str) -> None:
    with _warned_lock:
        if path in _warned:
            return
        _warned.add(path)
    _logger.warning(message)
