"""The operators on Triton kernels (interpreted here): the same numbers, compiled graphs and refusals."""

import inspect

import pytest
import torch
import torch.nn.functional as F
import triton
from torch.library import opcheck

from mica import ops
from mica.kernels import launching, prepared_b
from mica.ops import mica_down_projection, mica_linear, mica_up_projection
from mica.paths import choose, torch_path, triton_path
from tests.support.kernel_cases import BF16, DEVICE, FEW_DTYPES, FP16, FP32, LAYER_DTYPES
from tests.support.linear_calls import agree, on_device, run
from tests.support.oracle import problem, solve
from tests.support.tolerances import RELATIVE, error

pytestmark = pytest.mark.usefixtures("on_kernels")

# form -> the kernels of a forward and its backward
OTHERS = ["_down_projection_kernel", "_grad_a_kernel"]
FORMS = {
    "split": [*OTHERS, "_up_projection_kernel"],
    "fused": [*OTHERS, "_fused_linear_kernel"],
    "descriptor": [*OTHERS, "_fused_linear_descriptor_kernel"],
    "aten": [],
}


@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), LAYER_DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [((), 9, 14, 3), ((1,), 1, 1, 1), ((3, 5), 33, 8, 8), ((2, 50), 96, 136, 16), ((70,), 40, 24, 24)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_agrees_with_the_dense_oracle(dtype, adapter_dtype, compute_dtype, sizes, bias):
    p = on_device(problem(*sizes, dtype, adapter_dtype, bias))
    expected = solve(p)
    agree(run(p, compute_dtype), expected, dtype)
    assert ops.call_counts["linear_kernels"] == ops.call_counts["linear_backward_kernels"] == 1


@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), FEW_DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_factors_next_to_a_base_layer(dtype, adapter_dtype, compute_dtype, dropout_p):
    p = on_device(problem((70,), 40, 24, 12, dtype, adapter_dtype))
    options = {"dropout_p": dropout_p, "seed": torch.tensor([-3], device=DEVICE)}

    def by_factors(x, weight, lora_A, lora_B, scaling, bias, **options):
        h = mica_down_projection(x, lora_A, scaling, **options)
        return mica_up_projection(F.linear(x, weight, bias), h, lora_B)

    expected = run(p, compute_dtype, **options)
    for name, value in run(p, compute_dtype, by_factors, **options).items():
        assert error(value, expected[name]) <= 2 * RELATIVE[dtype], name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), FEW_DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_every_form_agrees_with_the_dense_oracle(
    monkeypatch, choose_form, launched, form, dtype, adapter_dtype, compute_dtype, dropout_p
):
    """Contiguous and aligned, so that descriptors apply; with dropout against the reference in fp64."""
    choose_form(form)
    monkeypatch.setenv("MICA_BACKEND", "auto" if form == "aten" else "triton")
    monkeypatch.setattr(choose, "use_kernels", lambda *args, **kwargs: True)
    p = problem((3, 20), 48, 72, 5, dtype, adapter_dtype)
    for name in ("x", "weight", "grad_output"):
        setattr(p, name, getattr(p, name).contiguous())
    p, seed = on_device(p), torch.tensor([77], device=DEVICE)
    expected = dropped_oracle(p, dropout_p, seed)
    for _ in range(2):  # planned, and as planned
        agree(run(p, compute_dtype, dropout_p=dropout_p, seed=seed), expected, dtype)
    assert {name for name, _ in launched} == set(FORMS[form])


@pytest.mark.parametrize(
    ("form", "kernels"),
    [
        ("aten", FORMS["split"]),  # kernels are demanded
        ("descriptor", FORMS["fused"]),  # rows of 34 bytes are not what descriptors take
    ],
)
def test_a_form_that_cannot_be(choose_form, launched, form, kernels):
    choose_form(form)
    p = problem((8,), 17, 24, 2, BF16)
    p.x, p.grad_output = p.x.contiguous(), p.grad_output.contiguous()
    p = on_device(p)
    agree(run(p), solve(p), BF16)
    assert {name for name, _ in launched} == set(kernels)


def test_an_address_that_16_does_not_divide_is_not_fused(choose_form, launched):
    choose_form("fused")
    p = on_device(problem((8,), 16, 24, 2, BF16))
    for name in ("x", "grad_output"):
        aligned = getattr(p, name)
        setattr(p, name, torch.cat((aligned.new_zeros(1), aligned.flatten()))[1:].view(aligned.shape))
    agree(run(p), solve(p), BF16)
    assert {name for name, _ in launched} == set(FORMS["split"])


def test_forward_and_backward_have_a_form_each(choose_form, launched):
    choose_form("fused", "split")
    p = problem((8,), 16, 24, 2, BF16)
    p.x, p.grad_output = p.x.contiguous(), p.grad_output.contiguous()
    run(on_device(p))
    assert {name for name, _ in launched} == {*FORMS["fused"], *FORMS["split"]}


