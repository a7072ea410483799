"""The folder of a comparison: whose it is, and what a second command may do there."""

import json

import pytest

from mica.cli.compare import settings
from mica.errors import UsageError

GIVEN = settings.DEFAULTS | {"model": "m", "text": ["t.txt"], "retain": ["r.txt"], "budget": 5.0}


@pytest.fixture
def output(tmp_path):
    """The folder of a comparison that has begun."""
    folder = tmp_path / "out"
    settings.check_output(folder)
    folder.mkdir()
    settings.write(folder, GIVEN)
    return folder


def test_a_comparison_goes_on_with_its_settings(output):
    """Budget and seeds may change."""
    assert settings.resumed(output, {}) == GIVEN
    assert settings.resumed(output, {"budget": 5.0, "rank": 64}) == GIVEN  # 64 is the default
    more = {"budget": 60.0, "seeds": 6}
    assert settings.resumed(output, more) == GIVEN | more
    for other in ({"model": "n"}, {"rank": 4}):
        with pytest.raises(UsageError, match=r"not as in the comparison in .*; omit this option"):
            settings.resumed(output, other)


def test_settings_that_this_version_has_not_written_are_named(output):
    path = output / "settings.json"
    settings.write(output, {"some": "thing"})
    for edited in (False, True):
        if edited:
            path.write_text(json.dumps(GIVEN | {"rank": 4}))
        with pytest.raises(UsageError, match=f"{path}: this version of mica compare has not written it: put"):
            settings.resumed(output, {})
    path.unlink()
    with pytest.raises(UsageError, match=f"nothing to continue in {output}: there is no settings.json"):
        settings.resumed(output, {})


def test_a_comparison_begins_in_an_empty_folder(output):
    assert json.loads((output / "settings.json").read_text()) == GIVEN
    with pytest.raises(UsageError, match=r"is not empty: choose another folder, or go on .* by --resume"):
        settings.check_output(output)


def test_rates_are_those_given_or_our_own():
    given = settings.DEFAULTS | {"methods": ["mica", "lora"], "rates": [["lora", [3e-4]]]}
    assert settings.rates(given) == {"mica": [5e-4, 1e-3, 2e-3, 4e-3], "lora": [3e-4]}
    twice = given | {"rates": [["lora", [3e-4]], ["mica", [1e-3]], ["lora", [1e-4]]]}
    assert settings.rates(twice) == {"mica": [1e-3], "lora": [1e-4, 3e-4]}
    assert list(settings.rates(settings.DEFAULTS)) == ["mica", "lora", "full"]
