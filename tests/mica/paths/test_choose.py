import pytest
import torch

from mica.kernels import common, limits, runtime
from mica.paths import choose, tuning
from mica.paths.operands import Operands
from mica.paths.tuning import Kind, Layer, Part
from tests.support.processor import has_instructions

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


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
    monkeypatch.setattr(tuning, "device_name", lambda device: "a card")
    return monkeypatch


def decided(device, rank, *dtypes, function="linear"):
    """The form without a look at rows."""
    return choose.choice_of(function, device, rank, dtypes).form


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
    assert choose.why_not_kernels(*operands, function="linear") == reason
    device, rank, *dtypes = operands
    unseen = None if reason is None else lambda: pytest.fail("rows do not matter")
    choice = choose.choice_of("linear", device, rank, tuple(dtypes), unseen)
    assert choice.reason == reason
    if reason is None:
        assert choice.form == choose.KERNELS
    elif setting == "triton":
        assert choice.form == choose.ERROR
        message = f"MICA_BACKEND=triton demands Triton kernels, but there are none here: {reason}."
        assert str(choose.demand_error(choice)) == message
    else:
        assert choice.form == choose.REFERENCE


MASTERS = (BF16, BF16, torch.float32, torch.float32)
KIND = Kind(False, MASTERS, 16, 32, 48, 64, has_dropout=False, is_aligned=True)


def chosen(function, kind):
    return choose.choice_of(function, GPU, 16, MASTERS, lambda: kind)


TIMES = {"C++": 90.0, "reference": 120.0, "split": 60.0, "fused": 180.0}
KNOWN = Layer(Part("split", TIMES), Part("reference", TIMES))
FAST = "measured here: split, 1.50 times as fast as the reference path"
SLOW = "measured here: reference, 0.67 times as fast as kernels"
NOT_NOW = "nothing is measured in a deterministic run"


@pytest.mark.parametrize(
    ("function", "layer", "changes", "form", "reason", "note"),
    [
        ("linear", KNOWN, {}, "split", None, FAST),
        ("linear_backward", KNOWN, {}, "reference", SLOW, None),
        ("linear", Layer(Part("fused"), Part("split")), {}, "fused", None, "not measured"),
        ("linear", tuning.UNMEASURED, {}, "reference", "not measured", None),
        *(
            ("linear", KNOWN, changes, "reference", f"not measured: {NOT_NOW}", None)
            for changes in ({"tokens": 32}, {"has_dropout": True}, {"is_aligned": False})
        ),
        ("linear", KNOWN, {"trains_B": True}, "reference", f"not measured: {NOT_NOW}", None),
    ],
)
def test_what_is_known_of_a_layer_decides(a_gpu, function, layer, changes, form, reason, note):
    a_gpu.setenv("MICA_TUNE", "1")
    a_gpu.setattr(tuning, "_read", lambda path: {})
    tuning.table(GPU).settled[KIND] = layer
    kind = KIND._replace(**changes)
    choice = chosen(function, kind)
    said = [None if words is None else str(words) for words in (choice.reason, choice.measured)]
    assert (choice.form, *said) == (form, reason, note)
    assert choice.unsettled == (kind if reason and NOT_NOW in reason else None)
    a_gpu.setenv("MICA_BACKEND", "triton")  # demanded kernels run, and nothing is measured
    demanded = chosen(function, kind)
    assert (demanded.form, demanded.unsettled) == ("split" if form == "reference" else form, None)


def test_what_a_file_says_is_settled_by_a_call_unless_kernels_are_demanded(a_gpu):
    a_gpu.setenv("MICA_TUNE", "1")
    lora = KIND._replace(trains_B=True)
    a_gpu.setattr(tuning, "_read", lambda path: {str(lora): KNOWN._replace(is_settled=False)})
    for function, form in (("lora_linear", "split"), ("lora_linear_backward", "reference")):
        assert chosen(function, lora)[::3] == (form, lora)
    a_gpu.setenv("MICA_BACKEND", "triton")
    assert chosen("lora_linear", lora)[::3] == ("split", None)


def test_a_gradient_of_b_runs_as_its_layer_s_backward(a_gpu):
    """It is told neither of x nor of dropout."""
    a_gpu.setenv("MICA_TUNE", "1")
    a_gpu.setattr(tuning, "_read", lambda path: {})
    lora = KIND._replace(trains_B=True, has_dropout=True)
    of_b = lora._replace(has_dropout=False)
    tuning.table(GPU).settled[lora] = Layer(Part("fused"), Part("split"))
    assert chosen("grad_b", of_b).form == "split"
    tuning.table(GPU).settled[of_b] = Layer(Part("fused"), Part("mixed"))
    assert chosen("grad_b", of_b).form == "mixed"


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
    monkeypatch.setattr(choose.native, "needs_compiler", lambda: False)
    monkeypatch.setattr(choose.native, "why_not", lambda: None)
    has_instructions(False, monkeypatch)
    reason = None if named is None else f"this processor has no instructions for {named}"
    assert choose.why_not_cpp(CPU, dtypes) == reason
    assert choose.why_not_cpp(GPU, dtypes) is None
    monkeypatch.setattr(choose.native, "why_not", lambda: "no compiler")
    assert choose.why_not_cpp(GPU, dtypes) == "no compiler"
    monkeypatch.setattr(choose.native, "needs_compiler", lambda: True)
    assert choose.why_not_cpp(GPU, dtypes) is None  # nothing is compiled to say so


