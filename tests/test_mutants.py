"""The list of `make mutants`: every edit has its place. Whether tests turn red is what that command shows."""

import ast
from pathlib import Path

import pytest

from tests.support.mutants import MUTANTS
from tests.support.mutants.edits import Mutant

ROOT = Path(__file__).resolve().parent.parent
SOURCE = """LIMIT = 3


def outer(x):
    def inner(y):
        return y <  LIMIT

    return inner(x) and x < LIMIT
"""


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_an_edit_has_one_place_and_leaves_python(file):
    source = (ROOT / file).read_text()
    before, faults = ast.dump(ast.parse(source)), []
    for mutant in MUTANTS:
        if mutant.file != file:
            continue
        try:
            is_an_edit = ast.dump(ast.parse(mutant.applied(source))) != before
        except (LookupError, SyntaxError) as error:
            faults.append(f"{mutant.function}: {error}")
        else:
            faults += [] if is_an_edit else [f"{mutant.function}: {mutant.old!r} stays what it is"]
    assert not faults


def test_the_tests_of_a_mutant_exist():
    names = {name for mutant in MUTANTS for name in mutant.tests if name.startswith("tests/")}
    assert names
    assert not [name for name in names if not (ROOT / name).is_file()]


def edited(function, old, new="x"):
    return Mutant("file.py", function, old, new, []).applied(SOURCE)


def test_white_space_does_not_matter_and_only_the_function_is_edited():
    assert edited("outer.inner", "y < LIMIT", "y <= LIMIT") == SOURCE.replace("y <  LIMIT", "y <= LIMIT")
    assert edited("LIMIT", "3", "4") == SOURCE.replace("3", "4")


@pytest.mark.parametrize(
    ("function", "old", "message"),
    [
        ("inner", "y", "defines inner 0 times"),
        ("outer", "LIMIT", "occurs 2 times in outer"),
        ("outer.inner", "x", "occurs 0 times"),
    ],
)
def test_an_edit_without_one_place_is_refused(function, old, message):
    with pytest.raises(LookupError, match=message):
        edited(function, old)
