"""The wrong edits that ``make mutants`` makes, one at a time; each of them must turn tests red.

They stand in the YAML files of this folder: a file of the product, pytest's arguments for the tests that must
notice, and by function the edits, in which "-" is what is replaced and "+" what replaces it.
"""

from pathlib import Path

from tests.support.mutants.edits import mutants

MUTANTS = [mutant for path in sorted(Path(__file__).parent.glob("*.yaml")) for mutant in mutants(path)]
