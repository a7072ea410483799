from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

from mica import ops
from mica.ops import mica_linear
from tests.support.linear_calls import run
from tests.support.oracle import DTYPES, problem, solve
from tests.support.tolerances import RELATIVE, error

FP32 = (torch.float32, torch.float32, None)
FP32_MASTER = (torch.bfloat16, torch.float32, None)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("tokens", [(), (1,), (3, 5), (2, 1, 7)])
@pytest.mark.parametrize(("in_features", "out_features", "rank"), [(1, 1, 1), (9, 14, 3), (33, 8, 8)])
def test_linear_agrees_with_the_dense_oracle(
    dtype, adapter_dtype, compute_dtype, tokens, in_features, out_features, rank
):
    p = problem(tokens, in_features, out_features, rank, dtype, adapter_dtype)
    expected, actual = solve(p), run(p, compute_dtype)
    for name, value in actual.items():
        assert error(value, expected[name]) <= RELATIVE[dtype], name
    assert actual["y"].dtype == actual["grad_x"].dtype == dtype
    assert actual["grad_A"].dtype == adapter_dtype


def test_no_tokens():
    p = problem((0,), 4, 3, 2, torch.float32)
    result = run(p)
    assert result["y"].shape == (0, 3)
    assert torch.equal(result["grad_A"], torch.zeros(2, 4))


def test_transposed_weight_and_permuted_input():
    p = problem((5, 6), 7, 4, 2, torch.float32)
    plain = run(p)
    p.weight = p.weight.t().contiguous().t()
    p.x = p.x.transpose(0, 1).contiguous().transpose(0, 1)
    p.grad_output = p.grad_output.transpose(0, 1).contiguous().transpose(0, 1)
    for name, value in run(p).items():
        assert error(value, plain[name]) <= RELATIVE[torch.float32], name


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False), (False, False)])
def test_computes_and_saves_only_what_a_gradient_needs(needs):
    p = problem((3, 4), 8, 6, 2, *FP32_MASTER[:2])
    x, lora_A = p.x.detach().clone().requires_grad_(needs[0]), p.lora_A.clone().requires_grad_(needs[1])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias)
    if not any(needs):
        assert not y.requires_grad
        assert not saved
        return
    pointers = [t.data_ptr() for t in saved if t is not None]
    assert (x.data_ptr() in pointers) == needs[1]  # x as it came, or not at all
    assert (p.weight.data_ptr() in pointers) == needs[0]
    operands = {t.data_ptr() for t in (x, p.weight, lora_A, p.lora_B)}
    assert set(pointers) <= operands  # no cast, no h
    y.backward(p.grad_output)
    assert (x.grad is not None, lora_A.grad is not None) == needs


def test_gradient_of_a_master_is_not_rounded_to_16_bit():
    p = problem((64,), 32, 24, 4, *FP32_MASTER[:2])
    grad = run(p)["grad_A"]
    assert (grad != grad.bfloat16().float()).float().mean() > 0.9


def test_dropout_derivatives():
    p, seed = problem((6,), 5, 4, 2, torch.float64), torch.tensor([9])
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()

    def function(x, lora_A):
        return mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias, dropout_p=0.5, seed=seed)

    assert torch.autograd.gradcheck(function, (x, lora_A))
    assert torch.autograd.gradgradcheck(function, (x, lora_A))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(x, lora_A)
    operands = {t.data_ptr() for t in (x, p.weight, lora_A, p.lora_B, seed)}
    assert {t.data_ptr() for t in saved} == operands  # the seed, and no mask


@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_linear(dtype, adapter_dtype, compute_dtype, bias):
    p = problem((2, 3), 5, 7, 2, dtype, adapter_dtype, bias)
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    opcheck(torch.ops.mica.linear.default, (x, p.weight, lora_A, p.lora_B, p.scaling, p.bias, compute_dtype))
    for mask in ([True, True], [True, False], [False, True]):
        arguments = (
            p.grad_output,
            p.x,
            p.weight,
            p.lora_A,
            p.lora_B,
            p.scaling,
            compute_dtype or dtype,
            mask,
        )
        opcheck(torch.ops.mica.linear_backward.default, arguments)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), [FP32, FP32_MASTER])
def test_compile_fullgraph(backend, dtype, adapter_dtype, compute_dtype):
    torch.compiler.reset()
    p = problem((2, 3), 5, 7, 2, dtype, adapter_dtype)
    compiled = torch.compile(mica_linear, fullgraph=True, backend=backend)
    expected = run(p, compute_dtype)
    for name, value in run(p, compute_dtype, compiled).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
