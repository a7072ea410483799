"""Whose classes of experts compute the formula in eager: all of transformers'. Those of others need not."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import mica.fast
from mica.fast.forward import experts
from tests.support.moe_steps import block, call_of, outermost, ran
from tests.support.stock import as_stock
from tests.support.tolerances import RELATIVE

EXPERTS, HIDDEN, INNER = 4, 16, 12


def is_ours(model):
    """Whether a call runs on the operators; its result is stock PEFT's in any case, and explain says it."""
    arguments = call_of()
    _, counts = ran(lambda: as_stock(lambda: model(*arguments), RELATIVE[torch.float32]))
    ours = counts[0] == 2
    assert {row.path == "peft" for row in mica.fast.explain(model).rows} == {not ours}
    return ours


# ---------------------------------------------------------------------------------------------------
# transformers' own
# ---------------------------------------------------------------------------------------------------


def _classes():
    """(module, name) of every class of transformers that dispatches."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text()
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", source, re.MULTILINE):
            yield pytest.param(f"transformers.models.{path.parent.name}.{path.stem}", name, id=name)


class _Config:
    """Of any class: small sizes, a SiLU, and numbers for what limits it."""

    def __getattr__(self, name):
        sizes = {"expert": EXPERTS, "intermediate": INNER, "act": "silu", "latent": None, "hidden": HIDDEN}
        return next((size for part, size in sizes.items() if part in name), 0.5)


def small(cls):
    base = cls(_Config())
    with torch.no_grad():
        for weight in base.parameters():
            weight.normal_(std=0.3)
    return base


@pytest.mark.parametrize(("module", "name"), list(_classes()))
def test_every_class_of_transformers_computes_the_formula_in_eager(module, name):
    assert is_ours(block(small(vars(importlib.import_module(module))[name]), "eager"))


# ---------------------------------------------------------------------------------------------------
# somebody else's
# ---------------------------------------------------------------------------------------------------


@moe.use_experts_implementation
class Clamped(nn.Module):
    """Decorated, with a forward of its own that clamps what the grouped function does not."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))
        self.num_experts, self.act_fn = EXPERTS, nn.SiLU()

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, place = torch.where(index == expert)
            gate, up = nn.functional.linear(x[token], self.gate_up_proj[expert]).chunk(2, -1)
            hidden = self.act_fn(gate.clamp(max=0.1)) * up
            rows = nn.functional.linear(hidden, self.down_proj[expert])
            out.index_add_(0, token, rows * weights[token, place, None])
        return out


class OtherGate(MixtralExperts):
    """Its gate is the grouped function's alone: Mixtral's own forward states another."""

    def _apply_gate(self, gate_up):
        return gate_up.chunk(2, -1)[0]


class Renamed(MixtralExperts):
    pass


FORMULA = {  # whether the operators run it: in eager, and in grouped_mm
    Clamped: (False, True),
    moe.use_experts_implementation(type("Again", (Clamped,), {})): (False, True),
    OtherGate: (False, True),
    Renamed: (True, True),
}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("cls", FORMULA, ids=lambda cls: cls.__name__)
def test_a_forward_of_somebody_else_s_own_runs(cls, implementation):
    assert is_ours(block(small(cls), implementation)) == FORMULA[cls][implementation == "grouped_mm"]


def test_a_forward_replaced_behind_the_decorator_runs(monkeypatch):
    """Or a function that somebody registers as "eager": both are what transformers would call."""
    model = block(small(MixtralExperts), "eager")
    assert is_ours(model)
    with monkeypatch.context() as patch:
        patch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "eager", lambda self, x, *args: 2 * x)
        assert not is_ours(model)
    forward = MixtralExperts.forward
    cell = forward.__closure__[forward.__code__.co_freevars.index("original_forward")]
    monkeypatch.setattr(cell, "cell_contents", lambda self, x, *args: 3 * x)
    assert not is_ours(model)
    monkeypatch.undo()
    assert is_ours(model)


def test_a_gate_of_the_instance_that_its_forward_does_not_call():
    model = block(small(MixtralExperts), "eager")
    experts_ = outermost(model).get_base_layer()
    experts_._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[0]
    assert (
        "an _apply_gate that MixtralExperts's forward does not call"
        in experts.decide(outermost(model)).reason
    )
    assert not is_ours(model)
