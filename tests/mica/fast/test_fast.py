"""Which calls the quick check in C++ recognises, and with which operands it calls.

What it overlooks would run wrongly. What it refuses needlessly runs slowly, which no other test sees.
"""

import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as nn_module

from mica import native
from mica.fast import settings
from mica.fast.forward.fast import call_cpp
from mica.ops import linear, recompute
from tests.support.cpp import needs_cpp
from tests.support.layer_changes import (
    A_WEIGHT,
    B_WEIGHT,
    BASE_WEIGHT,
    CALLED,
    CHANGES_OF,
    INPUTS,
    X,
    add,
    changed,
    layer_of,
)
from tests.support.linear_calls import Seen, SeenFunctions
from tests.support.processor import has_instructions

pytestmark = needs_cpp


@pytest.fixture(autouse=True)
def calls_return_their_operands(monkeypatch):
    """As with kernels, which are called from Python."""
    monkeypatch.setenv("MICA_BACKEND", "triton")
    with monkeypatch.context() as patch:
        patch.setattr(linear, "linear", lambda x, *operands: operands)
        linear.configure(native.module())
        yield
    linear.configure(native.module())


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


WEIGHTS = ["base_layer.bias", BASE_WEIGHT, A_WEIGHT, B_WEIGHT]


def replaced(part, make):
    return changed(part, lambda weight: nn.Parameter(make(weight.detach()), weight.requires_grad))


def check_common(layer, x=X, dropout_p=0.0, autocast_dtype=None, name="default"):
    """It is recognised, with these operands, which are nobody's copies."""
    weight, lora_A, lora_B, scaling, bias, compute_dtype, p, seed, autocast, trains_B, y = call_cpp(layer, x)
    assert weight is layer.base_layer.weight
    assert bias is layer.base_layer.bias
    assert y is None
    assert lora_A is layer.lora_A[name].weight
    assert lora_B is layer.lora_B[name].weight
    assert scaling == layer.scaling[name]
    product_dtype = None if autocast_dtype else settings.compute_dtype(x.dtype, lora_A.dtype)
    assert (compute_dtype, p, autocast) == (product_dtype, dropout_p, autocast_dtype)
    assert (seed is None) == (dropout_p == 0.0)
    assert trains_B == (name not in layer.lora_variant)


def check_base_called(layer, x=X):
    """Its output, or its error, instead of its weight."""
    expected, errors = None, (RuntimeError, AttributeError)
    with suppress(*errors):
        expected = layer.base_layer(x)
    with nullcontext() if expected is not None else pytest.raises(errors):
        weight, *_, base_output = call_cpp(layer, x)
        assert weight is None
        assert torch.allclose(base_output, expected, rtol=0, atol=0, equal_nan=True)


def check_uncommon(layer, x=X):
    assert call_cpp(layer, x) is None


@pytest.mark.parametrize(
    ("adapter", "name"),
    [(adapter, name) for adapter, changes in CHANGES_OF.items() for name in changes],
    indirect=["adapter"],
)
def test_a_change_is_seen_and_so_is_its_undoing(adapter, name):
    layer = layer_of(adapter=adapter)
    change, operators, _ = CHANGES_OF[adapter][name]
    check_common(layer)
    undo = change(layer)
    try:
        if not operators or name == "DoRA" or name.startswith("a scaling that is"):
            check_uncommon(layer)
        elif operators == CALLED:
            check_base_called(layer)
        elif name == "two adapters":
            weight, *_, (first, *_) = call_cpp(layer, X)
            assert (weight, first) == (None, layer.base_layer.weight)
        elif name == "dropout":
            check_common(layer, dropout_p=0.5)
        else:
            check_common(layer, name="second" if name == "another adapter" else "default")
    finally:
        undo()
    if name != "a parametrized base":  # whose weight PyTorch makes a buffer
        check_common(layer)