def test_first_and_second_derivatives():
    p = problem((2, 3), 5, 4, 2, torch.float64)
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()

    def function(x, lora_A):
        return mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias)

    assert torch.autograd.gradcheck(function, (x, lora_A))
    assert torch.autograd.gradgradcheck(function, (x, lora_A))


def test_function_transforms():
    p = problem((3,), 5, 4, 2, torch.float64)

    def loss(lora_A):
        return (mica_linear(p.x, p.weight, lora_A, p.lora_B, p.scaling, p.bias) * p.grad_output).sum()

    assert error(torch.func.grad(loss)(p.lora_A), solve(p)["grad_A"]) <= RELATIVE[torch.float64]
    batch = torch.stack([p.x, 2 * p.x])
    mapped = torch.func.vmap(lambda x: mica_linear(x, p.weight, p.lora_A, p.lora_B, p.scaling))(batch)
    assert (
        error(mapped, mica_linear(batch, p.weight, p.lora_A, p.lora_B, p.scaling)) <= RELATIVE[torch.float64]
    )


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_batches_of_gradients(monkeypatch, backend):
    """Kernels take no batches of tensors, of vmap's or of the older kind of `is_grads_batched`."""
    monkeypatch.setenv("MICA_BACKEND", backend)
    p = problem((3,), 5, 4, 2, torch.float32)
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    y = mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias)
    vectors = torch.stack([p.grad_output, -2 * p.grad_output])

    def grads(vector, **options):
        return torch.autograd.grad(y, (x, lora_A), vector, retain_graph=True, **options)

    expected = [torch.stack(pair) for pair in zip(*map(grads, vectors), strict=True)]
    for actual in (grads(vectors, is_grads_batched=True), torch.func.vmap(grads)(vectors)):
        for ours, exact in zip(actual, expected, strict=True):
            assert error(ours, exact) <= RELATIVE[torch.float32]


@pytest.mark.parametrize("name", ["x", "lora_A"])
@pytest.mark.parametrize("dropout", [False, True])
def test_forward_mode_with_dual_tensors(name, dropout):
    p = problem((3,), 5, 4, 2, torch.float64)
    seed = torch.tensor([7]) if dropout else None

    def linear(tensor):
        q = replace(p, **{name: tensor})
        options = {"dropout_p": 0.5 * dropout, "seed": seed}
        return mica_linear(q.x, q.weight, q.lora_A, q.lora_B, q.scaling, q.bias, **options)

    primal = getattr(p, name).detach()
    tangent = torch.randn_like(primal)
    _, expected = torch.func.jvp(linear, (primal,), (tangent,))
    with forward_ad.dual_level():
        out, actual = forward_ad.unpack_dual(linear(forward_ad.make_dual(primal, tangent)))
    assert error(actual, expected) <= RELATIVE[torch.float64]
    assert error(out, linear(primal)) <= RELATIVE[torch.float64]


def test_an_edit_of_x_in_place_is_reported():
    p = problem((3,), 5, 4, 2, torch.float32)
    p.lora_A.requires_grad_()
    y = mica_linear(p.x, p.weight, p.lora_A, p.lora_B, p.scaling)
    p.x.mul_(2.0)
    with pytest.raises(RuntimeError, match="a MiCA layer has been modified by an inplace"):
        y.sum().backward()
    y = mica_linear(p.x, p.weight, p.lora_A, p.lora_B, p.scaling).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):  # other errors are autograd's own
        y.backward()


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(autocast_dtype, backward_inside):
    """As PEFT's layer: out in autocast's dtype. The fp32 master's gradient stays unrounded."""
    p = problem((16,), 12, 10, 3, torch.float32)
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    with torch.autocast("cpu", autocast_dtype):
        y = mica_linear(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias)
        if backward_inside:
            y.backward(p.grad_output.to(autocast_dtype))
    if not backward_inside:
        y.backward(p.grad_output.to(autocast_dtype))
    expected = solve(p)
    assert y.dtype == autocast_dtype
    assert x.grad.dtype == lora_A.grad.dtype == torch.float32
    assert (lora_A.grad != lora_A.grad.to(autocast_dtype).float()).any()
    for name, value in {"y": y, "grad_x": x.grad, "grad_A": lora_A.grad}.items():
        assert error(value, expected[name]) <= RELATIVE[autocast_dtype], name


def test_calls_are_counted_when_compiled_too():
    torch.compiler.reset()
    p = problem((3,), 4, 5, 2, torch.float32)
    before = ops.call_counts["linear"]
    compiled = torch.compile(mica_linear, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(p.x, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias)
    assert ops.call_counts["linear"] == before + 3


def test_reruns_are_bitwise_equal():
    p = problem((300,), 65, 33, 7, *FP32_MASTER[:2])
    first, second = run(p), run(p)
    assert all(torch.equal(first[name], second[name]) for name in first)
