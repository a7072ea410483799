"""The folder of a comparison: whose it is, and what a second command may do there."""

import json

import pytest

from mica.cli.compare import settings
from mica.errors import UsageError

GIVEN = {"model": "m", "text": ["t.txt"], "retain": ["r.txt"], "budget": 5.0}


def begin(output):
    output.mkdir()
    settings.check_output(output)
    settings.write(output, GIVEN)


def again(output, **given):
    """The settings of a comparison that goes on."""
    found = settings.resumed(output, given)
    settings.write(output, found)
    return found


def test_a_comparison_goes_on_with_its_settings(tmp_path):
    output = tmp_path / "out"
    begin(output)
    assert json.loads((output / "settings.json").read_text()) == GIVEN
    (output / "runs" / "a.json").write_text("{}")
    assert again(output) == GIVEN
    assert again(output, budget=5.0, rank=64) == GIVEN  # 64 is the default
    assert (output / "runs" / "a.json").exists()
    for other in ({"model": "n"}, {"rank": 4}):
        with pytest.raises(UsageError, match=r"not as in the comparison in .*; omit this option"):
            again(output, **other)


def test_budget_and_seeds_may_change(tmp_path):
    output = tmp_path / "out"
    begin(output)
    other = GIVEN | {"budget": 60.0, "seeds": 6}
    assert again(output, budget=60.0, seeds=6) == other
    assert again(output) == other


@pytest.mark.parametrize("text", ["{", "[1]", '{"some": "thing"}', "null"])
def test_settings_that_no_comparison_has_written_are_named(tmp_path, text):
    output = tmp_path / "out"
    begin(output)
    (output / "settings.json").write_text(text)
    with pytest.raises(UsageError, match=r"settings\.json: mica compare has not written it"):
        again(output)


def test_a_comparison_begins_in_an_empty_folder(tmp_path):
    settings.check_output(tmp_path / "new")
    begin(tmp_path / "out")
    settings.check_output(tmp_path / "out")  # killed before its first result
    (tmp_path / "out" / "runs" / "base.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is not empty: choose another folder, or use --resume to go on"):
        settings.check_output(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"is not empty: choose another folder$"):
        settings.check_output(tmp_path / "mine")
    with pytest.raises(UsageError, match=r"nothing to continue in .*: it has no settings\.json"):
        settings.stored(tmp_path / "mine")


def test_rates_are_those_given_or_our_own():
    given = {"methods": ["mica", "lora"], "rates": [["lora", [1e-4, 3e-4]]]}
    assert settings.rates(given) == {"mica": [5e-4, 1e-3, 2e-3, 4e-3], "lora": [1e-4, 3e-4]}
    twice = {"methods": ["mica", "lora"], "rates": [["lora", [3e-4]], ["mica", [1e-3]], ["lora", [1e-4]]]}
    assert settings.rates(twice) == {"mica": [1e-3], "lora": [1e-4, 3e-4]}
    assert list(settings.rates({})) == ["mica", "lora", "full"]  # a random B is a control
    with pytest.raises(UsageError, match="--rates full: it is not compared: name it in --methods"):
        settings.rates(given | {"rates": [["full", [1e-5]]]})
