"""Opening files of text as files, decompressed by their suffix.

Not through fsspec, which takes a name for an address: to it "a::b.txt" is b.txt on the file system a.
"""

import bz2
import gzip
import importlib.util
import io
import lzma
from pathlib import Path
from typing import BinaryIO

_PIECE = 2**17  # bytes


class _Frames(io.RawIOBase):
    """What a Zstandard file holds; its own reader takes a file that was cut for a whole one."""

    def __init__(self, path: Path):
        import zstandard

        self._file = path.open("rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = None  # that is being read
        self._compressed = b""
        self._text = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer) -> int:
        while not self._text:
            if not self._compressed:
                self._compressed = self._file.read(_PIECE)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._read_frame()
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _read_frame(self) -> None:
        """Decompress what is there, up to the end of a frame."""
        import zstandard

        if self._frame is None:
            self._frame = self._new_frame()
        try:
            self._text = self._frame.decompress(self._compressed)
        except zstandard.ZstdError as error:  # which is no OSError
            raise OSError(f"not Zstandard, or damaged: {error}") from error
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None
        else:
            self._compressed = b""


def _zstandard(path: Path, mode: str = "rb") -> BinaryIO:
    return io.BufferedReader(_Frames(path))


OPENERS = {".gz": gzip.open, ".zst": _zstandard, ".xz": lzma.open, ".bz2": bz2.open}  # by suffix


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed: to be closed.

    Raises OSError, EOFError or `lzma.LZMAError`, here or as it is read, for a file that is damaged or cut.
    """
    return OPENERS.get(path.suffix.lower(), open)(path, "rb")


def missing_library(path: Path) -> str | None:
    """What has to be installed to open a file of this name, or None."""
    if path.suffix.lower() == ".zst" and importlib.util.find_spec("zstandard") is None:
        return "zstandard"
    return None
