"""The model of a training, and what is measured after it; whole trainings are in test_session.py."""

import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer

import mica.fast
from mica.cli.compare import trainings
from mica.cli.compare.methods import METHODS, options
from tests.support.adapt_runs import adapter_settings
from tests.support.tiny_cli import logits, tiny_llama
from tests.support.unchanged import unchanged


@pytest.mark.parametrize(
    ("documents", "chosen"),
    [
        ([1, 1, 2, 2, 3, 3, 4, 4], [0, 1]),
        ([4, 4, 3, 3, 2, 2, 1, 1], [6, 7]),  # whatever their order
        ([5, 5, 5, 5, 5, 7, 8, 9], [0, 4]),  # the first is too long
        ([1] * 8, [0, 4]),
    ],
)
def test_rates_are_chosen_by_documents_of_their_own(documents, chosen):
    assert trainings._for_choosing(documents) == chosen


def test_the_first_step_is_not_timed():
    """It fills caches."""
    clock = trainings._Clock()
    began = []
    for step in range(1, 5):
        clock.on_step_end(None, SimpleNamespace(global_step=step), None)
        began.append(clock.began)
    assert clock.steps == 3
    assert {*began} == {began[0]} != {0.0}


@pytest.mark.parametrize("loss", [math.nan, math.inf, 2.0])
def test_a_loss_that_is_not_finite_is_seen(loss, monkeypatch):
    losses = iter([SimpleNamespace(loss=1.0), SimpleNamespace(loss=loss)])
    monkeypatch.setattr(trainings.evaluation, "likelihood", lambda *args: next(losses))
    measured = trainings.measure(None, {"validation": [0], "retained": [0]})
    if loss == 2.0:
        assert measured == {"losses": {"validation": [1.0], "retained": [2.0]}, "failed": None}
    else:
        assert measured == {"losses": {}, "failed": trainings.DIVERGED}


@pytest.fixture
def base():
    return tiny_llama().requires_grad_(False)


def model_of(method, base, seed=0):
    return trainings.built(base, options(method, adapter_settings(target_modules="all-linear"), seed=seed))


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_the_base_and_leaves_it_as_it_was(method, base):
    expected = logits(base)
    with unchanged(base), model_of(method, base) as model:
        mica.fast.call_counts.clear()
        torch.testing.assert_close(logits(model), expected)
        if method != "dora":
            assert mica.fast.call_counts["linear"] == len(layers(model))  # on the same operators
        for parameter in model.parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(1.0)  # a training
        assert not torch.allclose(logits(model), expected)


def test_what_is_trained(base):
    trained = {}
    for method in METHODS:
        with model_of(method, base) as model:
            names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            ranks = {layer.r["default"] for layer in layers(model).values()}
            assert {layer.scaling["default"] for layer in layers(model).values()} <= {2.0}
            trained[method] = {name.rpartition(".lora_")[2][:1] for name in names}, ranks
    assert trained["mica"] == ({"A"}, {4})
    assert trained["lora"] == ({"A", "B"}, {2})
    assert trained["dora"] == ({"A", "B", "m"}, {2})  # the magnitudes, too
    assert len(names) == len(list(base.parameters()))  # all of them, last
    with model_of("full", base.bfloat16()) as model:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_seed_draws_a_of_lora(base):
    found = []
    for seed in (0, 1, 0):
        with model_of("lora", base, seed) as model:
            found.append([layer.lora_A["default"].weight.detach() for layer in layers(model).values()])
    for first, other, again in zip(*found, strict=True):
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)


def test_an_error_takes_the_adapter_off(base):
    with pytest.raises(ZeroDivisionError), model_of("mica", base):
        raise ZeroDivisionError
    assert not layers(base)


def test_a_rank_of_one_has_no_half():
    assert options("lora", Namespace(rank=1, alpha=1)).rank == 1
