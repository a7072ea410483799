"""The list of `make mutants`: every edit has its place. Whether tests turn red is what that command shows."""

import ast
from pathlib import Path

import pytest

from tests.support.mutants import MUTANTS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_an_edit_has_one_place_and_leaves_python(file):
    source, faults = (ROOT / file).read_text(), []
    for mutant in MUTANTS:
        if mutant.file != file:
            continue
        try:
            start, end = mutant.span(source)
            edited = mutant.applied(source)
            definition = edited[start : end + len(edited) - len(source)]
            ast.parse("if True:\n" * definition.startswith(" ") + definition)  # methods are indented
        except (LookupError, SyntaxError) as error:
            faults.append(f"{mutant.function}: {error}")
        if mutant.old.split() == mutant.new.split():
            faults.append(f"{mutant.function}: {mutant.old!r} stays what it is")
    assert not faults


def test_the_tests_of_a_mutant_exist():
    names = {name for mutant in MUTANTS for name in mutant.tests if name.startswith("tests/")}
    assert names
    assert not [name for name in names if not (ROOT / name).is_file()]
