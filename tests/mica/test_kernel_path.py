"""The operators on Triton kernels (interpreted here): the same numbers, compiled graphs and refusals."""

import inspect

import pytest
import torch
import torch.nn.functional as F
import triton
from torch.library import opcheck

from mica import backend, kernel_path, kernel_path_experts, ops, reference
from mica.kernels import launching, prepared, tuning
from mica.ops import mica_down_projection, mica_embedding, mica_linear, mica_up_projection
from tests.support.kernel_cases import DEVICE
from tests.support.linear_calls import on_device, run
from tests.support.oracle import problem, solve
from tests.support.thinning import ON_DEVICE
from tests.support.tolerances import RELATIVE, error

DTYPES = [
    (torch.float32, torch.float32, None),
    (torch.bfloat16, torch.float32, None),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.float16, torch.float32, None),
    (torch.bfloat16, torch.float32, torch.float32),
]
# Five to eight variants to compile each; what the others have, a layer's own test and tests/kernels have too
FEW_DTYPES = [DTYPES[1], DTYPES[4]] if ON_DEVICE else DTYPES
FORMS = ["split", "fused", "descriptor", "aten"]


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", "triton")
    backend.forget_verdicts()
    ops.call_counts.clear()
    yield
    backend.forget_verdicts()


@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features", "rank"),
    [((), 9, 14, 3), ((1,), 1, 1, 1), ((3, 5), 33, 8, 8), ((2, 50), 96, 136, 16), ((70,), 40, 24, 24)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_agrees_with_the_dense_oracle(
    dtype, adapter_dtype, compute_dtype, tokens, in_features, out_features, rank, bias
):
    p = on_device(problem(tokens, in_features, out_features, rank, dtype, adapter_dtype, bias))
    expected = solve(p)
    for name, value in run(p, compute_dtype).items():
        assert error(value, expected[name]) <= RELATIVE[dtype], name
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
    monkeypatch, form, dtype, adapter_dtype, compute_dtype, dropout_p
):
    """Contiguous and aligned, so that descriptors apply; with dropout against the reference in fp64."""
    picked = []

    def pick(name, device, key, choices, updates=()):
        picked.append(name)
        return form if form in choices else next(iter(choices))

    monkeypatch.setattr(tuning, "pick", pick)
    monkeypatch.setattr(tuning, "is_idle", lambda: False)
    monkeypatch.setenv("MICA_BACKEND", "auto" if form == "aten" else "triton")
    monkeypatch.setattr(backend, "use_kernels", lambda *args, **kwargs: True)
    p = problem((3, 20), 48, 72, 5, dtype, adapter_dtype)
    for name in ("x", "weight", "grad_output"):
        setattr(p, name, getattr(p, name).contiguous())
    p, seed = on_device(p), torch.tensor([77], device=DEVICE)
    expected = dropped_oracle(p, dropout_p, seed)
    for name, value in run(p, compute_dtype, dropout_p=dropout_p, seed=seed).items():
        assert error(value, expected[name]) <= RELATIVE[dtype], name
    assert picked.count("linear") == picked.count("linear_backward") == 1


def dropped_oracle(p, dropout_p, seed):
    """y, dx, dA in fp64 by autograd through x ⊙ keep / (1 - p), the mask spelled out."""
    x, lora_A = (t.detach().double().requires_grad_() for t in (p.x, p.lora_A))
    keep = reference.dropout_keep(seed, x.shape[:-1].numel(), x.shape[-1], dropout_p).view(x.shape)
    dropped = x * keep / (1 - dropout_p)
    y = x @ p.weight.double().t() + p.scaling * (dropped @ lora_A.t()) @ p.lora_B.double().t()
    y = y + p.bias.double()
    grad_x, grad_A = torch.autograd.grad(y, (x, lora_A), p.grad_output.double())
    return {"y": y.detach(), "grad_x": grad_x, "grad_A": grad_A}


