import sys

import pytest
import torch

from mica.kernels import common, configs, limits, runtime
from mica.paths import choose
from tests.support.processor import has_instructions

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16
ROWS = choose.Rows(64, 32, 48, (32, 48), has_dropout=False, is_aligned=True)


@pytest.fixture(autouse=True)
def nothing_decided():
    choose.clear()
    yield
    choose.clear()


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        runtime, "why_unavailable", lambda device: None if device.type == "cuda" else "no GPU"
    )
    monkeypatch.setattr(runtime, "is_settled", lambda device: True)
    monkeypatch.setattr(choose, "device_name", lambda device: "a card")
    return monkeypatch


def measured(patch, forward="split", backward="split"):
    """As if these forms had been measured to be the fastest of every device."""
    row = configs.Forms(0, 256, forward, backward)
    patch.setattr(choose, "_forms_of", lambda device, tokens, rank: row)


def decided(device, rank, *dtypes, function="linear"):
    """The form without a look at rows."""
    return choose.decide(function, device, rank, dtypes).form


@pytest.mark.parametrize(
    ("setting", "operands", "reason"),
    [
        ("auto", (CPU, 16, BF16), "no GPU"),
        ("auto", (GPU, limits.MAX_RANK, BF16), None),
        ("auto", (GPU, limits.MAX_RANK + 1, BF16), "no Triton kernels for ranks above 256"),
        ("auto", (GPU, 16, torch.float64), "no Triton kernels for float64"),
        ("auto", (GPU, 16, BF16, torch.float64), "no Triton kernels for float64"),
        ("", (CPU, 16, BF16), "no GPU"),
        ("reference", (GPU, 16, BF16), "MICA_BACKEND=reference"),
        ("triton", (GPU, 16, BF16), None),
        ("triton", (CPU, 16, BF16), "no GPU"),
    ],
)
def test_the_device_its_operands_and_the_setting_decide(a_gpu, setting, operands, reason):
    """Each choice is one of its operands, whatever has been decided for others."""
    a_gpu.setenv("MICA_BACKEND", setting)
    assert choose.requested() == (setting or "auto")
    assert decided(GPU, 16, BF16) == (choose.REFERENCE if setting == "reference" else choose.KERNELS)
    assert choose.why_not_kernels(*operands) == reason
    device, rank, *dtypes = operands
    unseen = None if reason is None else lambda: pytest.fail("rows do not matter")
    choice = choose.decide("linear", device, rank, tuple(dtypes), unseen)
    assert choice.reason == reason
    if reason is None:
        assert choice.form == choose.KERNELS
    elif setting == "triton":
        assert choice.form == choose.ERROR
        message = f"MICA_BACKEND=triton demands Triton kernels, but there are none here: {reason}."
        assert str(choose.demand_error(choice)) == message
    else:
        assert choice.form == choose.REFERENCE


ONE_DTYPE, MASTERS = (BF16,) * 4, (BF16, BF16, torch.float32, torch.float32)
NARROW = "kernels need in_features and out_features divisible by 16"
FEW = "8 tokens are too few: the device would wait for the host"


