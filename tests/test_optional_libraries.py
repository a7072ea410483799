"""Where an optional library is not installed, its tests are skipped and say so; all others run."""

import importlib
import sys

import pytest

from tests.support.imports import ROOT


@pytest.fixture
def conftest(request, monkeypatch):
    """As where seaborn is not installed, and NumPy neither, without which nothing works."""
    found = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    monkeypatch.setattr(found, "MISSING", {"seaborn"})
    for name in ("seaborn", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    return found


def collected(conftest, session, path, text):
    path.write_text(text, encoding="utf-8")
    return conftest.pytest_pycollect_makemodule(path, session).collect()


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("import seaborn", pytest.skip.Exception, "needs seaborn"),
        ("from seaborn.utils import load_dataset", pytest.skip.Exception, "needs seaborn"),
        ("import numpy", pytest.Collector.CollectError, "import of numpy halted"),
        ("import pytset", pytest.Collector.CollectError, "No module named 'pytset'"),
    ],
)
def test_a_file_that_imports_it_is_skipped(conftest, request, tmp_path, text, kind, said):
    with pytest.raises(kind, match=said):
        collected(conftest, request.session, tmp_path / "test_it.py", text)


def _draw():
    try:
        importlib.import_module("seaborn")
    except ImportError as error:
        raise ValueError("cannot draw") from error


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (lambda: importlib.import_module("seaborn"), pytest.skip.Exception),
        (_draw, pytest.skip.Exception),
        (lambda: importlib.import_module("numpy"), ModuleNotFoundError),
    ],
)
def test_a_test_in_which_it_is_imported_is_skipped(conftest, body, kind):
    call = pytest.CallInfo.from_call(body, "call")
    next(conftest.pytest_runtest_makereport(None, call))
    assert call.excinfo.type is kind