def dropped_oracle(p, dropout_p, seed):
    """y, dx, dA in fp64 by autograd through x ⊙ keep / (1 - p), the mask spelled out."""
    x, lora_A = (t.detach().double().requires_grad_() for t in (p.x, p.lora_A))
    keep = torch_path.dropout_keep(seed, x.shape[:-1].numel(), x.shape[-1], dropout_p).view(x.shape)
    dropped = x * keep / (1 - dropout_p)
    y = x @ p.weight.double().t() + p.scaling * (dropped @ lora_A.t()) @ p.lora_B.double().t()
    y = y + p.bias.double()
    grad_x, grad_A = torch.autograd.grad(y, (x, lora_A), p.grad_output.double())
    return {"y": y.detach(), "grad_x": grad_x, "grad_A": grad_A}


def test_an_edited_or_loaded_basis_is_used():
    """The prepared copy of a B whose rank is padded follows the parameter."""
    p = on_device(problem((6,), 10, 12, 3, FP32))
    run(p)
    with torch.no_grad():
        p.lora_B.mul_(-3.0)
    agree(run(p), solve(p), FP32)


def test_the_basis_is_prepared_once_for_forward_and_backward(monkeypatch):
    made = []
    pad = prepared_b.padded
    monkeypatch.setattr(prepared_b, "padded", lambda *args: made.append(1) or pad(*args))
    p = on_device(problem((6,), 10, 12, 3, BF16, FP32))
    p.lora_B = torch.nn.Parameter(p.lora_B, requires_grad=False)
    for _ in range(3):
        run(p)
    assert len(made) == 1


def test_no_tokens():
    p = on_device(problem((0,), 4, 3, 2, FP32))
    result = run(p)
    assert result["y"].shape == (0, 3)
    assert torch.equal(result["grad_A"].cpu(), torch.zeros(2, 4))


def test_transposed_weight_and_expanded_gradient():
    p = on_device(problem((2, 40), 24, 40, 5, FP32))
    p.weight = p.weight.t().contiguous().t()
    p.grad_output = p.grad_output[:1, :1].expand_as(p.grad_output)  # as y.sum().backward() has it
    agree(run(p), solve(p), FP32)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_a_gradient_needs(needs):
    p = on_device(problem((30,), 8, 6, 2, BF16, FP32))
    x, lora_A = p.x.detach().clone().requires_grad_(needs[0]), p.lora_A.clone().requires_grad_(needs[1])
    mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling).backward(p.grad_output)
    assert (x.grad is not None, lora_A.grad is not None) == needs


def test_reruns_are_bitwise_equal():
    p = on_device(problem((700,), 65, 33, 7, BF16, FP32))
    first, second = run(p), run(p)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_opcheck_linear(dropout_p):
    p = on_device(problem((2, 3), 5, 7, 2, BF16, FP32))
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    arguments = (x, p.weight, lora_A, p.lora_B, p.scaling, p.bias, None, dropout_p, seed)
    opcheck(torch.ops.mica.linear.default, arguments)
    for mask in ([True, True], [True, False], [False, True]):
        backward = (p.grad_output, p.x, p.weight, p.lora_A, p.lora_B, p.scaling, BF16, mask)
        opcheck(torch.ops.mica.linear_backward.default, (*backward, dropout_p, seed))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_compile_fullgraph(backend, dropout_p):
    torch.compiler.reset()
    p = on_device(problem((2, 3), 5, 7, 2, BF16, FP32))
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    compiled = torch.compile(mica_linear, fullgraph=True, backend=backend)
    expected = run(p, dropout_p=dropout_p, seed=seed)
    for name, value in run(p, None, compiled, dropout_p=dropout_p, seed=seed).items():
        assert torch.equal(value, expected[name]), name
    assert ops.call_counts["linear_kernels"] == ops.call_counts["linear_backward_kernels"] == 2


def with_own_seed():
    """A layer that draws its seed by torch's generator, and gives it with y."""
    p = on_device(problem((40,), 24, 16, 3, FP32))

    def layer(x, lora_A):
        seed = torch.randint(2**63 - 1, (1,), device=DEVICE)
        return mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias, dropout_p=0.5, seed=seed), seed

    return p, layer


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(use_reentrant):
    """The recomputed forward draws it again."""
    p, layer = with_own_seed()

    def gradients(function):
        torch.manual_seed(3)
        x, lora_A = p.x.detach().clone().requires_grad_(), p.lora_A.clone().requires_grad_()
        function(x, lora_A)[0].backward(p.grad_output)
        return x.grad, lora_A.grad

    def checkpointed(x, lora_A):
        return torch.utils.checkpoint.checkpoint(layer, x, lora_A, use_reentrant=use_reentrant)

    for plain, again in zip(gradients(layer), gradients(checkpointed), strict=True):
        assert torch.equal(plain, again)


def test_second_derivatives_and_transforms_take_the_plain_formulas():
    p = on_device(problem((3,), 5, 4, 2, FP32))
    lora_A = p.lora_A.detach().clone().requires_grad_()
    y = mica_linear(p.x, p.weight, lora_A, p.lora_B, p.scaling, p.bias)
    (grad,) = torch.autograd.grad(y.square().sum(), lora_A, create_graph=True)
    assert ops.call_counts["linear_backward"] == 1
    assert ops.call_counts["linear_backward_kernels"] == 0
    (second,) = torch.autograd.grad(grad.sum(), lora_A)
    assert second.any()

    def loss(lora_A):
        return (mica_linear(p.x, p.weight, lora_A, p.lora_B, p.scaling) * p.grad_output).sum()

    assert error(torch.func.grad(loss)(p.lora_A), solve(p)["grad_A"]) <= RELATIVE[FP32]
    assert ops.call_counts["linear_kernels"] == 1


