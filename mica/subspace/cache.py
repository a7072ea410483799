"""Minor subspaces kept on disk, for sweeps that initialise the same model again and again.

One safetensors file, with a checksum behind it, holds the result for one weight, known by its content
whatever the checkpoint is called, and one rank: the last columns of a larger rank's basis span the same
subspace, but with other bits. Only certified results are kept, and no file is read that another user could
have written. What is read is checked against the weight: its columns must be orthonormal and have the stored
singular values. That does not prove it to be the minor subspace, which takes a solution. Errors never reach
the caller: they cost a recomputation and one line in the log. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import threading
import uuid
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import constants

from mica.folders import named_folder, why_untrusted
from mica.subspace.content_hash import content_hash, is_weight
from mica.subspace.device import is_on_host
from mica.subspace.gram import image, transposed_image
from mica.subspace.result import CERTIFIED_EXCESS, MinorSubspace, move

# Part of the file names. Raise it whenever the solver's results, ``content_hash`` or the files change.
VERSION = 4

# Bytes of all files: 224 layers of a model of 7e9 parameters take 0.1 GB at rank 16, 0.7 GB at rank 128.
SIZE = 10 << 30

# At most max |BᵀB − I| for what is read. That of a result as returned stays below half of it.
_ORTHONORMAL = 2e-6

_CHECKSUM_BYTES = 20

_logger = logging.getLogger("mica")
# Files of all versions, and those that were not finished. No others are ever deleted.
_OWN_NAME = re.compile(r"[0-9a-f]{64}\.\d+\..*(subspace|tmp)")


def default_cache() -> SubspaceCache | None:
    """The cache that the environment variable ``MICA_CACHE`` names now, or None where it turns caching off.

    Unset, or "1", "on", "true", "yes": the folder ``mica`` of the Hugging Face cache (HF_HOME). "0", "off",
    "false", "no" and the empty string: None. Anything else is a folder; ``~`` is expanded.
    ``MICA_CACHE_SIZE`` limits what it holds, in bytes ("500MB", "2GiB"); unset: 10 GiB.

    Raises:
        ValueError: ``MICA_CACHE_SIZE`` is not such a number.
    """
    folder = named_folder(os.environ.get("MICA_CACHE", "on"), Path(constants.HF_HOME) / "mica")
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
        self._used = math.inf  # bytes, as far as known: the first ``put`` counts them

    def get(self, weight: torch.Tensor, rank: int, *, key: str | None = None) -> MinorSubspace | None:
        """The minor subspace of ``weight`` (out_features, in_features) of that rank; None if not stored.

        The result has the stored bits and is certified, whatever ``method`` it came from. Its tensors own
        their memory and are on the weight's device.

        Args:
            weight: as ``minor_subspace`` takes it; a stack of matrices is always a miss.
            rank: any number; a rank that was not stored is a miss.
            key: ``content_hash(weight)``, where the caller has it.
        """
        if not is_weight(weight) or not self._is_trusted():
            return None
        path = self.path(key or content_hash(weight), rank)
        try:
            if not path.is_file():  # opening a FIFO would wait for a writer
                return None
            why = why_untrusted(path)
            if why:
                raise ValueError(f"it {why}")
            # Read whole, not mapped: a mapped file that another machine deletes on NFS ends this process
            subspace = _decode(path.read_bytes())
            _verify(weight, subspace)
        except FileNotFoundError:  # another process has deleted it just now
            return None
        except Exception as error:  # whatever a damaged file can cause
            _warn_once(f"{path} is not a usable cached subspace, so it is recomputed: {error!r}")
            return None

        with contextlib.suppress(OSError):  # in a folder that this user may only read
            os.utime(path)
        return move(subspace, weight.device)

    def put(self, weight: torch.Tensor, subspace: MinorSubspace, *, key: str | None = None) -> None:
        """Keep ``subspace``, in place of what is stored for ``weight`` and its rank.

        Some results are silently not kept: those that are not certified and those of stacks of matrices. Nor
        are those with numerically null directions of a tall weight, which are arbitrary: the solver is to
        warn of them each time.
        """
        if not is_weight(weight) or not subspace.certified or subspace.null_count:
            return
        path = self.path(key or content_hash(weight), subspace.basis.shape[1])
        self._write(path, _encode(subspace))

    def path(self, key: str, rank: int) -> Path:
        """The file for the result of this rank of the weight with this ``content_hash``."""
        return self.folder / f"{key}.{rank}.v{VERSION}.subspace"

    def _is_trusted(self) -> bool:
        """Whether no other user can have written to the folder; warns if one can."""
        why = why_untrusted(self.folder)
        if why:
            _warn_once(
                f"{self.folder} {why}: subspaces are neither read from it nor stored in it. Make it yours "
                "alone (chown, chmod go-w), or name another folder with MICA_CACHE."
            )
        return why is None

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file whole or not at all: as a temporary file, which is renamed when it is complete.

        Without fsync, which takes up to 10 ms per layer: what a power failure leaves fails the checksum.
        """
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            # The modes hold even if the umask lets others write
            self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            if not self._is_trusted():
                return
            try:
                temporary.touch(mode=0o644)
                temporary.write_bytes(content)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)  # it exists only after a failure
            with self._lock:
                self._used += len(content)
                if self._used > self.size:
                    self._evict()
        except OSError as error:
            _warn_once(f"{self.folder} cannot be written, so subspaces are not cached: {error!r}")

    def _evict(self) -> None:
        """Delete the files that were not used for longest, until the others take at most ``size``."""
        files = []
        for path in self.folder.iterdir():
            if _OWN_NAME.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # another process evicted it
                    status = path.lstat()
                    files.append((status.st_mtime, status.st_size, path))

        self._used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if self._used <= self.size:
                return
            path.unlink(missing_ok=True)
            self._used -= size


