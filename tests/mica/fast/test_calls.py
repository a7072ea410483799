"""How often layers were called, and how their last call ran, as `explain` reports it."""

import copy
import itertools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mica.fast
from mica.fast.forward import layer_calls
from tests.support.models import net, wrap
from tests.support.moe_models import second
from tests.support.stock import as_graph

INDICES = torch.tensor([[1, 5]])


def called(model) -> dict[str, int | None]:
    return {row.name.rpartition("model.")[2]: row.calls for row in mica.fast.explain(model).rows}


def said(model) -> dict[str, tuple[str, str]]:
    return {row.name.rpartition("model.")[2]: (row.path, row.reason) for row in mica.fast.explain(model).rows}


def printed_calls(explanation) -> list[str]:
    """The column "calls", line by line."""
    header, *lines = str(explanation).splitlines()
    table = itertools.takewhile(lambda line: not re.match(r"\[|\d+ layer", line), lines)
    return [line[header.index("calls") :].split()[0] for line in table]


@pytest.fixture(params=[True, False], ids=["C++", "Python"])
def any_language(request, monkeypatch):
    if not request.param:
        monkeypatch.setenv("MICA_NATIVE", "0")
        monkeypatch.setenv("MICA_BACKEND", "reference")  # small inputs, too


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)

    def forward(self, x):
        return self.down(self.up(self.up(x)))


@pytest.fixture
def model():
    return wrap(Twice(), targets=["up", "down"])


def test_a_layer_called_twice(model):
    assert called(model) == {"up": None, "down": None}
    for times in (1, 2):
        model(torch.ones(2, 8))
        assert called(model) == {"up": 2 * times, "down": times}
    assert printed_calls(mica.fast.explain(model)) == ["4", "2"]
    assert set(called(model.base_model.model).values()) == {4, 2}  # a part has the counts of the whole
    with mica.fast.disabled():
        model(torch.ones(2, 8))
    assert called(model) == {"up": 4, "down": 2}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_recomputation_in_a_backward_does_not_count(model, whole, reentrant, any_language):
    x = torch.randn(2, 8, requires_grad=True)
    if whole:
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    else:
        inner = model.base_model.model
        inner.forward = lambda x, forward=inner.forward: checkpoint(forward, x, use_reentrant=reentrant)
        model(x).sum().backward()
    assert called(model) == {"up": 2, "down": 1}


def test_with_a_new_adapter_nothing_is_known():
    model = wrap(Twice(), targets=["up"])
    model(torch.ones(2, 8))
    assert called(model) == {"up": 2}
    second(model, target_modules=["down"])
    assert called(model) == {"up": None, "down": None}
    model(torch.ones(2, 8))
    assert called(model) == {"up": 2, "down": 1}


def test_nothing_is_left_in_the_model():
    model = net()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model(INDICES)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(called(again).values()) == {None}
    assert set(called(model).values()) == {1}


def test_the_last_call_s_x_is_known(model, any_language):
    inner = model.base_model.model
    inner.forward = lambda x: inner.up(inner.up(x)[:1])
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(2, 8))
    (calls,) = layer_calls.calls_of([inner.up]).values()
    assert calls == (2, None, (torch.bfloat16, (1, 8), (8, 1), torch.bfloat16))


@pytest.mark.parametrize("regional", [False, True])
def test_compiled_calls_are_not_seen_and_never_denied(model, regional):
    inner = model.base_model.model
    expected = model(torch.ones(2, 8))
    assert called(model) == {"up": 2, "down": 1}
    if regional:
        inner.forward = as_graph(inner.forward)
    run = model if regional else as_graph(model)
    for _ in range(2):
        torch.testing.assert_close(run(torch.ones(2, 8)), expected)
        assert set(called(model).values()) == {None}
    other = wrap(Twice(), targets=["up", "down"])
    other(torch.ones(2, 8))
    assert called(other) == {"up": 2, "down": 1}


# -- the path that a call took ------------------------------------------------------------------------


DTYPES = "an input of torch.float64 with lora_A of torch.float64 and lora_B of torch.float64"


def autocast():
    """Which leaves fp64 alone, so that PEFT's code runs: a call shows it, and no layer does."""
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def wide(model):
    return model.double()


X = torch.randn(2, 8, dtype=torch.float64)


def test_a_call_of_peft_s_code_is_said_until_one_without(wide):
    embedding = net(torch.float64)
    with autocast():
        embedding(INDICES)
    assert {path for path, _ in said(embedding).values()} == {"peft"}
    before = said(wide)
    assert {path for path, _ in before.values()} == {"reference"}
    ran = mica.fast.call_counts["linear"]
    with autocast():
        wide(X)
    assert mica.fast.call_counts["linear"] == ran
    peft = dict.fromkeys(before, ("peft", f"in its last call: {DTYPES}"))
    assert said(wide) == peft
    with mica.fast.disabled():
        wide(X)  # says nothing about calls with the backend on
    assert said(wide) == peft
    wide(X)
    assert said(wide) == before


def test_further_arguments_are_peft_s(wide):
    inner = wide.base_model.model
    inner.forward = lambda x: inner.down(inner.up(x, adapter_names=None))
    wide(X)
    assert said(wide)["up"] == ("peft", "in its last call: a call with further arguments")
    assert said(wide)["down"][0] == "reference"
