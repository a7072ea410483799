"""What `mica compare --help` says."""

import pytest

from mica.cli import main
from mica.cli.adapt.options import RECIPES


def test_values_of_a_recipe_that_do_not_count_are_not_listed(capsys):
    """A comparison has its own rank, lengths and learning rates."""
    assert main(["compare", "--help"]) == 0
    _, _, recipes = capsys.readouterr().out.partition("recipes:")
    rows = {line.split()[0] for line in recipes.partition("example:")[0].splitlines()[1:] if line}
    known = {name for recipe in RECIPES.values() for name in recipe}
    assert known - rows == {"source", "rank", "steps", "epochs", "learning_rate"}
    assert rows <= known


@pytest.mark.parametrize(
    "line", ["[64]", "default: all but random, which is a control", "minutes of wall time"]
)
def test_defaults_are_those_of_the_comparison(capsys, line):
    main(["compare", "--help"])
    assert line in " ".join(capsys.readouterr().out.split())
