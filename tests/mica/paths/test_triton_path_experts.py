"""A stack of experts on Triton kernels (interpreted here): the definition's numbers in fp64, and refusals."""

import pytest
import torch

from mica.kernels import launching, prepared_b
from mica.paths import torch_path
from mica.paths import triton_path as path
from tests.support.expert_cases import ROUTES, offsets_of, stack
from tests.support.kernel_cases import BF16, DEVICE, FEW_DTYPES, FP32, LAYER_DTYPES, operand
from tests.support.linear_calls import agree
from tests.support.tolerances import RELATIVE, error

pytestmark = pytest.mark.usefixtures("on_kernels")

SCALING = 0.75


class Stack:
    """Operands as `mica.fast` passes them: B a view of PEFT's (out_features, rank·experts)."""

    def __init__(
        self, name, dtype, lora_dtype=None, in_features=33, out_features=22, rank=5, transposed=False
    ):
        rows, self.ends = ROUTES[name]
        experts, lora_dtype = len(self.ends), lora_dtype or dtype
        self.x, self.grad_output = operand(rows, in_features, dtype), operand(rows, out_features, dtype)
        self.weight = stack(experts, out_features, in_features, dtype, scale=in_features**-0.5)
        if transposed:
            self.weight = self.weight.transpose(1, 2).contiguous().transpose(1, 2)
        self.lora_A = stack(experts, rank, in_features, lora_dtype, scale=in_features**-0.5)
        stored = torch.randn(out_features, rank * experts, device=DEVICE).to(lora_dtype)
        self.stored_B = torch.nn.Parameter(stored, requires_grad=False)
        self.bias = operand(experts, out_features, dtype)
        self.offsets = offsets_of(self.ends, torch.int64)

    def lora_b(self):
        return self.stored_B.view(len(self.stored_B), -1, len(self.ends)).permute(2, 0, 1)

    def run(self, compute_dtype=None, bias=True, module=path, cast=lambda tensor: tensor, scaling=SCALING):
        weight, lora_A, lora_B = (cast(t) for t in (self.weight, self.lora_A, self.lora_b()))
        x, grad_output, own_bias = cast(self.x), cast(self.grad_output), cast(self.bias) if bias else None
        factors = self.offsets, weight, lora_A, lora_B, scaling
        y = module.experts_linear(x, *factors, own_bias, compute_dtype)
        dx, dA = module.experts_linear_backward(grad_output, x, *factors, compute_dtype or x.dtype)
        return {"y": y, "dx": dx, "dA": dA}

    def solved(self, bias=True):
        return self.run(bias=bias, module=torch_path, cast=torch.Tensor.double)


def grouped(monkeypatch, is_grouped: bool) -> list:
    """Where the base product may be PyTorch's grouped one, or may not; the calls of that."""
    calls, own = [], path._grouped_mm
    monkeypatch.setattr(path, "_is_grouped", lambda *arguments: is_grouped)
    monkeypatch.setattr(
        path, "_grouped_mm", lambda *args, **options: calls.append(1) or own(*args, **options)
    )
    return calls


@pytest.mark.parametrize(("dtype", "lora_dtype", "compute_dtype"), LAYER_DTYPES)
@pytest.mark.parametrize("name", ROUTES)
def test_agrees_with_the_definition_in_fp64(dtype, lora_dtype, compute_dtype, name):
    operands = Stack(name, dtype, lora_dtype)
    before = operands.x.clone()
    expected = operands.solved()
    for part, value in operands.run(compute_dtype).items():
        assert error(value, expected[part]) <= RELATIVE[dtype], part
        assert value.dtype == (lora_dtype if part == "dA" else dtype)
        assert value.is_contiguous()
    assert torch.equal(operands.x, before)