@pytest.mark.parametrize(
    ("forms", "dtypes", "changes", "expected"),
    [
        (("split", "fused"), MASTERS, {}, ("split", None)),
        (("fused", "split"), MASTERS, {}, ("fused", None)),
        (("fused", "split"), MASTERS, {"is_aligned": False}, ("split", None)),
        (("first", "split"), MASTERS, {}, ("first", None)),
        (("first", "split"), MASTERS, {"has_dropout": True}, ("split", None)),
        (("first", "split"), (torch.float32,) * 4, {}, ("split", None)),
        (("mixed", "split"), MASTERS, {}, ("mixed", None)),
        (("mixed", "split"), MASTERS, {"has_dropout": True}, ("split", None)),
        (("mixed", "split"), MASTERS, {"rank": 24}, ("split", None)),  # which is padded
        (("mixed", "split"), (torch.float32,) * 4, {}, ("split", None)),
        (("mixed", "split"), (BF16, *(torch.float32,) * 3), {}, ("split", None)),
        (("mixed", "split"), (torch.float16, BF16, torch.float32, torch.float32), {}, ("split", None)),
        (("reference", "split"), MASTERS, {}, ("reference", "measured: the reference path is faster here")),
        (("split", "split"), MASTERS, {"in_features": 24, "strides": (24, 48)}, ("reference", NARROW)),
        (
            ("split", "split"),
            MASTERS,
            {"strides": (40, 48)},
            ("reference", "kernels need rows whose strides are divisible by 16, not 40 and 48"),
        ),
        (("split", "split"), ONE_DTYPE, {"tokens": 8}, ("reference", FEW)),
        (("split", "split"), ONE_DTYPE, {"tokens": 9}, ("split", None)),
        (("split", "split"), ONE_DTYPE, {"tokens": None}, ("split", None)),
        (("split", "split"), ONE_DTYPE, {"tokens": 8, "has_dropout": True}, ("split", None)),
        (("split", "split"), MASTERS, {"tokens": 8}, ("reference", FEW)),
    ],
)
def test_the_form_of_a_layer_and_why_it_is_not_on_kernels(a_gpu, forms, dtypes, changes, expected):
    measured(a_gpu, *forms)
    a_gpu.setattr(configs, "HOST_BOUND", 8 * 32 * 48)
    changes = {"rank": 16, **changes}
    rank = changes.pop("rank")
    rows = ROWS._replace(**changes)
    assert choose.decide("linear", GPU, rank, dtypes, lambda: rows)[:2] == expected
    if None not in expected:
        a_gpu.setenv("MICA_BACKEND", "triton")  # demanded kernels run
        assert choose.decide("linear", GPU, rank, dtypes, lambda: rows)[:2] == ("split", None)


def test_a_measured_bound_of_the_host_counts_for_its_device(a_gpu):
    measured(a_gpu)
    rows = ROWS._replace(tokens=8)

    def form():
        return choose.decide("linear", GPU, 16, ONE_DTYPE, lambda: rows).form

    assert form() == "reference"  # by the guess
    a_gpu.setitem(configs.HOST_BOUNDS, "a card", 8 * 32 * 48 - 1)
    assert form() == "split"
    a_gpu.setitem(configs.HOST_BOUNDS, "a card", 8 * 32 * 48)
    assert form() == "reference"
    a_gpu.setattr(choose, "device_name", lambda device: "another")
    a_gpu.setattr(configs, "HOST_BOUND", 0)
    assert form() == "split"


# -- C++ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtypes", "named"),
    [
        ((BF16, BF16), "bfloat16"),
        ((BF16, torch.float32), "bfloat16"),
        ((torch.float32, torch.float16), "float16"),
        ((torch.float32, torch.float32), None),
    ],
)
def test_products_without_instructions_are_python_s(monkeypatch, dtypes, named):
    monkeypatch.setattr(choose.native, "why_not", lambda: None)
    has_instructions(False, monkeypatch)
    reason = None if named is None else f"this processor has no instructions for {named}"
    assert choose.why_not_cpp(CPU, dtypes) == reason
    assert choose.why_not_cpp(GPU, dtypes) is None
    monkeypatch.setattr(choose.native, "why_not", lambda: "no compiler")
    assert choose.why_not_cpp(GPU, dtypes) == "no compiler"


