"""The suite of host time: kernels that are not launched, and `generate()`."""

from contextlib import nullcontext

import pytest
import torch

import mica.fast
from bench.results import names
from bench.results.names import BARE, FAST, KERNELS, MERGED, STOCK
from bench.suites import bench_host, harness
from tests.support.models import tiny_llama

CELLS = "bench_host and not generation and float32 and backward"


def test_kernels_are_timed_that_are_not_launched(measured):
    code, result, output = measured(["bench_host.py"], CELLS)
    assert code == 0, output
    assert [group.axes["suite"] for group in result.groups] == ["host layer", "host block"]
    for group in result.groups:
        launches = {name: timing.facts["launches"] for name, timing in group.timings.items()}
        assert {name for name, count in launches.items() if count} == {KERNELS}
        assert {names.PYTORCH, STOCK} <= launches.keys()


@pytest.fixture
def tiny_generation(monkeypatch):
    """`generate()` of a tiny model; its cached setting is cleared afterwards."""
    monkeypatch.setattr(
        bench_host.models, "smollm2", lambda: tiny_llama(num_key_value_heads=2).requires_grad_(False)
    )
    monkeypatch.setattr(bench_host.models, "python_reference_tokens", lambda: torch.arange(3, 40))
    monkeypatch.setattr(harness, "refusals", {})
    yield
    bench_host.generate_setting.cache_clear()


def test_generating_is_timed_where_all_give_the_same_tokens(tiny_generation):
    implementations = bench_host.generate_setting("cell")
    assert list(implementations) == list(bench_host.GENERATE)
    assert implementations[FAST] is implementations[STOCK]
    assert bench_host.generated(implementations[BARE], 3).shape == (1, 3)


def test_stock_peft_under_our_name_is_refused_alone(tiny_generation, monkeypatch):
    monkeypatch.setitem(bench_host.GENERATE, FAST, mica.fast.disabled)
    assert bench_host.generate_setting("cell").keys() == {BARE, MERGED, STOCK}
    assert harness.refusals == {("cell", FAST): "mica.fast ran {}"}


def test_without_stock_peft_there_is_nothing_to_compare_with(tiny_generation, monkeypatch):
    monkeypatch.setitem(bench_host.GENERATE, STOCK, nullcontext)
    with pytest.raises(AssertionError, match=r"stock PEFT ran {'linear"):
        bench_host.generate_setting("cell")


@pytest.mark.parametrize("implementation", [MERGED, FAST])
def test_generating_other_tokens_than_stock_is_refused(tiny_generation, monkeypatch, implementation):
    order, generated = iter((STOCK, BARE, MERGED, FAST)), bench_host.generated

    def one_wrong(model, new_tokens):
        return generated(model, new_tokens) + (next(order) == implementation)

    monkeypatch.setattr(bench_host, "generated", one_wrong)
    assert bench_host.generate_setting("cell").keys() == {*bench_host.GENERATE} - {implementation}
    assert harness.refusals == {
        ("cell", implementation): f"{implementation} generates other tokens than stock PEFT"
    }


def test_generating_as_the_bare_model_does_is_refused(tiny_generation, monkeypatch):
    monkeypatch.setattr(bench_host.models, "randomise", lambda model, scale: model)  # A = 0
    with pytest.raises(AssertionError, match="the adapter makes no difference"):
        bench_host.generate_setting("cell")
