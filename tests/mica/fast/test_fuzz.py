"""Random actions on a model with the backend, and on its twin with stock PEFT (`make fuzz`: for longer)."""

import pytest
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz.machine import Machine, options
from tests.fuzz.models import MIXTURES
from tests.fuzz.runs import Runs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# name -> kinds of models, sequences, actions in each
VARIANTS = {
    "llama": (["llama"], 10, 25),
    "gpt2": (["gpt2"], 8, 25),
    "gemma": (["gemma"], 8, 25),
    "t5": (["t5"], 7, 25),
    "shared": (["shared", "inplace"], 14, 30),
    "experts": (MIXTURES, 8, 20),
}


def drive(fuzzed: type, examples: int, steps: int) -> None:
    """The same sequences in every run. A failure is not shrunk, which takes minutes: `make fuzz` does."""
    run_state_machine_as_test(fuzzed, settings=options(examples, steps, derandomize=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_backend_does_what_peft_does(name):
    kinds, examples, steps = VARIANTS[name]
    drive(type(name, (Machine,), {"KIND_NAMES": kinds}), examples, steps)


def test_a_run_of_mica_adapt_that_is_broken_off_ends_as_the_unbroken_one():
    drive(Runs, 4, 4)