# -- numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "is_common"),
    [
        *((dtype, dtype, True) for dtype in (FP64, FP32, BF16, FP16)),
        (BF16, FP32, True),
        (FP16, FP32, True),
        (BF16, FP16, False),
        (BF16, FP64, False),
        (FP32, BF16, False),
        (FP64, FP32, False),
    ],
)
def test_dtypes(adapter, dtype, adapter_dtype, is_common):
    layer = layer_of(dtype, adapter)
    layer.lora_A.to(adapter_dtype), layer.lora_B.to(adapter_dtype)
    for around in (nullcontext, torch.no_grad):
        with around():
            (check_common if is_common else check_uncommon)(layer, X.to(dtype))


@pytest.mark.parametrize("autocast_dtype", [BF16, FP16])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(FP32, FP32), (BF16, FP32), (FP32, BF16), (BF16, FP16)])
def test_autocast(adapter, dtype, adapter_dtype, autocast_dtype):
    layer = layer_of(dtype, adapter)
    layer.lora_A.to(adapter_dtype), layer.lora_B.to(adapter_dtype)
    with torch.autocast("cpu", autocast_dtype):
        for x in (X, X.bfloat16(), X.half()):
            check_common(layer, x, autocast_dtype=autocast_dtype)
        with torch.autocast("cpu", enabled=False):
            check = check_common if dtype == FP32 else check_base_called
            (check if adapter_dtype == FP32 else check_uncommon)(layer)


def test_the_environment_is_read_at_each_call(monkeypatch):
    layer = layer_of()
    check_common(layer)
    monkeypatch.setenv("MICA_NATIVE", "0")
    check_uncommon(layer)
    monkeypatch.setenv("MICA_BACKEND", "reference")
    check_uncommon(layer)
    monkeypatch.delenv("MICA_NATIVE")
    assert call_cpp(layer, X).shape == (2, 3, 20)  # computed


def test_dropout():
    layer = layer_of(lora_dropout=0.25)
    dropout = layer.lora_dropout["default"]
    check_common(layer, dropout_p=0.25)
    dropout.eval()
    check_common(layer)
    dropout.train()
    for p in (1.0, 1, 0, -0.5, float("nan"), torch.tensor(0.5)):
        dropout.p = p
        check_uncommon(layer)


@pytest.mark.parametrize("names", ["default", ["default"], ["default", "second"], ["second", "default"], []])
def test_active_adapters(names):
    layer = layer_of()
    add(layer, "second")
    layer._active_adapter = names
    if not names:
        check_uncommon(layer)
        return
    weight, lora_A, *_, before = call_cpp(layer, X)
    last = names if type(names) is str else names[-1]
    assert lora_A is layer.lora_A[last].weight
    assert (weight is None) == (before is not None) == (len(names) == 2)


# -- who else would have to see the call ---------------------------------------------------------------


@pytest.mark.parametrize("around", [Seen, SeenFunctions, forward_ad.dual_level])
def test_modes(around):
    layer = layer_of()
    with around():
        check_uncommon(layer)
    check_common(layer)


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.vmap,
        lambda function: torch.func.grad(lambda x: function(x).sum()),
        lambda function: torch.jit.trace(function, X, check_trace=False),
    ],
    ids=["vmap", "grad", "trace"],
)
def test_transforms(transform):
    layer, found = layer_of(), []

    def function(x):
        found.append(call_cpp(layer, x))
        return x * 2

    transformed = transform(function)
    if not found:
        transformed(X)
    assert found
    assert not any(found)
    check_common(layer)