def test_all_forms_are_offered(monkeypatch):
    offered = {}

    def pick(name, device, key, choices, updates=()):
        offered[name] = list(choices)
        return next(iter(choices))

    monkeypatch.setattr(tuning, "pick", pick)
    monkeypatch.setattr(tuning, "is_idle", lambda: False)
    p = on_device(problem((8,), 16, 24, 2, torch.bfloat16))
    for name in ("x", "weight", "grad_output"):
        setattr(p, name, getattr(p, name).contiguous())
    run(p)
    assert offered["linear"][:2] == ["split", "fused"]
    assert "aten" not in offered["linear"]  # triton is forced
    monkeypatch.setenv("MICA_BACKEND", "auto")
    monkeypatch.setattr(backend, "use_kernels", lambda *args, **kwargs: True)
    run(p)
    assert offered["linear"][-1] == offered["linear_backward"][-1] == "aten"
    if DEVICE == "cpu":  # the interpreter stands in for a GPU with the copy engine
        assert offered["linear"][2] == "descriptor"


def test_embedding_and_its_gradient():
    indices = torch.randint(0, 11, (3, 7), device=DEVICE)
    lora_A = torch.randn(3, 11, device=DEVICE, requires_grad=True)
    lora_B, grad_output = torch.randn(20, 3, device=DEVICE), torch.randn(3, 7, 20, device=DEVICE)
    for padding_idx in (None, 4):
        lora_A.grad = None
        out = mica_embedding(indices, lora_A, lora_B, 0.5, padding_idx=padding_idx)
        out.backward(grad_output)
        flat, dy = indices.flatten(), grad_output.flatten(0, 1).double()
        expected = 0.5 * lora_A.double()[:, flat].t() @ lora_B.double().t()
        assert error(out.flatten(0, 1), expected) <= RELATIVE[torch.float32]
        expected_A = torch.zeros(3, 11, dtype=torch.float64, device=DEVICE)
        expected_A.index_add_(1, flat, 0.5 * (dy @ lora_B.double()).t())
        if padding_idx is not None:
            expected_A[:, padding_idx] = 0
        assert error(lora_A.grad, expected_A) <= RELATIVE[torch.float32]
    assert ops.call_counts["embedding_kernels"] == ops.call_counts["embedding_backward_kernels"] == 2


def test_an_edited_or_loaded_basis_is_used():
    """The prepared copy of a B whose rank is padded follows the parameter."""
    p = on_device(problem((6,), 10, 12, 3, torch.float32))
    run(p)
    with torch.no_grad():
        p.lora_B.mul_(-3.0)
    for name, value in run(p).items():
        assert error(value, solve(p)[name]) <= RELATIVE[torch.float32], name


def test_the_basis_is_prepared_once_for_forward_and_backward(monkeypatch):
    made = []
    pad = prepared.padded
    monkeypatch.setattr(prepared, "padded", lambda *args: made.append(1) or pad(*args))
    p = on_device(problem((6,), 10, 12, 3, torch.bfloat16, torch.float32))
    p.lora_B = torch.nn.Parameter(p.lora_B, requires_grad=False)
    for _ in range(3):
        run(p)
    assert len(made) == 1


def test_no_tokens():
    p = on_device(problem((0,), 4, 3, 2, torch.float32))
    result = run(p)
    assert result["y"].shape == (0, 3)
    assert torch.equal(result["grad_A"].cpu(), torch.zeros(2, 4))


def test_transposed_weight_and_expanded_gradient():
    p = on_device(problem((2, 40), 24, 40, 5, torch.float32))
    p.weight = p.weight.t().contiguous().t()
    p.grad_output = p.grad_output[:1, :1].expand_as(p.grad_output)  # as y.sum().backward() has it
    for name, value in run(p).items():
        assert error(value, solve(p)[name]) <= RELATIVE[torch.float32], name


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_a_gradient_needs(needs):
    p = on_device(problem((30,), 8, 6, 2, torch.bfloat16, torch.float32))
    x, lora_A = p.x.detach().clone().requires_grad_(needs[0]), p.lora_A.clone().requires_grad_(needs[1])
    mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling).backward(p.grad_output)
    assert (x.grad is not None, lora_A.grad is not None) == needs


def test_reruns_are_bitwise_equal():
    p = on_device(problem((700,), 65, 33, 7, torch.bfloat16, torch.float32))
    first, second = run(p), run(p)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_opcheck_linear(dropout_p):
    p = on_device(problem((2, 3), 5, 7, 2, torch.bfloat16, torch.float32))
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    arguments = (x, p.weight, lora_A, p.lora_B, p.scaling, p.bias, None, dropout_p, seed)
    opcheck(torch.ops.mica.linear.default, arguments)
    for mask in ([True, True], [True, False], [False, True]):
        backward = (p.grad_output, p.x, p.weight, p.lora_A, p.lora_B, p.scaling, torch.bfloat16, mask)
        opcheck(torch.ops.mica.linear_backward.default, (*backward, dropout_p, seed))


