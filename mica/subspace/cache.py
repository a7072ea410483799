"""Minor subspaces kept on disk, for sweeps that initialise the same model again and again.

The key of a result is the content of its weight, ``fingerprint``, whatever the checkpoint is called, and its
rank: the last columns of a larger rank's basis span the same subspace, but with other bits. One file holds
one result. Only certified results are kept. What is read is checked against the weight: its columns must be
orthonormal and have the stored singular values. That does not prove it to be the minor subspace, which takes
a solution; so no file is read that another user could have written. Disk errors never reach the caller: they
cost a recomputation and one line in the log. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
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

import safetensors.torch
import torch
from huggingface_hub import constants

from mica.folders import distrusted, folder_named, foreign
from mica.subspace.device import is_on_host
from mica.subspace.fingerprint import fingerprint, is_weight
from mica.subspace.gram import image, transposed_image
from mica.subspace.krylov import resolution
from mica.subspace.result import CERTIFIED_EXCESS, MinorSubspace, moved

# Raise it whenever the solver's results, ``fingerprint`` or the files change.
VERSION = 3

ABANDONED_AFTER = 24 * 3600.0  # seconds, for the temporary file of a writer that was killed

# Bytes of all files: 224 layers of a model of 7e9 parameters take 0.1 GB at rank 16, 0.7 GB at rank 128.
SIZE = 10 << 30

# At most max |BᵀB − I| for what is read. That of a result as returned stays below half of it.
_ORTHONORMAL = 2e-6

_HEADER_BYTES = 1 << 16  # more than a file's header and checksum take
_CHECKSUM_BYTES = 20

_logger = logging.getLogger("mica")
# Only files of the cache's own names are ever deleted.
_STORED_NAME = re.compile(r"[0-9a-f]{64}\.\d+\.subspace")
_TEMPORARY_NAME = re.compile(r"[0-9a-f]{64}\.\d+\.[0-9a-f]{32}\.tmp")
_warned: set[Path] = set()
_warned_lock = threading.Lock()


def default_cache() -> SubspaceCache | None:
    """The cache that the environment variable ``MICA_CACHE`` names now, or None where it turns caching off.

    Unset, or "1", "on", "true", "yes": the folder ``mica`` of the Hugging Face cache (HF_HOME). "0", "off",
    "false", "no" and the empty string: None. Anything else is a folder; ``~`` is expanded.
    ``MICA_CACHE_SIZE`` limits what it holds, in bytes ("500MB", "2GiB"); unset: 10 GiB.

    Raises:
        ValueError: ``MICA_CACHE_SIZE`` is not such a number.
    """
    folder = folder_named(os.environ.get("MICA_CACHE", "on"), Path(constants.HF_HOME) / "mica")
    if folder is None:
        return None
    return SubspaceCache(folder, _bytes(os.environ.get("MICA_CACHE_SIZE", "")))


def _bytes(setting: str) -> int:
    """The number of bytes that ``MICA_CACHE_SIZE`` names."""
    if not setting.strip():
        return SIZE
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?)b?", setting.strip().lower())
    if not match:
        raise ValueError(
            f"MICA_CACHE_SIZE must be a number of bytes, as 500000000, 500MB or 2GiB, but it is {setting!r}."
        )
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    exponent = " kmgt".index(prefix or " ")
    return int(float(number) * base**exponent)


class SubspaceCache:
    """Minor subspaces by weight content and rank in ``folder``, which the first ``put`` creates.

    Any number of threads and processes may use one folder. No method raises because of the disk.

    Args:
        folder: not used, with one warning, if users other than this one and root can write to it.
        size: the most bytes that its files take; beyond it, the least recently used are deleted. What other
            processes write meanwhile is counted when the next process begins to write.
    """

    def __init__(self, folder: str | os.PathLike[str], size: int = SIZE) -> None:
        self.folder = Path(folder)
        self.size = size
        self._lock = threading.Lock()
        self._held = math.inf  # bytes, as far as known: the first ``put`` counts them

    def get(self, weight: torch.Tensor, rank: int, *, key: str | None = None) -> MinorSubspace | None:
        """The minor subspace of ``weight`` (out_features, in_features) of that rank; None if not stored.

        The result has the stored bits and is certified, whatever ``method`` it came from. Its tensors own
        their memory and are on the weight's device.

        Args:
            weight: as ``minor_subspace`` takes it; a stack of matrices is always a miss.
            rank: of any size; one that was not stored is a miss.
            key: ``fingerprint(weight)``, where the caller has it.
        """
        if not is_weight(weight) or not self._is_trusted():
            return None
        stored = self._read(key or fingerprint(weight), weight, rank)
        if stored is None:
            return None
        return moved(stored, weight.device)

    def put(self, weight: torch.Tensor, subspace: MinorSubspace, *, key: str | None = None) -> None:
        """Keep ``subspace``, in place of what is stored for ``weight`` and its rank.

        Some results are silently not kept: those that are not certified, those of stacks of matrices and of
        fp64 weights whose squares leave fp64's range, and those larger than the whole cache may be. Nor are
        those with numerically null directions of a tall weight, which are arbitrary: the solver is to warn of
        them each time.
        """
        if not is_weight(weight) or not _is_worth_keeping(weight, subspace):
            return
        key = key or fingerprint(weight)
        content = encoded(key, subspace)
        if len(content) <= self.size:
            rank = subspace.basis.shape[1]
            self._write(self.path(key, rank), content)

    def path(self, key: str, rank: int) -> Path:
        """The file for the result of this rank of the weight with this ``fingerprint``."""
        return self.folder / f"{key}.{rank}.subspace"

    def _is_trusted(self) -> bool:
        """Whether no other user can have written to the folder; warns if one can."""
        why = distrusted(self.folder)
        if why is None:
            return True
        _warn_once(
            self.folder,
            f"{self.folder} {why}: subspaces are neither read from it nor stored in it. Make it yours alone "
            "(chown, chmod go-w), or name another folder with MICA_CACHE.",
        )
        return False

    def _read(self, key: str, weight: torch.Tensor, rank: int) -> MinorSubspace | None:
        """What is stored, on the CPU, if it is the weight's; None if there is nothing or it is damaged."""
        path = self.path(key, rank)
        most_bytes = rank * (weight.shape[0] + 1) * 8 + _HEADER_BYTES
        try:
            # Read whole, not mapped: another process may replace or truncate the file at any time.
            content = _content(path, most_bytes)
            subspace = _decoded(content, key, weight, rank)
            _verify(weight, subspace)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # whatever a damaged file can cause
            _warn_once(path, f"{path} is not a usable cached subspace, so it is recomputed: {error!r}")
            return None

        with contextlib.suppress(OSError):  # in a folder that this user may only read
            os.utime(path)
        return subspace

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file whole or not at all: as a temporary file, which is renamed when it is complete.

        Without fsync, which takes up to 10 ms per layer: what a power failure leaves fails the checksum.
        """
        temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o755, exist_ok=True)  # even if the umask lets others write
            if not self._is_trusted():
                return
            try:
                temporary.touch(mode=0o644, exist_ok=False)
                temporary.write_bytes(content)
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()  # it exists only after a failure
            with self._lock:
                self._held += len(content)
                if self._held > self.size:
                    self._evict()
        except OSError as error:
            _warn_once(
                self.folder, f"{self.folder} cannot be written, so subspaces are not cached: {error!r}"
            )
        else:
            with _warned_lock:
                _warned.discard(path)

    def _evict(self) -> None:
        """Delete what killed writers left, and the least recently used results beyond ``size``."""
        now = time.time()
        stored = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process evicted it
                status = path.lstat()
                if _STORED_NAME.fullmatch(path.name):
                    stored.append((status.st_mtime, status.st_size, path))
                elif _TEMPORARY_NAME.fullmatch(path.name) and now - status.st_mtime > ABANDONED_AFTER:
                    path.unlink()

        self._held = sum(size for _, size, _ in stored)
        for _, size, path in sorted(stored):
            if self._held <= self.size:
                return
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                self._held -= size


def _is_worth_keeping(weight: torch.Tensor, subspace: MinorSubspace) -> bool:
    """Whether it is certified, determined by the weight, and has shapes, dtypes and numbers that fit."""
    rank = subspace.singular_values.numel()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    energy = subspace.singular_values.double().square().sum().item()  # infinite for an fp64 weight of 1e200
    return (
        subspace.certified
        and not subspace.null_count
        and 1 <= rank <= min(weight.shape)
        and subspace.singular_values.shape == (rank,)
        and subspace.basis.shape == (weight.shape[0], rank)
        and subspace.basis.dtype == subspace.singular_values.dtype == dtype
        and (subspace.resolution == 0 or subspace.resolution > torch.finfo(torch.float64).tiny)
        and math.isfinite(energy + subspace.energy_excess + subspace.resolution)
    )


def encoded(key: str, subspace: MinorSubspace) -> bytes:
    """A safetensors file of the two tensors, with the rest as strings in its metadata, then its checksum."""
    tensors = {
        "basis": subspace.basis.detach().cpu().contiguous(),
        "singular_values": subspace.singular_values.detach().cpu().contiguous(),
    }
    metadata = {
        "version": str(VERSION),
        "key": key,
        "method": subspace.method,
        "energy_excess": repr(float(subspace.energy_excess)),
        "resolution": repr(float(subspace.resolution)),
    }
    content = safetensors.torch.save(tensors, metadata)
    return content + _checksum(content)


def _content(path: Path, most_bytes: int) -> bytes:
    """The first ``most_bytes`` of a file, which only this user or root can have written."""

    def opened(name: str, flags: int) -> int:
        at_once = getattr(os, "O_NONBLOCK", 0)  # without it, opening a FIFO waits for a writer
        return os.open(name, flags | at_once)

    with open(path, "rb", opener=opened) as file:
        why = foreign(os.fstat(file.fileno()))
        if why:
            raise ValueError(f"it {why}")
        return file.read(most_bytes)


def _decoded(content: bytes, key: str, weight: torch.Tensor, rank: int) -> MinorSubspace:
    """The result, on the CPU, from the bytes of its file; any exception if they are not those of a result."""
    checksum = content[-_CHECKSUM_BYTES:]
    content = content[:-_CHECKSUM_BYTES]
    if checksum != _checksum(content):
        raise ValueError("the checksum is wrong")

    header_end = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:header_end])["__metadata__"]  # which safetensors.torch.load leaves out
    if metadata["version"] != str(VERSION) or metadata["key"] != key:
        raise ValueError("it is of another version or of another weight")
    subspace = MinorSubspace(
        **safetensors.torch.load(content),
        method=metadata["method"],
        certified=True,
        energy_excess=float(metadata["energy_excess"]),
        resolution=float(metadata["resolution"]),
    )
    if subspace.singular_values.numel() != rank or not _is_worth_keeping(weight, subspace):
        raise ValueError("its shapes, dtypes or numbers are not those of a result of its weight")
    return subspace


@torch.no_grad()
def _verify(weight: torch.Tensor, subspace: MinorSubspace) -> None:
    """ValueError unless the columns are orthonormal and ‖weightᵀ column‖ are the singular values.

    Both are tested as precisely as they hold for a certified result. Whether smaller singular values exist
    remains open. With one thread, 16 columns of a 4096 x 4096 weight take 58 ms, where hashing the weight
    takes 80 and solving it 3200.
    """
    if weight.device.type != "cpu" and is_on_host(weight.device):  # a device without fp64
        weight = weight.cpu()
    weight = weight.detach()
    basis = subspace.basis.to(weight.device).double()
    squares = subspace.singular_values.to(weight.device).double().square()
    rank = basis.shape[1]
    identity = torch.eye(rank, dtype=torch.float64, device=weight.device)
    if not (basis.T @ basis - identity).abs().max().item() <= _ORTHONORMAL:  # NaN, too
        raise ValueError("its columns are not orthonormal")
    if not (squares.diff() <= 0).all().item():
        raise ValueError("its singular values are not in descending order")

    # The norm row by row: one fp32 sum of 3.2e8 ones is 11585², and in fp64 it would take as long as the rest
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
    squared_norm = norms.double().square().sum().item()
    if not subspace.resolution <= 1.001 * resolution(min(weight.shape), squared_norm):
        raise ValueError("its resolution is not the weight's")

    if weight.shape[0] > weight.shape[1]:
        products = transposed_image(weight, basis)
    else:
        products = image(weight.T, basis)
    allowed = 2 * (CERTIFIED_EXCESS * squares.sum().item() + rank * subspace.resolution)
    if not (products.square().sum(0) - squares).abs().max().item() <= allowed:
        raise ValueError("its singular values are not the weight's")


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES).digest()


def _warn_once(path: Path, message: str) -> None:
    with _warned_lock:
        if path in _warned:
            return
        _warned.add(path)
    _logger.warning(message)
