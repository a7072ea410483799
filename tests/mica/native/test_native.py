"""Where the module comes from, by MICA_NATIVE, and that a process looks for it once."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import constants

from mica import native
from mica.native import build


@pytest.fixture
def asked(monkeypatch, tmp_path, compiled, forget):
    """The folders that a module is asked of; each of them has it."""
    folders = []

    def ensure_built(folder, extension):
        folders.append(folder)
        return compiled

    monkeypatch.setattr(build, "ensure_built", ensure_built)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return folders


@pytest.mark.parametrize(
    ("setting", "folder"),
    [
        *((off, None) for off in ("0", "No")),
        *((on, "hub/mica/native") for on in (None, "", "on")),
        ("{}/a b", "a b"),
    ],
)
def test_the_words_of_mica_native(setting, folder, asked, monkeypatch, tmp_path, assert_layer_works):
    if setting is None:
        monkeypatch.delenv("MICA_NATIVE", raising=False)
    else:
        setting = setting.format(tmp_path)
        monkeypatch.setenv("MICA_NATIVE", setting)
    assert_layer_works()
    if folder is None:
        assert native.module() is None
        assert native.why_not() == f"MICA_NATIVE={setting}"
        assert not asked
    else:
        assert native.module() is not None
        assert native.why_not() is None
        assert asked == [tmp_path / folder]


def test_what_gains_little_does_not_wait_for_a_compiler(asked, monkeypatch, tmp_path):
    monkeypatch.setenv("MICA_NATIVE", "0")
    assert native.module_if_built() is None
    monkeypatch.setenv("MICA_NATIVE", str(tmp_path / "a"))
    looked = []
    monkeypatch.setattr(build, "is_built", lambda folder: looked.append(folder))
    assert native.module_if_built() is native.module_if_built() is None
    assert looked == [tmp_path / "a"]
    assert not asked
    module = native.module()  # by a forward, which compiles it
    assert native.module_if_built() is module is not None
    monkeypatch.setattr(build, "is_built", lambda folder: True)  # by another process
    monkeypatch.setenv("MICA_NATIVE", str(tmp_path / "b"))
    assert native.module_if_built() is not None


def test_the_setting_may_change_and_each_is_looked_up_once(asked, monkeypatch, tmp_path, assert_layer_works):
    for _ in range(2):
        for setting in ("0", str(tmp_path / "a"), str(tmp_path / "b")):
            monkeypatch.setenv("MICA_NATIVE", setting)
            assert_layer_works()
            assert (native.why_not() is None) == (setting != "0")
    assert asked == [tmp_path / "a", tmp_path / "b"]


def test_threads_that_come_at_once_look_once(asked, monkeypatch, tmp_path, compiled):
    ensure_built = build.ensure_built

    def slowly(folder, extension):
        time.sleep(0.2)
        return ensure_built(folder, extension)

    monkeypatch.setattr(build, "ensure_built", slowly)
    monkeypatch.setenv("MICA_NATIVE", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: native.module(), range(4)))
    assert len(asked) == 1
    assert len(set(map(id, found))) == 1


def test_who_asks_after_the_module_was_loaded_gets_it_at_once(monkeypatch):
    monkeypatch.setattr(native, "_preparations", [])
    loaded = native.module()
    if loaded is None:
        pytest.skip(native.why_not())
    seen = []
    native.when_loaded(seen.append)
    assert loaded in seen