def test_opcheck_embedding():
    indices = torch.randint(0, 11, (3, 4), device=DEVICE)
    lora_A, lora_B = torch.randn(2, 11, device=DEVICE), torch.randn(5, 2, device=DEVICE)
    opcheck(
        torch.ops.mica.embedding.default, (indices, lora_A.clone().requires_grad_(), lora_B, 0.5, 3, None)
    )
    grad_output = torch.randn(3, 4, 5, device=DEVICE)
    opcheck(torch.ops.mica.embedding_backward.default, (grad_output, indices, lora_A, lora_B, 0.5, 3))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_compile_fullgraph(backend, dropout_p):
    torch.compiler.reset()
    p = on_device(problem((2, 3), 5, 7, 2, torch.bfloat16, torch.float32))
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    compiled = torch.compile(mica_linear, fullgraph=True, backend=backend)
    expected = run(p, dropout_p=dropout_p, seed=seed)
    for name, value in run(p, None, compiled, dropout_p=dropout_p, seed=seed).items():
        assert torch.equal(value, expected[name]), name
    assert ops.call_counts["linear_kernels"] == ops.call_counts["linear_backward_kernels"] == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(use_reentrant):
    """The seed is drawn inside, by torch's generator: the recomputed forward draws it again."""
    p = on_device(problem((40,), 24, 16, 3, torch.float32))

    def layer(x, lora_A):
        seed = torch.randint(2**63 - 1, (1,), device=DEVICE)
        return mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias, dropout_p=0.5, seed=seed)

    def gradients(function):
        torch.manual_seed(3)
        x, lora_A = p.x.detach().clone().requires_grad_(), p.lora_A.clone().requires_grad_()
        function(x, lora_A).backward(p.grad_output)
        return x.grad, lora_A.grad

    def checkpointed(x, lora_A):
        return torch.utils.checkpoint.checkpoint(layer, x, lora_A, use_reentrant=use_reentrant)

    for plain, again in zip(gradients(layer), gradients(checkpointed), strict=True):
        assert torch.equal(plain, again)


def test_second_derivatives_and_transforms_take_the_plain_formulas():
    p = on_device(problem((3,), 5, 4, 2, torch.float32))
    lora_A = p.lora_A.detach().clone().requires_grad_()
    y = mica_linear(p.x, p.weight, lora_A, p.lora_B, p.scaling, p.bias)
    (grad,) = torch.autograd.grad(y.square().sum(), lora_A, create_graph=True)
    assert ops.call_counts["linear_backward"] == 1
    assert ops.call_counts["linear_backward_kernels"] == 0
    (second,) = torch.autograd.grad(grad.sum(), lora_A)
    assert second.any()

    def loss(lora_A):
        return (mica_linear(p.x, p.weight, lora_A, p.lora_B, p.scaling) * p.grad_output).sum()

    assert error(torch.func.grad(loss)(p.lora_A), solve(p)["grad_A"]) <= RELATIVE[torch.float32]
    assert ops.call_counts["linear_kernels"] == 1


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast(autocast_dtype):
    p = on_device(problem((16,), 12, 10, 3, torch.float32))
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    with torch.autocast(DEVICE, autocast_dtype):
        y = mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias)
    y.backward(p.grad_output.to(autocast_dtype))
    expected = solve(p)
    for name, value in {"y": y, "grad_x": x.grad, "grad_A": lora_A.grad}.items():
        assert error(value, expected[name]) <= RELATIVE[autocast_dtype], name
    assert ops.call_counts["linear_kernels"] == 1


def test_what_kernels_cannot_do_is_refused_where_they_are_demanded():
    p = on_device(problem((3,), 5, 4, 2, torch.float64))
    with pytest.raises(RuntimeError, match=r"MICA_BACKEND=triton demands.*float64"):
        mica_linear(p.x, p.weight, p.lora_A, p.lora_B)


