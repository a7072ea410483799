"""Random actions on a model with the backend, and on its twin with stock PEFT (`make fuzz`: for longer)."""

import pytest
import torch
from hypothesis.stateful import run_state_machine_as_test
from peft import LoraConfig

from tests.support.fuzz_machine import TALLY, OnKernels, machine, options, tally
from tests.support.fuzz_models import MIXTURES
from tests.support.fuzz_quantised import Quantised
from tests.support.fuzz_runs import Runs
from tests.support.fuzz_twins import Twins

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

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
    drive(machine(name, KIND_NAMES=kinds), examples, steps)


def test_interpreted_kernels_do_what_peft_does():
    drive(type("Kernels", (OnKernels,), {"DTYPES": [torch.float32]}), 3, 8)


def test_a_quantised_merge_is_off_by_one_quantisation():
    pytest.importorskip("bitsandbytes")
    drive(Quantised, 10, 15)


def test_a_run_of_mica_adapt_that_is_broken_off_ends_as_the_unbroken_one():
    drive(Runs, 2, 4)


def test_an_adapter_added_while_another_is_merged():
    """Found by `make fuzz`: stock's B, of the merged weight, has less energy in a weight with out > in."""
    targets = ["c_attn", "c_proj", "c_fc"]
    config = {"init_lora_weights": "gaussian", "r": 2, "lora_alpha": 1, "target_modules": targets}
    twins = Twins("gpt2", torch.float32, config)
    twins.each(lambda model: model.merge_adapter())
    config |= {"init_lora_weights": "mica", "r": 1, "target_modules": ["c_fc"]}
    twins.each(lambda model: model.add_adapter("two", LoraConfig(**config)))
    twins.adopt("two", True, 0)


def test_no_action_is_dead():
    """Each of them did something in the sequences above."""
    if sum(count["tried"] for count in TALLY.values()) < 1000:
        pytest.skip("this test counts what those before it in this file did")
    # whether a run has a checkpoint to be damaged is a matter of moments: `make fuzz` counts these
    dead = {name for name, count in TALLY.items() if not count["effective"]} - {"damaged", "refused"}
    assert not dead, f"{dead} never did anything:\n{tally()}"
