"""The wrong edits that ``make mutants`` makes, one at a time; each of them must turn tests red."""

from tests.support.mutants.backend import BACKEND
from tests.support.mutants.experts_path import EXPERTS_PATH
from tests.support.mutants.kernels import KERNELS
from tests.support.mutants.operators import OPERATORS

MUTANTS = [mutant for file in (*KERNELS, *OPERATORS, *BACKEND, *EXPERTS_PATH) for mutant in file.mutants()]
