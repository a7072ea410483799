"""The folder of a comparison: whose it is, and what a second command may do there."""

import json

import pytest

from mica.cli import lock, record
from mica.cli.compare import settings
from mica.errors import UsageError

GIVEN = {"model": "m", "text": ["t.txt"], "retain": ["r.txt"], "budget": 5.0}


def begin(output, given=GIVEN, resume=False, overwrite=False):
    with settings.held(output, given, resume, overwrite) as found:
        settings.begin(output, found, resume)
        return found


def test_a_comparison_goes_on_with_its_settings(tmp_path):
    output = tmp_path / "out"
    assert begin(output) == GIVEN
    assert json.loads((output / "settings.json").read_text()) == GIVEN
    (output / "runs" / "a.json").write_text("{}")
    assert begin(output, {}, resume=True) == GIVEN
    assert begin(output, {"budget": 5.0, "rank": 64}, resume=True) == GIVEN  # 64 is the default
    assert (output / "runs" / "a.json").exists()
    for other in ({"model": "n"}, {"rank": 4}):
        with pytest.raises(UsageError, match=r"not as in the comparison in .*; omit this option"):
            begin(output, other, resume=True)


def test_budget_and_seeds_may_change(tmp_path):
    output = tmp_path / "out"
    begin(output)
    other = GIVEN | {"budget": 60.0, "seeds": 6}
    assert begin(output, {"budget": 60.0, "seeds": 6}, resume=True) == other
    assert begin(output, {}, resume=True) == other


@pytest.mark.parametrize("text", ["{", "[1]", '{"some": "thing"}', "null"])
def test_settings_that_no_comparison_has_written_are_named(tmp_path, text):
    output = tmp_path / "out"
    begin(output)
    (output / "settings.json").write_text(text)
    with pytest.raises(UsageError, match=r"settings\.json: mica compare has not written it"):
        begin(output, {}, resume=True)


def test_a_comparison_that_was_refused_is_withdrawn(tmp_path):
    output = tmp_path / "out"
    with settings.held(output, GIVEN, False, False) as found:
        settings.begin(output, found, False)
        (output / "runs" / "base.json").write_text("{}")
        settings.withdraw(output)
    assert not output.exists()


def test_a_comparison_is_replaced_only_if_asked(tmp_path):
    output = tmp_path / "out"
    begin(output)
    (output / "runs" / "a.json").write_text("{}")
    with pytest.raises(UsageError, match="use --resume to continue, --overwrite to replace it"):
        begin(output)
    assert (output / "runs" / "a.json").exists()
    other = GIVEN | {"budget": 7.0}
    assert begin(output, other, overwrite=True) == other
    assert list((output / "runs").iterdir()) == []


def test_nothing_is_changed_before_it_begins(tmp_path):
    """What is wrong with the new model or text is found in between."""
    output = tmp_path / "out"
    begin(output)
    (output / "runs" / "a.json").write_text("{}")
    with settings.held(output, GIVEN | {"budget": 7.0}, False, True):
        pass
    assert (output / "runs" / "a.json").exists()
    assert json.loads((output / "settings.json").read_text()) == GIVEN
    with settings.held(tmp_path / "new", GIVEN, False, False):
        pass
    assert not (tmp_path / "new").exists()


def test_what_is_not_a_comparison_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UsageError, match=r"holds mine\.txt, which is not of a comparison"):
            begin(tmp_path, **options)
    with pytest.raises(UsageError, match=r"nothing to continue in .*: it has no settings\.json"):
        begin(tmp_path, {}, resume=True)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["mine.txt"]
    run = tmp_path / "run"
    record.write(run, record.Record(command=record.ADAPT))
    with pytest.raises(UsageError, match="mica adapt has written it: choose another folder"):
        begin(run, overwrite=True)


def test_a_file_of_yours_in_a_comparison_is_kept(tmp_path):
    output = tmp_path / "out"
    begin(output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt"):
        begin(output, overwrite=True)
    assert begin(output, {}, resume=True) == GIVEN
    assert (output / "notes.txt").read_text() == "mine"


def test_what_is_read_is_not_removed(tmp_path):
    output = tmp_path / "out"
    begin(output)
    (output / "runs" / "text.txt").write_text("a text")
    given = GIVEN | {"text": [str(output / "runs" / "text.txt")]}
    with pytest.raises(UsageError, match="--overwrite would remove"):
        begin(output, given, overwrite=True)
    assert (output / "runs" / "text.txt").exists()


def test_one_writer_at_a_time(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    message = "another run writes to it; wait for it or stop it"
    with lock.held(output / record.LOCK), pytest.raises(UsageError, match=message):
        begin(output)


def test_a_refusal_leaves_no_folder(tmp_path):
    with pytest.raises(UsageError, match="nothing to continue"):
        begin(tmp_path / "new" / "out", {}, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_rates_are_those_given_or_our_own():
    given = {"methods": ["mica", "lora"], "rates": [["lora", [1e-4, 3e-4]]]}
    assert settings.rates(given) == {"mica": [5e-4, 1e-3, 2e-3, 4e-3], "lora": [1e-4, 3e-4]}
    twice = {"methods": ["mica", "lora"], "rates": [["lora", [3e-4]], ["mica", [1e-3]], ["lora", [1e-4]]]}
    assert settings.rates(twice) == {"mica": [1e-3], "lora": [1e-4, 3e-4]}
    assert list(settings.rates({})) == ["mica", "lora", "full"]  # a random B is a control
    with pytest.raises(UsageError, match="--rates full: it is not compared: name it in --methods"):
        settings.rates(given | {"rates": [["full", [1e-5]]]})
