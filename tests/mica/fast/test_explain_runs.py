"""The table's word is what ran: layers and calls on interpreted kernels, as if on a device."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import mica.fast
from mica.ops import trial
from mica.paths import tuning
from tests.support.models import wrap

LARGE = (32, 48)


class Call(NamedTuple):
    """A layer, a call of it, and what is demanded; by default a call on kernels."""

    features: tuple[int, int] = LARGE  # in, out
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    has_masters: bool = False  # an fp32 adapter
    dropout_p: float = 0.0
    is_called: bool = False  # the base layer, because of a hook on it
    tokens: tuple[int, ...] = (6,)
    gap: int = 0  # between the rows of x, in elements
    autocast: bool = False
    forms: tuple[str, str] = ("split", "split")
    backend: str = "auto"
    has_cpp: bool = True


def layer_of(call: Call):
    """One layer in a model."""
    torch.manual_seed(0)
    model = wrap(
        nn.Sequential(nn.Linear(*call.features, dtype=call.dtype)),
        rank=call.rank,
        targets=["0"],
        lora_dropout=call.dropout_p,
        autocast_adapter_dtype=call.has_masters,
    )
    if call.is_called:
        model.base_model.model[0].base_layer.register_forward_hook(lambda *_: None)
    return model.train()


def input_of(call: Call) -> torch.Tensor:
    in_features = call.features[0]
    buffer = torch.randn(*call.tokens, in_features + call.gap).to(call.dtype)
    return buffer[..., :in_features].requires_grad_()


def measured(forms: tuple[str, str], kind: tuning.Kind) -> tuning.Layer:
    """These, where the kind can have them."""
    possible = ["reference", *tuning.forms_of(kind)]
    return tuning.Layer(*(tuning.Part(form if form in possible else "split") for form in forms))


def run(model, call: Call) -> dict[str, str]:
    """Each function of `mica.paths` that ran in a forward and backward -> "kernels", "C++" or "Python"."""
    mica.fast.call_counts.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=call.autocast):
        y = model(input_of(call))
    y.backward(torch.randn_like(y))
    counts = mica.fast.call_counts
    how = {}
    for name in counts:
        if name.endswith(("_kernels", "_native", "_added")):
            continue
        how[name] = "Python"
        if counts[f"{name}_kernels"] == counts[name]:
            how[name] = "kernels"
        if counts[f"{name}_native"] == counts[name]:
            how[name] = "C++"
    return how


FP32, REFERENCE = torch.float32, ("reference", "reference")


@pytest.mark.parametrize(
    "call",
    [
        Call(),
        Call(forms=("split", "reference")),
        Call(forms=("reference", "split"), dropout_p=0.5),
        Call(forms=("fused", "first")),
        Call(forms=REFERENCE),
        Call(forms=REFERENCE, dropout_p=0.5),
        Call(forms=REFERENCE, has_cpp=False),
        Call(forms=REFERENCE, backend="triton"),
        Call(backend="reference"),
        Call(gap=8),
        Call(gap=8, tokens=(1,)),
        Call(gap=16, tokens=(2, 3)),
        Call(gap=8, dtype=FP32, autocast=True),
        Call(gap=8, dtype=FP32, autocast=True, has_cpp=False),
        Call(dtype=FP32, autocast=True, forms=REFERENCE),
        Call(features=(24, 40)),
        Call(rank=4, tokens=(7,), has_masters=True),
        Call(is_called=True),
        Call(is_called=True, dropout_p=0.5, has_masters=True, forms=REFERENCE),
    ],
    ids=str,
)
def test_the_tables_word_is_what_ran(call, by_default, monkeypatch):
    by_default()
    monkeypatch.setenv("MICA_BACKEND", call.backend)
    if not call.has_cpp:
        monkeypatch.setenv("MICA_NATIVE", "0")
    monkeypatch.setattr(trial, "_measured", lambda kind, *_: measured(call.forms, kind))
    model = layer_of(call)
    ran = run(model, call)
    (told,) = mica.fast.explain(model).rows

    assert ran.keys() == {"linear", "linear_backward"}
    on_kernels = set(ran.values()) == {"kernels"}
    assert told.path == ("kernel" if on_kernels else "reference"), (told, ran)
    of_backward = told.path == "reference" and "in the backward: " in told.reason
    assert of_backward == (ran["linear"] == "kernels" and not on_kernels)
    is_plain = call.backend == "auto" and call.has_cpp and not (call.is_called or call.dropout_p)
    if call.forms == REFERENCE and is_plain:
        assert ran["linear"] == "C++", (told, ran)
    if "called from Python: " in told.reason:
        assert ran["linear"] == "Python", (told, ran)
    if ran["linear"] == "C++":
        assert ran["linear_backward"] == "C++"