@pytest.mark.parametrize(
    "register",
    [
        nn_module.register_module_forward_hook,
        nn_module.register_module_forward_pre_hook,
        nn_module.register_module_full_backward_hook,
        nn_module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_on_all_modules(register):
    layer = layer_of()
    handle = register(lambda *_: None)
    check_uncommon(layer)
    handle.remove()
    check_common(layer)


@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_another_dropout_for_all(monkeypatch, name):
    layer, plain = layer_of(lora_dropout=0.25), layer_of()
    monkeypatch.setattr(nn.Dropout, name, lambda self, x: x, raising=False)
    check_uncommon(layer)
    check_common(plain)  # an nn.Identity


# -- tensors -------------------------------------------------------------------------------------------


OTHER_INPUTS = INPUTS | {
    "without dimensions": lambda x: x.flatten()[0],
    "meta": lambda x: x.to("meta"),
    "in fp64": torch.Tensor.double,
    "integers": torch.Tensor.long,
    "complex": lambda x: x.to(torch.complex64),
}


@pytest.mark.parametrize("kind", OTHER_INPUTS)
@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR)")
def test_other_inputs(kind):
    check_uncommon(layer_of(), OTHER_INPUTS[kind](X[0]))
    check_base_called(layer_of(), X.bfloat16())


@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (2, 1, 3), (0,)], ids=str)
def test_any_rows(rows):
    layer = layer_of()
    check_common(layer, torch.randn(*rows, 12))
    check_common(layer, torch.randn(*rows, 24)[..., ::2])
    with torch.inference_mode():
        check_common(layer, torch.randn(*rows, 12))


PARTS = ["base_layer", "lora_A.default", "lora_B.default"]
OTHERS = "of a subclass", "sparse", "meta"
DTYPES = {"in bf16": torch.Tensor.bfloat16, "in fp64": torch.Tensor.double}


def without_weight(part):
    """As where a parametrization or FSDP holds it."""

    def change(layer):
        module = layer.get_submodule(part)
        weight = module.weight
        del module.weight
        return lambda: module.register_parameter("weight", weight)

    return change


ON_PARTS = {
    **{f"{part} {what}": replaced(part, OTHER_INPUTS[what]) for part in WEIGHTS for what in OTHERS},
    **{f"{part} {what}": replaced(part, make) for part in WEIGHTS[1:] for what, make in DTYPES.items()},
    **{f"{part} without its weight": without_weight(part) for part in PARTS},
}


@pytest.mark.parametrize("name", ON_PARTS)
def test_a_part_that_is_no_plain_one(name):
    layer = layer_of()
    undo = ON_PARTS[name](layer)
    (check_base_called if name.startswith("base_layer") else check_uncommon)(layer)
    undo()
    check_common(layer)


def test_lora_a_of_inference_mode():
    layer = layer_of()
    with torch.inference_mode():
        layer.lora_A["default"].weight = nn.Parameter(torch.randn(4, 12))
    check_uncommon(layer)


def test_the_route_of_x(monkeypatch):
    """From the call of a layer to its output: PyTorch's two functions, the patched forward, and C++."""
    monkeypatch.delenv("MICA_BACKEND")
    layer, x = layer_of(), X.clone().requires_grad_()
    layer(x)
    route = []

    def note(frame, event, _):
        if event == "call":
            route.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name))

    sys.setprofile(note)
    layer(x)
    sys.setprofile(None)
    assert route == [
        ("module.py", "_wrapped_call_impl"),
        ("module.py", "_call_impl"),
        ("decide.py", "forward"),
        ("__init__.py", "is_dynamo_compiling"),
        ("fast.py", "call_cpp"),
    ]


# -- what a layer need not keep ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "more", "is_asked"),
    [(X.clone().requires_grad_() * 2, 0, True), (X.clone().requires_grad_() * 2, 1, False), (X, 0, False)],
    ids=["large", "small", "an input"],
)
def test_python_is_asked_how_a_large_x_was_made(x, more, is_asked, monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", "reference")
    monkeypatch.setattr(recompute, "MIN_NUMBERS", x.numel() + more)
    asked = []
    monkeypatch.setattr(recompute, "claim", asked.append)
    call_cpp(layer_of(), x)
    assert len(asked) == is_asked


def test_python_is_called_where_autocast_casts_an_x_that_can_be_computed_again(monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", "reference")
    has_instructions(True, monkeypatch)
    for dtype, expected in ((FP32, tuple), (BF16, torch.Tensor)):
        x = functional.silu(X.to(dtype).requires_grad_())
        with torch.autocast("cpu", BF16):
            assert type(call_cpp(layer_of(dtype), x)) is expected
