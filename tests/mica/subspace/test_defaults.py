"""``torch.set_default_device`` and ``torch.set_default_dtype`` are the caller's, and change nothing here."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mica.fast.create import initialisation
from mica.subspace import device, many
from mica.subspace.cache import SubspaceCache
from mica.subspace.many import Task, solve_many
from mica.subspace.methods import METHODS
from tests.support.spectra import RANK, stack, weight
from tests.support.subspaces import quietly_solved, same

pytestmark = pytest.mark.usefixtures("path")


@pytest.fixture(params=["host", "accelerator", "weak fp64"])
def path(request, monkeypatch):
    if request.param != "host":
        monkeypatch.setattr(device, "ON_HOST", ())  # the CPU stands for one
    if request.param == "weak fp64":
        request.getfixturevalue("weak_fp64")


@pytest.fixture(params=["meta", torch.float64, torch.bfloat16], ids=str)
def foreign_default(request):
    """A function that runs another one under a default that is not the weights'."""

    def under(function):
        if request.param == "meta":  # whatever is made there holds no numbers: the first look at it raises
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)

    return under


WEIGHTS = {
    **{str(shape): weight("gaussian", *shape) for shape in ((140, 200), (200, 140), (60, 40), (150, 300))},
    "null directions": weight("zero rows and columns", 60, 40),
    "a batch": stack(["gaussian", "times 1e4"], (140, 200)),
    "large numbers": weight("gaussian", 140, 200).double() * 1e200,
    "zero": torch.zeros(30, 20),
}
CASES = [(name, method) for name in WEIGHTS for method in (METHODS if name[0] == "(" else ["auto"])]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_same_bits_under_any_default(foreign_default, name, method):
    def solve():
        return quietly_solved(WEIGHTS[name], RANK, method=method)

    expected = solve()
    assert same(foreign_default(solve), expected)


def test_so_have_many_and_the_cache(foreign_default, tmp_path):
    tasks = [Task(f"layer {i}", weight("gaussian", 40, 30 + i), 4) for i in range(3)]
    expected = dict(solve_many(tasks))
    cache = SubspaceCache(tmp_path)
    key = tasks[0].key
    for _ in range(2):
        again = [Task(task.name, task.weight, task.rank) for task in tasks]
        results = foreign_default(lambda again=again: dict(solve_many(again, cache=cache)))
        assert all(same(results[index], expected[index]) for index in expected)
        assert again[0].key == key


def test_so_have_the_layers_of_a_model(foreign_default, monkeypatch):
    """PEFT makes its own tensors on the default device: the default is another one while B is solved."""
    monkeypatch.setattr(many, "accelerator", lambda: None)

    def adapted():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 20))
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights="mica"))
        return [module.lora_B["default"].weight for module in model.modules() if hasattr(module, "lora_B")]

    expected = adapted()
    initialise = initialisation.initialise
    monkeypatch.setattr(initialisation, "initialise", lambda new: foreign_default(lambda: initialise(new)))
    results = adapted()
    assert len(results) == len(expected) == 2
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