@pytest.mark.parametrize(("dtype", "lora_dtype", "compute_dtype"), FEW_DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("is_grouped", [False, True])
def test_both_base_products(monkeypatch, dtype, lora_dtype, compute_dtype, transposed, is_grouped):
    """Aligned operands but for x and dy, whose rows lie apart: those are copied. Rows of no expert are 0."""
    if is_grouped and not path._is_grouped(torch.device(DEVICE), dtype, 3):
        pytest.skip("no grouped product of this dtype here")
    calls = grouped(monkeypatch, is_grouped)
    operands = Stack("rows of none", dtype, lora_dtype, 48, 32, 16, transposed)
    operands.weight = operands.weight.clone()  # out of its guarded buffer, in the same layout
    expected = operands.solved(bias=False)
    for part, value in operands.run(compute_dtype, bias=False).items():
        assert error(value, expected[part]) <= RELATIVE[dtype], part
        assert part == "dA" or not value[operands.ends[-1] :].any()
    assert len(calls) == (2 if is_grouped else 0)


@pytest.mark.parametrize(("in_features", "out_features"), [(48, 36), (36, 48)])
def test_unaligned_sizes_are_not_grouped(monkeypatch, in_features, out_features):
    """`grouped_mm` refuses such strides, or leaves gaps between the rows of its result."""
    calls = grouped(monkeypatch, True)
    operands = Stack("tiles", BF16, None, in_features, out_features)
    operands.weight = operands.weight.clone()
    expected = operands.solved()
    for part, value in operands.run().items():
        assert error(value, expected[part]) <= RELATIVE[BF16], part
    assert not calls


@pytest.mark.parametrize(("in_features", "out_features"), [(48, 32), (32, 48)])
@pytest.mark.parametrize("beyond", [0, 1])
def test_sizes_at_which_the_grouped_product_faults_are_not_grouped(
    monkeypatch, in_features, out_features, beyond
):
    """As many elements of x, or of y, as it takes; and one more."""
    if not path._is_grouped(torch.device(DEVICE), BF16, 3):
        pytest.skip("no grouped product here")
    calls = grouped(monkeypatch, True)
    operands = Stack("tiles", BF16, None, in_features, out_features, 16)
    operands.weight, operands.x = operands.weight.clone(), operands.x.contiguous()
    operands.grad_output = operands.grad_output.contiguous()
    monkeypatch.setattr(path, "_MOST_ELEMENTS", len(operands.x) * 48 - beyond)
    expected = operands.solved()
    for part, value in operands.run().items():
        assert error(value, expected[part]) <= RELATIVE[BF16], part
    assert len(calls) == (0 if beyond else 2)


@pytest.mark.parametrize(
    ("device", "version", "capability", "answers"),
    [
        # bf16, fp32
        ("cpu", "2.13", None, (True, True)),
        ("cpu", "2.9", None, (False, False)),
        ("cuda", "2.13", (7, 5), (False, False)),
        ("cuda", "2.13", (8, 0), (True, False)),
        ("cuda", "2.9", (8, 0), (False, False)),
        ("cuda", "2.9", (9, 0), (True, False)),
        ("meta", "2.13", None, (False, False)),
    ],
)
def test_where_the_grouped_product_is_taken(monkeypatch, device, version, capability, answers):
    monkeypatch.setattr(path, "_before_2_10", version == "2.9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    decide = path._is_grouped.__wrapped__
    dtypes = BF16, FP32
    assert tuple(decide(torch.device(device), dtype, 128) for dtype in dtypes) == answers
    assert not decide(torch.device(device), BF16, 1024)  # its kernel's limit


@pytest.mark.parametrize("missing", ["x", "weight"])
def test_a_gradient_that_nobody_needs(missing):
    operands = Stack("first and last idle", FP32)
    x, weight = (None if missing == name else getattr(operands, name) for name in ("x", "weight"))
    factors = operands.lora_A, operands.lora_b(), SCALING, FP32
    gradients = path.experts_linear_backward(operands.grad_output, x, operands.offsets, weight, *factors)
    expected = operands.solved()
    for part, value in zip(("dx", "dA"), gradients, strict=True):
        if (part == "dA") == (missing == "x"):
            assert value is None
        else:
            assert error(value, expected[part]) <= RELATIVE[FP32]


def test_no_rows():
    operands = Stack("none at all", FP32)
    for name in ("x", "grad_output"):
        setattr(operands, name, getattr(operands, name)[:0].contiguous())
    parts = operands.run()
    assert parts["y"].shape == (0, 22)
    assert parts["dx"].shape == (0, 33)
    assert not parts["dA"].any()


def test_a_gradient_of_stride_0():
    """That of a sum, which autograd expands."""
    operands = Stack("tiles", FP32, None, 32, 16)
    operands.grad_output = torch.ones((), device=DEVICE).expand(len(operands.x), 16)
    expected = operands.solved()
    agree(operands.run(), expected, FP32)


def test_reruns_are_bitwise_equal():
    operands = Stack("tiles", BF16, FP32)
    again = operands.run()
    for part, value in operands.run().items():
        assert torch.equal(value, again[part]), part


def test_lora_b_is_prepared_once_for_all_calls_of_a_layer(monkeypatch):
    """Its view is another tensor each time."""
    prepared_b.clear()
    made, own = [], prepared_b.padded
    monkeypatch.setattr(prepared_b, "padded", lambda *args: made.append(1) or own(*args))
    operands = Stack("tiles", BF16, FP32)
    operands.run()
    with torch.no_grad():
        operands.run()
    with torch.inference_mode():
        operands.run()
    assert made == [1]


@pytest.mark.parametrize("kernel", ["down", "up_projection_"])
def test_a_refused_launch_is_raised_and_changes_nothing(monkeypatch, kernel):
    """`mica.ops` then takes the definition, on the same operands."""
    operands = Stack("tiles", FP32)
    tensors = {
        name: value.clone() for name, value in vars(operands).items() if isinstance(value, torch.Tensor)
    }

    def refuse(*args, **kwargs):
        raise path.LaunchError("no")

    launching.clear()
    monkeypatch.setattr(getattr(path, kernel), "planned", refuse)
    with pytest.raises(path.LaunchError):
        operands.run()
    for name, before in tensors.items():
        assert torch.equal(getattr(operands, name), before), name


@pytest.mark.parametrize("name", ["bias", "offsets", "scaling", "out_features", "lora_A"])
def test_the_plans_of_another_call_are_not_taken(name):
    """What differs in a second call from the first."""
    Stack("tiles", BF16, FP32).run()
    other = Stack("tiles", BF16, FP32, out_features=40 if name == "out_features" else 22)
    if name == "offsets":  # of another type, and with gaps in memory
        other.offsets = torch.stack([other.offsets.int()] * 2, dim=1)[:, 0]
    if name == "lora_A":
        other.lora_A = other.lora_A.bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    options = {"bias": name != "bias", "scaling": 2.0 if name == "scaling" else SCALING}
    expected = other.run(module=torch_path, cast=torch.Tensor.double, **options)
    agree(other.run(**options), expected, BF16)
