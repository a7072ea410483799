from importlib.metadata import PackageNotFoundError

import pytest

from mica.cli import extras
from tests.support.imports import ROOT


@pytest.mark.parametrize(
    ("is_installed", "file", "named"),
    [
        (True, "mica/cli/extras.py", "mica-fast"),
        (False, "mica/cli/extras.py", str(ROOT)),  # a checkout
        (False, "build/mica/cli/extras.py", "mica-fast"),  # a copy that is neither
    ],
)
def test_the_package_is_named_as_pip_finds_it(monkeypatch, is_installed, file, named):
    def distribution(name):
        if not is_installed:
            raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", distribution)
    monkeypatch.setattr(extras, "__file__", str(ROOT / file))
    assert extras.how_to_install("cli") == f'pip install "{named}[cli]"'