@pytest.mark.parametrize("autocast_dtype", [BF16, FP16])
def test_autocast(autocast_dtype):
    p = on_device(problem((16,), 12, 10, 3, FP32))
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    with torch.autocast(DEVICE, autocast_dtype):
        y = mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias)
    y.backward(p.grad_output.to(autocast_dtype))
    expected = solve(p)
    agree({"y": y, "grad_x": x.grad, "grad_A": lora_A.grad}, expected, autocast_dtype)
    assert ops.call_counts["linear_kernels"] == 1


def test_what_kernels_cannot_do_is_refused_where_they_are_demanded():
    p = on_device(problem((3,), 5, 4, 2, torch.float64))
    with pytest.raises(RuntimeError, match=r"MICA_BACKEND=triton demands.*float64"):
        mica_linear(p.x, p.weight, p.lora_A, p.lora_B)


def test_what_kernels_cannot_do_runs_on_the_reference_otherwise(monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", "auto")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = problem((3,), 300, 300, 290, FP32)
    run(p)
    assert ops.call_counts["linear"] == 1
    assert ops.call_counts["linear_kernels"] == 0


OPERATORS = {
    name.removeprefix("mica::") for name in torch._C._dispatch_get_all_op_names() if "mica::" in name
}


def test_each_operator_has_a_function_on_the_reference_and_on_kernels():
    """One to one, and with the same parameters: `mica.ops.operator.run_formula` calls either."""
    names = {name for name in triton_path.__all__ if not name.endswith("Error")}
    assert names == {name for name in OPERATORS if not name.startswith("embedding")}
    for name in names:
        module = torch_path
        expected = inspect.signature(getattr(module, name))
        assert inspect.signature(getattr(triton_path, name)) == expected, name


PARTS = {  # what cannot be launched -> the functions that have it
    "down": {"linear", "linear_backward"},
    "up_projection_": {"linear", "linear_backward"},
    "grad_a": {"linear_backward"},
}


def fails(*args, **kwargs):
    raise triton.runtime.errors.OutOfResources(300_000, 101_376, "shared memory")


@pytest.mark.parametrize("part", PARTS)
def test_a_kernel_that_cannot_be_launched_is_an_error_where_kernels_are_demanded(monkeypatch, part):
    monkeypatch.setattr(getattr(triton_path, part), "planned", fails)
    with pytest.raises(triton.runtime.errors.OutOfResources):
        run(on_device(problem((6,), 10, 12, 3, BF16, FP32)))


@pytest.mark.parametrize("part", PARTS)
def test_a_kernel_that_cannot_be_launched_gives_way_to_the_reference(monkeypatch, part):
    """For example too much shared memory: raised before anything ran, so the operands are unchanged.

    What has other kernels, another rank or other dtypes goes on with kernels.
    """
    p = on_device(problem((6,), 10, 12, 3, BF16, FP32))
    monkeypatch.setenv("MICA_BACKEND", "reference")
    expected = run(p)
    monkeypatch.setenv("MICA_BACKEND", "auto")
    monkeypatch.setattr(choose.runtime, "is_interpreting", lambda: False)
    monkeypatch.setattr(choose.runtime, "why_unavailable", lambda device: None)
    choose.clear()
    launching.clear()
    with monkeypatch.context() as patch:
        patch.setattr(getattr(triton_path, part), "planned", fails)
        with pytest.warns(UserWarning, match="from here on: out of resource") as warned:
            result = run(p)
    for name, value in result.items():
        assert error(value, expected[name].double()) <= RELATIVE[BF16], name
    assert len(warned) == len(PARTS[part])
    ops.call_counts.clear()
    run(p)
    kernels = {f"{name}_kernels" for name in {"linear", "linear_backward"} - PARTS[part]}
    assert {name for name in ops.call_counts if name.endswith("_kernels")} == kernels
    assert "out of resource" in choose.why_not_kernels(p.x.device, 3, BF16)
    for other in (problem((6,), 10, 12, 4, BF16), problem((6,), 10, 12, 3, FP32)):
        ops.call_counts.clear()
        run(on_device(other))
        assert ops.call_counts["linear_kernels"] == ops.call_counts["linear_backward_kernels"] == 1


def test_a_compiled_layer_draws_its_own_seed():
    torch.compiler.reset()
    p, layer = with_own_seed()
    x, lora_A = p.x.detach().clone().requires_grad_(), p.lora_A.clone().requires_grad_()
    y, seed = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, lora_A)
    y.backward(p.grad_output)
    expected = dropped_oracle(p, 0.5, seed)
    agree({"y": y, "grad_x": x.grad, "grad_A": lora_A.grad}, expected, FP32)
