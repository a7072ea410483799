from importlib.metadata import PackageNotFoundError

from mica.cli import extras
from tests.support.imports import ROOT


def raises(name):
    raise PackageNotFoundError(name)


def test_an_installed_package_is_named(monkeypatch):
    monkeypatch.setattr(extras, "distribution", lambda name: object())
    assert extras.how_to_install("cli") == 'pip install "mica-fast[cli]"'


def test_a_checkout_that_is_not_installed_is_named_by_its_path(monkeypatch):
    monkeypatch.setattr(extras, "distribution", raises)
    assert extras.how_to_install("cli") == f'pip install "{ROOT}[cli]"'


def test_a_copy_that_is_neither_is_named_as_an_installed_one(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "distribution", raises)
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "mica/cli/extras.py"))
    assert extras.how_to_install("cli") == 'pip install "mica-fast[cli]"'
