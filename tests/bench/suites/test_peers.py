"""Definitions that are executed from a wheel, without the wheel's imports."""

from zipfile import ZipFile

import pytest

from bench.suites import peers

SOURCE = """
import a_library_that_is_not_here

raise SystemExit

@decorate
def wanted(x: Unknown) -> Unknown:
    return helper(x)

@a_library_that_is_not_here.jit
def kernel():
    ...
"""


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "nemo_automodel-0.7.0-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        archive.writestr("package/file.py", SOURCE)
    return path


def test_only_what_is_named_is_executed(wheel):
    given = {"decorate": lambda function: function, "helper": lambda x: x + 1}
    assert peers._execute(wheel, "package/file.py", "wanted", **given).wanted(1) == 2
    with pytest.raises(AssertionError, match=r"file\.py of nemo_.*\.whl does not define gone$"):
        peers._execute(wheel, "package/file.py", "wanted gone", **given)


def test_peers_are_those_whose_wheels_are_in_the_folder(wheel, monkeypatch):
    monkeypatch.delenv(peers.VARIABLE, raising=False)
    assert peers.found() == {}
    monkeypatch.setenv(peers.VARIABLE, str(wheel.parent))
    monkeypatch.setitem(peers._PEERS, "NeMo Automodel", ("nemo_automodel", lambda found: found))
    assert peers.found() == {"NeMo Automodel 0.7.0": wheel}
