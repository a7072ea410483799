"""The table's word is what ran: random layers and calls on interpreted kernels, as if on a device."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn

import mica.fast
from mica.kernels import configs
from mica.ops import trial
from mica.paths import choose, tuning
from tests.support.models import wrap

FORWARDS = {"linear", "down_projection", "up_projection"}
LARGE = (32, 48)


class Drawn(NamedTuple):
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


# Shrinking takes minutes, and a call has few parts.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
FORMS = st.sampled_from(configs.FORM_NAMES)
DRAWN = st.builds(
    Drawn,
    features=st.tuples(st.sampled_from([32, 48, 24]), st.sampled_from([32, 48, 40])),
    rank=st.sampled_from([4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    has_masters=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.5]),
    is_called=st.booleans(),
    tokens=st.sampled_from([(1,), (6,), (7,), (2, 3), (2, 2, 2)]),
    gap=st.sampled_from([0, 8, 16]),
    autocast=st.booleans(),
    forms=st.tuples(FORMS, FORMS),
    backend=st.sampled_from(["auto", "auto", "triton", "reference"]),
    has_cpp=st.booleans(),
)


def layer_of(call: Drawn):
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


def input_of(call: Drawn) -> torch.Tensor:
    in_features = call.features[0]
    buffer = torch.randn(*call.tokens, in_features + call.gap).to(call.dtype)
    return buffer[..., :in_features].requires_grad_()


def measured(forms: tuple[str, str], kind: tuning.Kind) -> tuning.Layer:
    """These, where the kind can have them."""
    possible = ["reference", *choose.forms_of(kind)]
    return tuning.Layer(*(tuning.Part(form if form in possible else "split") for form in forms))


def run(model, call: Drawn) -> dict[str, str]:
    """Each function of `mica.paths` that ran in a forward and backward -> "kernels", "C++" or "Python"."""
    mica.fast.call_counts.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=call.autocast):
        y = model(input_of(call))
    y.backward(torch.randn_like(y))
    counts = mica.fast.call_counts
    how = {}
    for name in counts:
        if name.endswith(("_kernels", "_native")):
            continue
        how[name] = "Python"
        if counts[f"{name}_kernels"] == counts[name]:
            how[name] = "kernels"
        if counts[f"{name}_native"] == counts[name]:
            how[name] = "C++"
    return how


@settings(max_examples=15, deadline=None, phases=PHASES)
@given(DRAWN)
@example(Drawn())
@example(Drawn(forms=("split", "reference")))
@example(Drawn(forms=("reference", "split"), dropout_p=0.5))
@example(Drawn(forms=("reference", "reference")))
@example(Drawn(gap=8))
@example(Drawn(gap=8, tokens=(1,)))
@example(Drawn(gap=8, dtype=torch.float32, autocast=True))
@example(Drawn(dtype=torch.float32, autocast=True, forms=("reference", "reference")))
@example(Drawn(forms=("reference", "reference"), dropout_p=0.5))
@example(Drawn(forms=("reference", "reference"), has_cpp=False))
@example(Drawn(features=(24, 40)))
@example(Drawn(gap=8, dtype=torch.float32, autocast=True, has_cpp=False))
def test_the_tables_word_is_what_ran_in_a_few_calls(call):
    check(call)


def check(call: Drawn) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # as if the CPU, on which kernels are interpreted, were a device that has them
        patch.setenv("MICA_BACKEND", call.backend)
        if not call.has_cpp:
            patch.setenv("MICA_NATIVE", "0")
        patch.setattr(choose.runtime, "is_interpreting", lambda: False)
        patch.setattr(choose.runtime, "why_unavailable", lambda device: None)
        patch.setattr(trial, "_measured", lambda kind, *_: measured(call.forms, kind))
        choose.clear()
        choose.devices_without_kernels.clear()
        model = layer_of(call)
        ran = run(model, call)
        (told,) = mica.fast.explain(model).rows
    choose.clear()

    assert ran.keys() & FORWARDS == ({"down_projection", "up_projection"} if call.is_called else {"linear"})
    on_kernels = set(ran.values()) == {"kernels"}
    assert told.path == ("kernel" if on_kernels else "reference"), (told, ran)
    forwards = {how for name, how in ran.items() if name in FORWARDS}
    of_backward = told.path == "reference" and "in the backward: " in told.reason
    assert of_backward == (forwards == {"kernels"} and not on_kernels)
    is_reference = call.forms == ("reference", "reference")
    if is_reference and call.backend == "auto" and call.has_cpp and not (call.is_called or call.dropout_p):
        assert ran["linear"] == "C++", (told, ran)
    if "called from Python: " in told.reason:
        assert ran["linear"] == "Python", (told, ran)
    if ran.get("linear") == "C++":
        assert ran["linear_backward"] == "C++"
