"""The wrong edits that ``make mutants`` makes, one at a time; each of them must turn tests red."""

from tests.support.mutants.backend import BACKEND
from tests.support.mutants.experts import EXPERTS
from tests.support.mutants.kernels import KERNELS
from tests.support.mutants.operators import OPERATORS

MUTANTS = [mutant for file in (*KERNELS, *EXPERTS, *OPERATORS, *BACKEND) for mutant in file.mutants()]