def _encode(subspace: MinorSubspace) -> bytes:
    """A safetensors file of the two tensors, with the rest as strings in its metadata, then its checksum."""
    tensors = {
        "basis": subspace.basis.cpu().contiguous(),
        "singular_values": subspace.singular_values.cpu().contiguous(),
    }
    metadata = {
        "method": subspace.method,
        "energy_excess": repr(subspace.energy_excess),
        "resolution": repr(subspace.resolution),
    }
    content = safetensors.torch.save(tensors, metadata)
    return content + _checksum(content)


def _decode(content: bytes) -> MinorSubspace:
    """The result, on the CPU, from the bytes of its file; any exception if they are damaged."""
    checksum = content[-_CHECKSUM_BYTES:]
    content = content[:-_CHECKSUM_BYTES]
    if checksum != _checksum(content):
        raise ValueError("the checksum is wrong")
    header_end = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:header_end])["__metadata__"]  # which safetensors.torch.load leaves out
    return MinorSubspace(
        **safetensors.torch.load(content),
        method=metadata["method"],
        certified=True,
        energy_excess=float(metadata["energy_excess"]),
        resolution=float(metadata["resolution"]),
    )


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES).digest()


@torch.no_grad()
def _verify(weight: torch.Tensor, subspace: MinorSubspace) -> None:
    """ValueError unless the columns are orthonormal and ‖weightᵀ column‖ are the singular values.

    Both are tested as precisely as they hold for a certified result. Whether smaller singular values exist
    remains open. With one thread, 16 columns of a 4096 x 4096 weight take 58 ms, where hashing the weight
    takes 80 and solving it 3200.
    """
    if is_on_host(weight.device):  # another device than the CPU has no fp64
        weight = weight.cpu()
    basis = subspace.basis.to(weight.device).double()
    squares = subspace.singular_values.to(weight.device).double().square()
    rank = basis.shape[1]
    identity = torch.eye(rank, dtype=torch.float64, device=weight.device)
    if not (basis.T @ basis - identity).abs().max().item() <= _ORTHONORMAL:  # NaN, too
        raise ValueError("its columns are not orthonormal")

    if weight.shape[0] > weight.shape[1]:
        products = transposed_image(weight, basis)
    else:
        products = image(weight.T, basis)
    allowed = 2 * (CERTIFIED_EXCESS * squares.sum().item() + rank * subspace.resolution)
    if not (products.square().sum(0) - squares).abs().max().item() <= allowed:
        raise ValueError("its singular values are not the weight's")


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)
