"""The suite of host time: what it asks of a rival before and after it is timed."""

from collections import Counter
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch

import mica.fast
from tests.support.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
bench_host, results = (import_module(f"bench.{name}") for name in ("bench_host", "results"))
BOTH, NO_GRADIENT = results.BOTH, results.NO_GRADIENT


class Once:
    """Calls as `bench.conftest.Once`, and keeps what is noted; pytest-benchmark adds calls of its own."""

    def __init__(self):
        self.facts = {}

    def __call__(self, function, group, rival, axes, iterations, warm_up):
        for _ in range(iterations + 3):
            function()
        self.axes = axes

    def note(self, **facts):
        self.facts |= facts


def layer(context=nullcontext, operators=None):
    """A form whose calls run one operator of mica.fast each; what it says of that may be wrong."""
    module, lora_A = bench_host.adapted_module(
        bench_host.make_layer(4, 8, 8, 2, torch.float32, "cpu"), torch.float32, init="mica"
    )
    x = torch.randn(1, 4, 8, requires_grad=True)
    wanted = bench_host.operators(1) if operators is None else operators
    return bench_host.Form(lambda: module(x), (x, lora_A), torch.ones(1, 4, 8), context, wanted)


def timed(form, part):
    once = Once()
    form.time(once, part, 5, "group", "rival", {"suite": "host layer"})
    return once


@pytest.mark.parametrize("part", [BOTH, NO_GRADIENT])
def test_a_sample_holds_calls_of_one_kind_and_leaves_no_gradient(part):
    form = layer()
    before = Counter(mica.fast.call_counts)
    once = timed(form, part)
    ran = Counter(mica.fast.call_counts) - before
    assert ran["linear"] == 8
    assert ran["linear_backward"] == (8 if part == BOTH else 0)
    assert all(tensor.grad is None for tensor in form.inputs)
    assert once.axes == {"suite": "host layer", "call": part}
    assert once.facts == {"launches": 0}


@pytest.mark.parametrize(
    ("part", "context", "operators"),
    [
        (BOTH, mica.fast.disabled, None),  # stock PEFT under our name
        (NO_GRADIENT, mica.fast.disabled, None),
        (BOTH, nullcontext, {}),  # ours under stock PEFT's
        (NO_GRADIENT, nullcontext, {}),
        (BOTH, nullcontext, bench_host.operators(1, on_kernels=True)),  # the PyTorch form under the kernels'
        (BOTH, nullcontext, bench_host.operators(0, groups=1)),
    ],
)
def test_a_rival_under_another_ones_name_gets_no_number(part, context, operators):
    with pytest.raises(AssertionError, match="rival ran"):
        timed(layer(context, operators), part)


def test_operators_of_a_forward_and_backward():
    assert bench_host.operators(2, groups=1, on_kernels=True) == {
        "linear": 2,
        "linear_backward": 2,
        "linear_group": 1,
        "linear_group_backward": 1,
        "linear_kernels": 2,
        "linear_backward_kernels": 2,
        "linear_group_kernels": 1,
        "linear_group_backward_kernels": 1,
    }
    assert bench_host.operators(7) == {"linear": 7, "linear_backward": 7}


@pytest.fixture
def tiny_generation(monkeypatch):
    """`generate()` of a tiny model; what is learnt of it is forgotten afterwards."""
    monkeypatch.setattr(
        bench_host.models, "smollm2", lambda: tiny_llama(num_key_value_heads=2).requires_grad_(False)
    )
    monkeypatch.setattr(bench_host.models, "python_reference_tokens", lambda: torch.arange(3, 40))
    yield
    bench_host.generate_setting.cache_clear()


def test_generating_is_timed_where_all_give_the_same_tokens(tiny_generation):
    rivals = bench_host.generate_setting()
    assert list(rivals) == list(bench_host.GENERATE)
    assert rivals[results.FAST] is rivals[results.STOCK]
    assert bench_host.generated(rivals[results.BARE], 3).shape == (1, 3)


@pytest.mark.parametrize(
    ("rival", "context", "why"),
    [
        (results.STOCK, nullcontext, "stock PEFT ran {'linear"),
        (results.FAST, mica.fast.disabled, "mica.fast ran {}"),
    ],
)
def test_generating_under_another_ones_name_is_refused(tiny_generation, monkeypatch, rival, context, why):
    monkeypatch.setitem(bench_host.GENERATE, rival, context)
    with pytest.raises(AssertionError, match=why):
        bench_host.generate_setting()


@pytest.mark.parametrize("rival", [results.MERGED, results.FAST])
def test_generating_other_tokens_than_stock_is_refused(tiny_generation, monkeypatch, rival):
    order, generated = iter(bench_host.GENERATE), bench_host.generated

    def one_wrong(model, new_tokens):
        return generated(model, new_tokens) + (next(order) == rival)

    monkeypatch.setattr(bench_host, "generated", one_wrong)
    with pytest.raises(AssertionError, match=f"{rival} generates other tokens than stock PEFT"):
        bench_host.generate_setting()


def test_generating_as_the_bare_model_does_is_refused(tiny_generation, monkeypatch):
    monkeypatch.setattr(bench_host.models, "randomise", lambda model, scale: model)  # A = 0
    with pytest.raises(AssertionError, match="the adapter makes no difference"):
        bench_host.generate_setting()