def test_the_devices_of_which_cpp_computes_all_layers(a_gpu):
    """The CPU, and those without kernels once they have been decided about."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    decided(first, 16, BF16)
    assert choose.devices_without_kernels == {-1}
    a_gpu.setattr(runtime, "why_unavailable", lambda device: "no Triton")
    decided(second, 16, BF16)
    assert choose.devices_without_kernels == {-1, 1}
    choose.clear()
    assert choose.devices_without_kernels == {-1}
    a_gpu.setattr(runtime, "is_settled", lambda device: False)
    decided(second, 16, BF16)
    assert choose.devices_without_kernels == {-1}


# -- other forms -------------------------------------------------------------------------------------


def test_the_kind_of_a_layer_is_that_of_its_operands():
    dtypes = (torch.float32,) * 4
    operands = Operands(None, torch.zeros(4, 32), torch.zeros(48, 4), dropout_p=0.5, trains_B=True)
    x, dy = torch.zeros(5, 32), torch.zeros(5, 48)
    kind = Kind(True, dtypes, 4, 32, 48, 8, has_dropout=True, is_aligned=True)
    assert choose.kind_of(operands, dtypes, x) == kind
    assert choose.kind_of(operands, dtypes, dy, x) == choose.kind_of(operands, dtypes, dy) == kind
    plain = operands._replace(dropout_p=0.0, trains_B=False)
    assert choose.kind_of(plain, dtypes, x) == kind._replace(trains_B=False, has_dropout=False)
    shifted = torch.zeros(5 * 32 + 1)[1:].view(5, 32)
    assert choose.kind_of(operands, dtypes, shifted) == kind._replace(is_aligned=False)
    assert not choose.kind_of(operands, dtypes, dy, shifted).is_aligned


def test_a_choice_is_kept_until_the_environment_changes(a_gpu):
    queries = []
    a_gpu.setattr(runtime, "why_unavailable", queries.append)
    asked = []
    for _ in range(3):
        assert decided(GPU, 16, BF16) == choose.KERNELS
        with a_gpu.context() as patch:
            patch.setenv("MICA_BACKEND", "reference")
            assert decided(GPU, 16, BF16) == choose.REFERENCE
        with a_gpu.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert decided(GPU, 16, BF16) == choose.REFERENCE
        asked.append(len(queries))
    assert len({*asked}) == 1


def test_what_a_capture_says_is_not_kept(a_gpu):
    a_gpu.setattr(runtime, "why_unavailable", lambda device: "nothing was tried yet")
    a_gpu.setattr(runtime, "is_settled", lambda device: False)
    assert decided(GPU, 16, BF16) == choose.REFERENCE
    a_gpu.setattr(runtime, "why_unavailable", lambda device: None)
    assert decided(GPU, 16, BF16) == choose.KERNELS


ERROR = common.LaunchError("the kernel grad_a can be launched nowhere: out of resource\nand more")


def test_only_what_cannot_be_launched_is_given_up(a_gpu):
    assert decided(GPU, 16, BF16) == choose.KERNELS
    message = r"kernel for linear at rank 16 .bfloat16. failed on cuda.*launched nowhere: out of resource$"
    with pytest.warns(UserWarning, match=message):
        choose.give_up(GPU, "linear", 16, (BF16,), ERROR)
    choice = choose.choice_of("linear", GPU, 16, (BF16,))
    assert choice.form == choose.REFERENCE
    assert choice.reason.startswith("linear at rank 16 (bfloat16) was given up: the kernel")
    for device, rank, dtypes, function in (
        (GPU, 16, (BF16,), "linear_backward"),
        (GPU, 8, (BF16,), "linear"),
        (GPU, 16, (BF16, BF16), "linear"),
        (torch.device("cuda", 1), 16, (BF16,), "linear"),
    ):
        assert decided(device, rank, *dtypes, function=function) == choose.KERNELS
    a_gpu.setenv("MICA_BACKEND", "triton")
    assert choose.choice_of("linear", GPU, 16, (BF16,))[:2] == (choose.ERROR, choice.reason)
    choose.clear()
    assert decided(GPU, 16, BF16) == choose.KERNELS