def test_what_kernels_cannot_do_runs_on_the_reference_otherwise(monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", "auto")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = problem((3,), 300, 300, 290, torch.float32)
    run(p)
    assert ops.call_counts["linear"] == 1
    assert ops.call_counts["linear_kernels"] == 0


OPERATORS = {
    name.removeprefix("mica::") for name in torch._C._dispatch_get_all_op_names() if "mica::" in name
}


def test_each_operator_has_a_function_on_the_reference_and_on_kernels():
    """One to one, and with the same parameters: `mica.ops.dispatch.compute` calls either."""
    both = kernel_path.__all__ + kernel_path_experts.__all__  # those of experts: test_kernel_path_experts
    assert {name for name in both if not name.endswith("Error")} == OPERATORS
    for name in set(kernel_path.__all__) & OPERATORS:
        expected = inspect.signature(getattr(reference, name))
        assert inspect.signature(getattr(kernel_path, name)) == expected, name


PARTS = {  # what cannot be launched -> the functions that have it
    "down_kernel.down_projection": {"linear", "linear_backward"},
    "up_kernel.up_projection_": {"linear", "linear_backward"},
    "grad_a_kernel.grad_a": {"linear_backward"},
}


def fails(*args, **kwargs):
    raise triton.runtime.errors.OutOfResources(300_000, 101_376, "shared memory")


@pytest.mark.parametrize("part", PARTS)
def test_a_kernel_that_cannot_be_launched_is_an_error_where_kernels_are_demanded(monkeypatch, part):
    launching.forget()
    monkeypatch.setattr(f"mica.kernel_path.{part}", fails)
    with pytest.raises(triton.runtime.errors.OutOfResources):
        run(on_device(problem((6,), 10, 12, 3, torch.bfloat16, torch.float32)))


@pytest.mark.parametrize("part", PARTS)
def test_a_kernel_that_cannot_be_launched_gives_way_to_the_reference(monkeypatch, part):
    """For example too much shared memory: raised before anything ran, so the operands are unchanged.

    What has other kernels, another rank or other dtypes goes on with kernels.
    """
    p = on_device(problem((6,), 10, 12, 3, torch.bfloat16, torch.float32))
    monkeypatch.setenv("MICA_BACKEND", "reference")
    expected = run(p)
    monkeypatch.setenv("MICA_BACKEND", "auto")
    monkeypatch.setattr(backend.runtime, "is_interpreting", lambda: False)
    monkeypatch.setattr(backend.runtime, "why_unavailable", lambda device: None)
    backend.forget_verdicts()
    launching.forget()
    with monkeypatch.context() as patch:
        patch.setattr(f"mica.kernel_path.{part}", fails)
        with pytest.warns(UserWarning, match="from here on: out of resource") as warned:
            result = run(p)
    for name, value in result.items():
        assert error(value, expected[name].double()) <= RELATIVE[torch.bfloat16], name
    assert len(warned) == len(PARTS[part])
    ops.call_counts.clear()
    run(p)
    kernels = {f"{name}_kernels" for name in {"linear", "linear_backward"} - PARTS[part]}
    assert {name for name in ops.call_counts if name.endswith("_kernels")} == kernels
    assert "out of resource" in backend.why_not_kernels(p.x.device, 3, torch.bfloat16)
    for other in (problem((6,), 10, 12, 4, torch.bfloat16), problem((6,), 10, 12, 3, torch.float32)):
        ops.call_counts.clear()
        run(on_device(other))
        assert ops.call_counts["linear_kernels"] == ops.call_counts["linear_backward_kernels"] == 1


def test_a_compiled_layer_draws_its_own_seed():
    torch.compiler.reset()
    p = on_device(problem((40,), 24, 16, 3, torch.float32))

    def layer(x, lora_A):
        seed = torch.randint(2**63 - 1, (1,), device=DEVICE)
        return mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias, dropout_p=0.5, seed=seed), seed

    x, lora_A = p.x.detach().clone().requires_grad_(), p.lora_A.clone().requires_grad_()
    y, seed = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, lora_A)
    y.backward(p.grad_output)
    expected = dropped_oracle(p, 0.5, seed)
    for name, value in {"y": y, "grad_x": x.grad, "grad_A": lora_A.grad}.items():
        assert error(value, expected[name]) <= RELATIVE[torch.float32], name
