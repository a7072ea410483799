"""Files are opened as files, whatever their names look like, and are whole or refused."""

import bz2
import gzip
import lzma
import os

import pytest

from mica.cli.adapt.opening import OPENERS, opened

PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
DATA = os.urandom(300_000)  # more than one piece, and it does not get smaller


def packed(suffix: str, data: bytes) -> bytes:
    if suffix == ".zst":
        return pytest.importorskip("zstandard").compress(data)
    return PACK[suffix](data)


def read(path) -> bytes:
    with opened(path) as file:
        return file.read()


@pytest.mark.parametrize("suffix", OPENERS)
@pytest.mark.parametrize(
    "name", ["a::b.txt", "file::b.txt", "zip:", "simplecache::b.txt", "[a]*?.txt", "é\udcff"]
)
def test_a_name_is_a_name(name, suffix, tmp_path):
    (tmp_path / "b.txt").write_bytes(b"another")
    for path, data in ((tmp_path / name, DATA), (tmp_path / f"{name}{suffix}", packed(suffix, DATA))):
        path.write_bytes(data)
        assert read(path) == DATA


@pytest.mark.parametrize("suffix", OPENERS)
def test_a_file_in_several_parts_is_read_to_its_end(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(packed(suffix, DATA) + packed(suffix, b"") + packed(suffix, b"end"))
    assert read(path) == DATA + b"end"


@pytest.mark.parametrize("suffix", OPENERS)
def test_a_file_that_was_cut_is_refused(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    whole = packed(suffix, DATA)
    for end in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises((EOFError, OSError)):
            read(path)


@pytest.mark.parametrize("suffix", OPENERS)
def test_another_kind_of_file_is_refused(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    packed(suffix, b"")  # skips without its library
    path.write_bytes(b"no such format" * 100)
    with pytest.raises((OSError, lzma.LZMAError)):
        read(path)
