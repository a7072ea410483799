"""Files that are written whole; what else the commands print is tested with them."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from mica.cli import output
from mica.errors import UsageError


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("old")

    def full_disk(scratch):
        scratch.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match=r"--json .*table.json: cannot be written: No space"):
        output.write_file("--json", path, full_disk)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def part(name, error=None):
        def save_pretrained(folder):
            (folder / name).touch()
            if error:
                raise error

        return SimpleNamespace(save_pretrained=save_pretrained)

    path = tmp_path / "a" / "merged"
    output.write_folder("--merge", path, part("old"))
    (tmp_path / "a" / ".merged.partial").mkdir()  # of a run that was killed
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(UsageError, match=r"--merge .*merged: cannot be written: I/O .*; the rest is there$"):
        output.write_folder("--merge", path, part("half", full), kept="; the rest is there")
    assert [file.name for file in path.iterdir()] == ["old"]

    def gone(self, target):
        if self.name == ".merged.partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    rename = type(path).rename
    monkeypatch.setattr(type(path), "rename", gone)
    with pytest.raises(UsageError, match="Input/output error"):
        output.write_folder("--merge", path, part("new"))
    assert [file.name for file in path.iterdir()] == ["old"]
    monkeypatch.undo()

    output.write_folder("--merge", path, part("new"), part("newer"), card="a card")
    assert sorted(file.name for file in path.iterdir()) == ["README.md", "new", "newer"]
    assert [folder.name for folder in path.parent.iterdir()] == ["merged"]


def test_first_sentences():
    messages = {
        "One line": "One line",
        "First.\nAdvice.": "First.",
        "One of:\n (1) a,\n (2) b.\nAdvice.": "One of: (1) a, (2) b.",
        "\n\n": "",
    }
    assert {message: output.first_sentences(message) for message in messages} == messages


HELP = {
    "adapt": ["frozen weights: auto, float32, bfloat16 or float16"],
    "doctor": ["--json"],
    "inspect": ["MODEL", "--rank", "--target-modules", "--plot", "--json", "default: 16"],
    "transfer": ["--adapter", "--to", "--output"],
}


def test_help_needs_no_torch():
    code = (
        f"import sys; from mica.cli import main; [print(main([c, '--help']), '---') for c in {list(HELP)}]; "
        "print([n for n in ('torch', 'transformers', 'packaging', 'matplotlib') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *texts, loaded = " ".join(result.stdout.split()).split(" ---")
    assert loaded.strip() == "[]"
    for text, parts in zip(texts, HELP.values(), strict=True):
        assert text.endswith(" 0")
        assert [part for part in parts if part not in text] == []
