"""A result on disk: complete after every run, and gone on with only by the same settings."""

import copy
import json

import pytest

from bench.quality.store import resume, save
from mica.errors import UsageError


@pytest.fixture
def fresh(begin):
    return begin()


def test_goes_on_with_what_is_there(fresh, finished, tmp_path):
    path = tmp_path / "run.json"
    assert resume(path, fresh) is fresh
    save(path, finished)
    found = resume(path, fresh)
    assert found["runs"] == finished["runs"]
    assert found["base"] == finished["base"]
    assert found["starts"] == finished["starts"] + fresh["starts"]
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_kill_while_writing_leaves_the_last_file(fresh, finished, tmp_path):
    path = tmp_path / "run.json"
    save(path, finished)
    path.with_suffix(".part").write_text('{"settings"')
    assert resume(path, fresh)["runs"] == finished["runs"]


@pytest.mark.parametrize(
    ("keys", "value", "why"),
    [
        (("settings", "epochs"), 9, "has settings, epochs 1, and this is 9"),
        (("model",), "other", "has model tiny, and this is other"),
        (("recipes", "paper", "dropout"), 0.5, "has recipes, paper, dropout 0.05, and this is 0.5"),
        (("texts", "facts, train", "sha256"), "00", "and this is 00"),
        (("plan", "MiCA, paper", "rank"), 5, "has plan, MiCA, paper, rank 4, and this is 5"),
        (("machine", "torch"), "9.9", "has torch None, and this is 9.9"),
    ],
)
def test_other_settings_are_refused(fresh, tmp_path, keys, value, why):
    path = tmp_path / "run.json"
    save(path, fresh)
    before, other = path.read_text(), copy.deepcopy(fresh)
    inner = other
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    with pytest.raises(UsageError) as raised:
        resume(path, other)
    assert str(raised.value).startswith(f"--name run: {path} has ")
    assert str(raised.value).endswith(f"{why}: take another name")
    assert path.read_text() == before


def test_one_line_per_run(finished, tmp_path):
    save(tmp_path / "run.json", finished)
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text)["runs"] == finished["runs"]
    lines = [line for line in text.splitlines() if line.startswith('  {"method"')]
    assert len(lines) == len(finished["runs"])
