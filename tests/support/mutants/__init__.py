"""The wrong edits that ``make mutants`` makes, one at a time; each of them must turn tests red."""

from tests.support.mutants.adapt import ADAPT
from tests.support.mutants.adapt_run import ADAPT_RUN
from tests.support.mutants.backend import BACKEND
from tests.support.mutants.commands import COMMANDS
from tests.support.mutants.creation import CREATION
from tests.support.mutants.edits import mutants
from tests.support.mutants.embeddings import EMBEDDINGS
from tests.support.mutants.experts import EXPERTS
from tests.support.mutants.experts_path import EXPERTS_PATH
from tests.support.mutants.kernels import KERNELS
from tests.support.mutants.lifecycle import LIFECYCLE
from tests.support.mutants.native import NATIVE
from tests.support.mutants.operators import OPERATORS
from tests.support.mutants.serving import SERVING
from tests.support.mutants.stopping import STOPPING
from tests.support.mutants.subspace import SUBSPACE
from tests.support.mutants.values import VALUES

_TABLES = (KERNELS, EXPERTS, OPERATORS, BACKEND, EXPERTS_PATH, SUBSPACE)
_TABLES += (LIFECYCLE, CREATION, STOPPING, EMBEDDINGS, ADAPT, ADAPT_RUN, COMMANDS, SERVING, VALUES, NATIVE)
MUTANTS = [mutant for table in _TABLES for mutant in mutants(table)]