def test_the_bounds_that_cpp_reads(a_gpu):
    """That of a device is there once it has been decided about, and follows what runs on it."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert choose.host_bounds == {-1: sys.maxsize}
    a_gpu.setattr(configs, "HOST_BOUND", 1000)
    decided(first, 16, BF16)
    assert choose.host_bounds == {-1: sys.maxsize, 0: 1000}
    a_gpu.setattr(runtime, "why_unavailable", lambda device: "no Triton")
    decided(second, 16, BF16)
    assert choose.host_bounds[1] == sys.maxsize
    choose.clear()
    assert choose.host_bounds == {-1: sys.maxsize}
    a_gpu.setattr(runtime, "is_settled", lambda device: False)
    decided(second, 16, BF16)
    assert choose.host_bounds == {-1: sys.maxsize}


# -- other forms -------------------------------------------------------------------------------------


def test_the_two_parts_of_a_layer_have_forms_of_their_own(a_gpu):
    measured(a_gpu, "fused", "mixed")
    a_gpu.setattr(configs, "HOST_BOUND", 0)
    functions = {"linear": "fused", "linear_backward": "mixed", "grad_b": "mixed"}
    functions |= {f"{choose.LORA}{name}": functions[name] for name in ("linear", "linear_backward")}
    for function, form in functions.items():
        assert choose.decide(function, GPU, 16, MASTERS, lambda: ROWS).form == form


def test_rows_are_those_of_the_operands():
    x = torch.zeros(5, 40)[:, :32]
    assert choose.forward_rows(x, 48, 0.0) == (5, 32, 48, (40, 48), False, True)
    shifted = torch.zeros(5 * 32 + 1)[1:].view(5, 32)
    assert choose.forward_rows(shifted, 48, 0.5) == (5, 32, 48, (32, 48), True, False)
    dy = torch.zeros(5, 64)[:, :48]
    assert choose.backward_rows(dy, x, 32, 0.0) == (5, 32, 48, (64, 40, 32), False, True)
    assert choose.backward_rows(dy, None, 32, 0.1) == (5, 32, 48, (64, 32, 32), True, True)


def test_a_choice_is_kept_until_the_environment_changes(a_gpu):
    queries = []
    a_gpu.setattr(runtime, "why_unavailable", queries.append)
    assert decided(GPU, 16, BF16) == choose.KERNELS
    asked = len(queries)
    for _ in range(3):
        assert decided(GPU, 16, BF16) == choose.KERNELS
    a_gpu.setenv("MICA_BACKEND", "reference")
    assert decided(GPU, 16, BF16) == choose.REFERENCE
    a_gpu.delenv("MICA_BACKEND")
    a_gpu.setenv("TRITON_INTERPRET", "1")
    assert decided(GPU, 16, BF16) == choose.REFERENCE
    a_gpu.delenv("TRITON_INTERPRET")
    assert decided(GPU, 16, BF16) == choose.KERNELS
    assert len(queries) == asked


def test_what_a_capture_says_is_not_kept(a_gpu):
    a_gpu.setattr(runtime, "why_unavailable", lambda device: "nothing was tried yet")
    a_gpu.setattr(runtime, "is_settled", lambda device: False)
    assert decided(GPU, 16, BF16) == choose.REFERENCE
    a_gpu.setattr(runtime, "why_unavailable", lambda device: None)
    assert decided(GPU, 16, BF16) == choose.KERNELS


ERROR = common.LaunchError("the kernel grad_a can be launched nowhere: out of resource\nand more")


def test_only_what_cannot_be_launched_is_given_up(a_gpu):
    assert decided(GPU, 16, BF16) == choose.KERNELS
    with pytest.warns(UserWarning, match="linear at rank 16 .bfloat16. on the reference path on cuda"):
        choose.give_up(GPU, "linear", 16, (BF16,), ERROR)
    assert decided(GPU, 16, BF16) == choose.REFERENCE
    for device, rank, dtypes, function in (
        (GPU, 16, (BF16,), "linear_backward"),
        (GPU, 8, (BF16,), "linear"),
        (GPU, 16, (BF16, BF16), "linear"),
        (torch.device("cuda", 1), 16, (BF16,), "linear"),
    ):
        assert decided(device, rank, *dtypes, function=function) == choose.KERNELS


def test_what_was_given_up_is_told(a_gpu):
    dtypes = (BF16, BF16, torch.float32)
    with pytest.warns(UserWarning, match="grad_a can be launched nowhere: out of resource$"):
        choose.give_up(GPU, "linear_backward", 16, dtypes, ERROR)
    choice = choose.decide("linear_backward", GPU, 16, dtypes)
    assert choice.form == choose.REFERENCE
    assert choice.reason.startswith(
        "linear_backward at rank 16 (bfloat16, bfloat16, float32) was given up: the kernel"
    )
    assert choose.why_not_kernels(GPU, 16, *dtypes, function="linear") is None
    a_gpu.setenv("MICA_BACKEND", "triton")
    assert choose.decide("linear_backward", GPU, 16, dtypes)[:2] == (choose.ERROR, choice.reason)
    choose.clear()
    assert choose.decide("linear_backward", GPU, 16, dtypes).form == choose.KERNELS
