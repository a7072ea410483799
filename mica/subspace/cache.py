"""Minor subspaces kept on disk, for sweeps that initialise the same model again and again.

The key of a result is the content of its weight, ``fingerprint``, whatever a checkpoint is called, and its
rank: the last columns of a larger rank's basis span the same subspace, but in other bits. One file holds one
result. Only certified results are kept. What is read is checked against the weight: columns orthonormal, with
the stored singular values. Only a solution proves that it is the minor subspace, so nothing is read that
another user could have written. Disk errors never reach the caller: they cost a recomputation and one line in
the log. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import stat
import threading
import time
import uuid
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import constants

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

# max |BᵀB − I| of a result as returned stays below half of it.
_ORTHONORMAL = 2e-6

_HEADER_BYTES = 1 << 16  # at most, of a file's header and checksum
_CHECKSUM_BYTES = 20

_OFF = ("", "0", "off", "false", "no")
_ON = ("1", "on", "true", "yes")

_logger = logging.getLogger("mica")
# Only the cache's own files are swept or evicted, those of earlier versions included.
_TEMPORARY_NAME = re.compile(r"[0-9a-f]{40,64}(\.\d+)?\.[0-9a-f]{32}\.tmp")
_STORED_NAME = re.compile(r"[0-9a-f]{40,64}(\.\d+)?\.(safetensors|subspace)")
_warned: set[Path] = set()
_warned_lock = threading.Lock()


def default_cache() -> SubspaceCache | None:
    """The cache that the environment variable ``MICA_CACHE`` names now, or None where it turns caching off.

    Unset, or "1", "on", "true", "yes": the folder ``mica`` of the Hugging Face cache (HF_HOME). "0", "off",
    "false", "no" and the empty string: None. Anything else is a folder; ``~`` is expanded.
    ``MICA_CACHE_SIZE`` limits what it holds, in bytes ("500MB", "2GiB"); unset: 10 GiB.

    Raises:
        ValueError: ``MICA_CACHE_SIZE`` is no such number.
    """
    setting = os.environ.get("MICA_CACHE", "on")
    if setting.strip().lower() in _OFF:
        return None
    size = _bytes(os.environ.get("MICA_CACHE_SIZE", ""))
    if setting.strip().lower() in _ON:
        return SubspaceCache(Path(constants.HF_HOME) / "mica", size)
    return SubspaceCache(os.path.expanduser(setting), size)  # pathlib's raises where there is no home


def _bytes(setting: str) -> int:
    if not setting.strip():
        return SIZE
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?)b?", setting.strip().lower())
    if not match:
        raise ValueError(
            f"MICA_CACHE_SIZE must be a number of bytes, as 500000000, 500MB or 2GiB, but it is {setting!r}."
        )
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


def distrusted(folder: str | os.PathLike[str]) -> str | None:
    """Why other users may have written to a folder, as "belongs to ..."; None: they cannot, or it is absent.

    Checked on POSIX systems only.
    """
    try:
        return _foreign(os.stat(folder))
    except OSError:
        return None


def _foreign(status: os.stat_result) -> str | None:
    if os.name != "posix":
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to another user ({status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


class SubspaceCache:
    """Minor subspaces by weight content and rank in ``folder``, which the first ``put`` creates.

    Any number of threads and processes may use one folder. No method raises because of the disk.

    Args:
        folder: not used, with one warning, if users other than this one and root can write to it.
        size: bytes that its files take at most; beyond it, the least recently used are deleted. What other
            processes write at the same time is counted when the next process begins to write.
    """

    def __init__(self, folder: str | os.PathLike[str], size: int = SIZE) -> None:
        self.folder = Path(folder)
        self.size = size
        self._lock = threading.Lock()
        self._held = math.inf  # bytes, as far as known: the first ``put`` counts them

    def get(self, weight: torch.Tensor, rank: int, *, key: str | None = None) -> MinorSubspace | None:
        """The minor subspace of ``weight`` (out_features, in_features) of that rank, or None: recompute.

        Its tensors own their memory and are on the weight's device. It is what was stored, bit for bit, and
        certified. A stored result of any ``method`` is returned.

        Args:
            weight: as ``minor_subspace`` takes it; a stack of matrices is always a miss.
            rank: of any size; one that was not stored is a miss.
            key: ``fingerprint(weight)``, where the caller has it.
        """
        if not is_weight(weight) or not self._is_trusted():
            return None
        stored = self._read(key or fingerprint(weight), weight, rank)
        return None if stored is None else moved(stored, weight.device)

    def put(self, weight: torch.Tensor, subspace: MinorSubspace, *, key: str | None = None) -> None:
        """Keep ``subspace``, in place of one that is stored for ``weight`` and its rank.

        Silently left out: what is not certified, stacks of matrices, what is larger than the whole
        cache may be, fp64 weights whose squares leave the range, and what holds numerically null directions
        of a tall weight, which are arbitrary: the solver warns of them, each time.
        """
        if is_weight(weight) and _is_worth_keeping(weight, subspace):
            key = key or fingerprint(weight)
            content = encoded(key, subspace)
            if len(content) <= self.size:
                self._write(self.path(key, subspace.basis.shape[1]), content)

    def path(self, key: str, rank: int) -> Path:
        return self.folder / f"{key}.{rank}.subspace"

    def _is_trusted(self) -> bool:
        why = distrusted(self.folder)
        if why:
            _warn_once(
                self.folder,
                f"{self.folder} {why}: subspaces are neither read there nor kept. Make it yours alone "
                "(chown, chmod go-w), or name another folder by MICA_CACHE.",
            )
        return why is None

    def _read(self, key: str, weight: torch.Tensor, rank: int) -> MinorSubspace | None:
        path = self.path(key, rank)
        try:
            # Read whole, not mapped: another process may replace or truncate the file at any time.
            most_bytes = rank * (weight.shape[0] + 1) * 8 + _HEADER_BYTES
            subspace = _decoded(_content(path, most_bytes), key, weight, rank)
            _verify(weight, subspace)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # whatever a damaged file can cause
            _warn_once(path, f"{path} is not a usable cached subspace, it is recomputed: {error!r}")
            return None
        with contextlib.suppress(OSError):  # in a folder that this user may only read
            os.utime(path)
        return subspace

    def _write(self, path: Path, content: bytes) -> None:
        """Whole or not at all: a temporary file, renamed when it is complete.

        No fsync, which takes up to 10 ms per layer: what a power failure leaves fails the checksum.
        """
        temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o755, exist_ok=True)  # whatever the umask lets others do
            if not self._is_trusted():
                return
            try:
                temporary.touch(mode=0o644, exist_ok=False)
                temporary.write_bytes(content)
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()  # there only after a failure
            with self._lock:
                self._held += len(content)
                if self._held > self.size:
                    self._evict()
        except OSError as error:
            _warn_once(self.folder, f"{self.folder} cannot be written, subspaces are not cached: {error!r}")
        else:
            with _warned_lock:
                _warned.discard(path)

    def _evict(self) -> None:
        """Delete what killed writers left, and the least recently used results beyond ``size``."""
        abandoned, stored = time.time() - ABANDONED_AFTER, []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process evicted it
                status = path.lstat()
                if _STORED_NAME.fullmatch(path.name):
                    stored.append((status.st_mtime, status.st_size, path))
                elif _TEMPORARY_NAME.fullmatch(path.name) and status.st_mtime < abandoned:
                    path.unlink()
        self._held = sum(size for _, size, _ in stored)
        for _, size, path in sorted(stored):
            if self._held <= self.size:
                return
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                self._held -= size


def _is_worth_keeping(weight: torch.Tensor, subspace: MinorSubspace) -> bool:
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
    """A safetensors file of the two tensors, the rest as strings in its metadata, and then its checksum."""
    tensors = {
        name: getattr(subspace, name).detach().cpu().contiguous() for name in ("basis", "singular_values")
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
    """Of a file that this user or root wrote, whatever it is, up to what a result may take."""
    at_once = getattr(os, "O_NONBLOCK", 0)  # or opening a FIFO would wait for a writer
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
        why = _foreign(os.fstat(file.fileno()))
        if why:
            raise ValueError(f"it {why}")
        return file.read(most_bytes)


def _decoded(content: bytes, key: str, weight: torch.Tensor, rank: int) -> MinorSubspace:
    """The result, on the CPU, from the bytes of its file; an exception of any kind where they are not it."""
    content, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
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

    Both as precisely as a certified result has them. That leaves open whether smaller ones exist. One thread,
    16 columns of a 4096 x 4096 weight: 58 ms, where hashing it takes 80 and solving it 3200.
    """
    if weight.device.type != "cpu" and is_on_host(weight.device):  # which has no fp64
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
    # by rows: one fp32 sum of 3.2e8 ones is 11585²; in fp64 it would take as long as all the rest
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
    if not subspace.resolution <= 1.001 * resolution(min(weight.shape), norms.double().square().sum().item()):
        raise ValueError("its resolution is not the weight's")
    is_long = weight.shape[0] > weight.shape[1]
    products = transposed_image(weight, basis) if is_long else image(weight.T, basis)
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
