"""A result on disk: complete after every run, and gone on with only by the same settings."""

import json
from pathlib import Path

import pytest

from bench.quality.store import resume, save
from mica.errors import UsageError

GOLDEN = (Path(__file__).parents[1] / "golden" / "quality.json").read_text()


@pytest.fixture
def fresh():
    result = json.loads(GOLDEN) | {"runs": []}
    del result["base"]
    return result


def test_goes_on_with_what_is_there_and_a_kill_while_writing_leaves_the_last_file(fresh, tmp_path):
    path, finished = tmp_path / "run.json", json.loads(GOLDEN)
    assert resume(path, fresh) is fresh
    save(path, finished)
    assert path.read_text() == GOLDEN  # a line for each run
    assert [*tmp_path.iterdir()] == [path]
    path.with_suffix(".part").write_text('{"settings"')
    assert resume(path, fresh) == finished | {"starts": finished["starts"] + fresh["starts"]}


@pytest.mark.parametrize(
    ("keys", "value", "why"),
    [
        (("settings", "epochs"), 9, "settings, epochs 1, and this is 9"),
        (("model",), "other", "model tiny, and this is other"),
        (("recipes", "paper", "dropout"), 0.5, "recipes, paper, dropout 0.05, and this is 0.5"),
        (("texts", "reference", "tokens"), 9, "texts, reference, tokens 64, and this is 9"),
        (("plan", "MiCA, paper", "rank"), 5, "plan, MiCA, paper, rank 4, and this is 5"),
        (("machine", "torch"), "9.9", "torch 2.9, and this is 9.9"),
        (("machine", "triton"), "9.9", None),
    ],
)
def test_other_settings_are_refused(fresh, tmp_path, keys, value, why):
    path = tmp_path / "run.json"
    save(path, fresh)
    before, inner = path.read_text(), fresh
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    if why is None:
        assert resume(path, fresh)["runs"] == []
    else:
        with pytest.raises(UsageError) as raised:
            resume(path, fresh)
        assert str(raised.value) == f"--name run: {path} has {why}: take another name"
    assert path.read_text() == before
