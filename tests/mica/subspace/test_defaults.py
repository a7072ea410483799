"""``torch.set_default_device`` and ``torch.set_default_dtype`` are the caller's, and change nothing here."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mica import minor_subspace
from mica.fast.create import initialisation
from mica.subspace import batched, device, many
from mica.subspace.cache import SubspaceCache
from mica.subspace.fingerprint import fingerprint
from mica.subspace.many import Task, solve_many
from mica.subspace.methods import METHODS
from tests.support.spectra import RANK, weight
from tests.support.subspaces import same

DTYPES = (torch.float64, torch.bfloat16)


@pytest.fixture(params=["host", "accelerator", "weak fp64"])
def path(request, monkeypatch):
    if request.param != "host":
        monkeypatch.setattr(device, "ON_HOST", ())  # the CPU stands for one
    if request.param == "weak fp64":
        monkeypatch.setattr(batched, "has_weak_fp64", lambda where: True)


@pytest.fixture(params=["meta", *DTYPES], ids=str)
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


CASES = [(shape, method) for shape in ((140, 200), (200, 140), (60, 40), (150, 300)) for method in METHODS]


@pytest.mark.parametrize(("shape", "method"), CASES, ids=str)
def test_the_same_bits_under_any_default(path, foreign_default, shape, method):
    matrix = weight("gaussian", *shape)
    expected = minor_subspace(matrix, RANK, method=method)
    assert same(foreign_default(lambda: minor_subspace(matrix, RANK, method=method)), expected)


def test_so_have_null_directions_batches_and_large_numbers(path, foreign_default):
    singular = weight("gaussian", 60, 40)
    singular[:, :3] = 0
    batch = torch.stack([weight("gaussian", 140, 200), weight("gaussian", 140, 200) * 3])
    for matrix in (singular, batch, weight("gaussian", 140, 200).double() * 1e200, torch.zeros(30, 20)):
        solve = functools.partial(minor_subspace, matrix, RANK)
        with pytest.warns() if matrix.shape[0] > matrix.shape[-1] else torch.no_grad():
            expected = solve()
            assert same(foreign_default(solve), expected)


def test_so_have_many_and_the_cache(path, foreign_default, tmp_path):
    tasks = [Task(f"layer {i}", weight("gaussian", 40, 30 + i), 4) for i in range(3)]
    expected = dict(solve_many(tasks))
    cache = SubspaceCache(tmp_path)
    for _ in range(2):
        results = foreign_default(lambda: dict(solve_many(tasks, cache=cache)))
        assert all(same(results[index], expected[index]) for index in expected)
    key = fingerprint(tasks[0].weight)
    assert foreign_default(lambda: fingerprint(tasks[0].weight)) == key


def test_so_have_the_layers_of_a_model(path, foreign_default, monkeypatch):
    """PEFT makes its own tensors on the default device: the default is another one while B is solved."""
    monkeypatch.setattr(many, "accelerator", lambda: None)

    def adapted():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 20))
        config = LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights="mica")
        return [
            module.lora_B["default"].weight
            for module in get_peft_model(model, config).modules()
            if hasattr(module, "lora_B")
        ]

    expected = adapted()
    initialise = initialisation.initialise
    monkeypatch.setattr(initialisation, "initialise", lambda new: foreign_default(lambda: initialise(new)))
    results = adapted()
    assert len(results) == len(expected) == 2
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
