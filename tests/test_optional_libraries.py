"""Where an optional library is not installed, what imports it is skipped and says so; all else runs."""

import importlib
import sys

import pytest

from tests.support.imports import ROOT


@pytest.mark.parametrize(
    ("module", "is_skipped"),
    [("tabulate", True), ("tabulate.utils", True), ("numpy", False), ("tabulat", False)],
)
def test_a_file_and_a_test_that_import_it_are_skipped(request, monkeypatch, tmp_path, module, is_skipped):
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    monkeypatch.setattr(conftest, "MISSING", {"tabulate"})
    for name in ("tabulate", "tabulate.utils", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)

    path = tmp_path / "test_it.py"
    path.write_text(f"import {module}", encoding="utf-8")
    kind = pytest.skip.Exception if is_skipped else pytest.Collector.CollectError
    with pytest.raises(kind, match="needs tabulate" if is_skipped else module):
        conftest.pytest_pycollect_makemodule(path, request.session).collect()

    call = pytest.CallInfo.from_call(lambda: importlib.import_module(module), "call")
    next(conftest.pytest_runtest_makereport(None, call))
    assert call.excinfo.type is (pytest.skip.Exception if is_skipped else ModuleNotFoundError)
