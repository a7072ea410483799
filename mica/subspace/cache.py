"""Minor subspaces kept on disk, for sweeps that initialise the same model again and again.

One safetensors file, with a checksum behind it, holds the result for one weight, known by its content
whatever the checkpoint is called, and one rank: the last columns of a larger rank's basis span the same
subspace, but with other bits. Only certified results are kept, and no folder is used that another user could
have written to. Errors never reach the caller: they cost a recomputation and one line in the log. The folder
grows, and may be deleted at any time.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import constants

from mica.folders import named_folder, why_untrusted, write_whole
from mica.subspace.result import MinorSubspace

# Part of the file names. Raise it whenever the solver's results, ``content_hash`` or the files change.
VERSION = 5

_CHECKSUM_BYTES = 20

_logger = logging.getLogger("mica")


def default_cache() -> SubspaceCache | None:
    """The cache that the environment variable ``MICA_CACHE`` names now, or None where it turns caching off.

    Unset, or "1", "on", "true", "yes": the folder ``mica`` of the Hugging Face cache (HF_HOME). "0", "off",
    "false", "no" and the empty string: None. Anything else is a folder; ``~`` is expanded.
    """
    folder = named_folder(os.environ.get("MICA_CACHE", "on"), Path(constants.HF_HOME) / "mica")
    if folder is None:
        return None
    return SubspaceCache(folder)


class SubspaceCache:
    """Minor subspaces by weight content and rank in ``folder``, which the first ``put`` creates.

    Any number of threads and processes may use one folder. No method raises because of the disk. The folder
    is not used, with one warning, if users other than this one and root can write to it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def get(self, key: str, rank: int) -> MinorSubspace | None:
        """The minor subspace that is stored for a weight, with the stored bits; None if there is none.

        It lies on the CPU and is certified, whatever ``method`` it came from.

        Args:
            key: The ``content_hash`` of the weight.
            rank: The number of vectors.
        """
        if not self._is_trusted():
            return None
        path = self.path(key, rank)
        try:
            # Read whole, not mapped: a mapped file that another machine deletes on NFS ends this process
            return _decode(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # whatever a damaged file can cause
            _warn_once(f"{path} is not a usable cached subspace, so it is recomputed: {error!r}")
            return None

    def put(self, key: str, subspace: MinorSubspace) -> None:
        """Store a result, in place of the one that is stored for this weight and rank.

        Results that are not certified are silently not kept, and neither are those with numerically null
        directions of a tall weight, which are arbitrary: the solver is to warn of them each time.

        Args:
            key: The ``content_hash`` of the weight.
            subspace: The result of one matrix.
        """
        if subspace.certified and not subspace.null_count:
            self._write(self.path(key, subspace.basis.shape[1]), _encode(subspace))

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
        """What a power failure leaves fails the checksum."""
        try:
            self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)  # even if the umask lets others write
            if self._is_trusted():
                write_whole(path, content)
        except OSError as error:
            _warn_once(f"{self.folder} cannot be written, so subspaces are not cached: {error!r}")


def _encode(subspace: MinorSubspace) -> bytes:
    """A safetensors file, then its checksum."""
    tensors = {
        "basis": subspace.basis.cpu().contiguous(),
        "singular_values": subspace.singular_values.cpu().contiguous(),
        "bounds": torch.tensor(
            [subspace.energy_excess, subspace.resolution], dtype=torch.float64, device="cpu"
        ),
        "method": torch.tensor(list(subspace.method.encode()), dtype=torch.uint8, device="cpu"),
    }
    content = safetensors.torch.save(tensors)
    return content + _checksum(content)


def _decode(content: bytes) -> MinorSubspace:
    """The result, on the CPU, from the bytes of its file; any exception if they are damaged."""
    checksum = content[-_CHECKSUM_BYTES:]
    content = content[:-_CHECKSUM_BYTES]
    if checksum != _checksum(content):
        raise ValueError("the checksum is wrong")
    tensors = safetensors.torch.load(content)
    energy_excess, resolution = tensors.pop("bounds").tolist()
    method = bytes(tensors.pop("method").tolist()).decode()
    return MinorSubspace(
        **tensors, method=method, certified=True, energy_excess=energy_excess, resolution=resolution
    )


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES).digest()


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)
