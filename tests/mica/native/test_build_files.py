"""Folders in which nothing can be built, or that others can write, and files that are damaged."""

from pathlib import Path

import pytest

from mica import native
from mica.native import build
from tests.mica.native.compilers import names


def test_damaged_files_are_built_again(folder, compiler, assert_layer_works):
    """Loading the first 1000 bytes, or half of it, would end this process with a bus error."""
    path = build.ensure_built(folder)
    whole = path.read_bytes()
    damaged = [b"", whole[:1000], whole[: len(whole) // 2], whole[:-1], b"garbage", bytes(len(whole))]
    damaged.append(whole[:5000] + b"x" + whole[5001:])
    for content in damaged:
        path.write_bytes(content)
        assert build.ensure_built(folder) == path
        assert path.read_bytes() == whole
    assert len(compiler.runs()) == 1 + len(damaged)
    assert_layer_works()
    assert native.why_not() is None


def test_a_whole_file_that_does_not_load(folder, compiler, assert_layer_works, forget):
    """As on an older system than where it was built, or on a disk from which nothing may be executed."""
    compiler.does('echo "no library" > "$output"')
    assert_layer_works()
    (name,) = names(folder, ".so")
    assert native.why_not() == (
        f"what was compiled cannot be loaded ({folder / name}: file too short): "
        "delete the file, or name another folder with MICA_NATIVE"
    )
    forget()
    assert_layer_works()
    assert len(compiler.runs()) == 1


@pytest.mark.parametrize("place", ["a file", "in a file", "/proc/mica"])
def test_a_folder_that_cannot_be_made(place, compiler, forget, assert_layer_works, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    folders = {"a file": tmp_path / "file", "in a file": tmp_path / "file" / "folder"}
    folder = folders.get(place, Path(place))
    monkeypatch.setenv("MICA_NATIVE", str(folder))
    assert_layer_works()
    reasons = {"a file": "[Errno 17] File exists", "in a file": "[Errno 20] Not a directory"}
    reason = reasons.get(place, "[Errno 2] No such file or directory")
    assert native.why_not() == (
        f"{folder} cannot be used, so MICA_NATIVE has to name another folder: {reason}: '{folder}'"
    )
    assert not compiler.runs()


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_refused(mode, folder, compiler, assert_layer_works, forget):
    """Before anything is compiled, and although the file itself is in order."""
    path = build.ensure_built(folder)
    for _ in range(2):
        folder.chmod(mode)
        assert_layer_works()
        assert native.why_not() == (
            f"{folder} can be written by others (mode {mode:o}), so MICA_NATIVE has to name another folder"
        )
        path.unlink(missing_ok=True)
        forget()
    assert len(compiler.runs()) == 1
    folder.chmod(0o755)
    assert_layer_works()
    assert native.why_not() is None


def test_a_file_that_others_could_write_is_built_again(folder, compiler):
    path = build.ensure_built(folder)
    path.chmod(0o664)
    assert build.ensure_built(folder) == path
    assert not path.stat().st_mode & 0o022
    assert len(compiler.runs()) == 2
