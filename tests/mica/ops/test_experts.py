import pytest
import torch
from torch.library import opcheck

from mica import ops
from mica.ops import mica_experts_linear
from mica.ops.experts import experts_base, experts_linear
from mica.ops.routing import route, summed, to_experts
from tests.support.experts_oracle import ROUTES, problem, run, solve
from tests.support.kernel_cases import DEVICE
from tests.support.oracle import DTYPES
from tests.support.tolerances import RELATIVE, error

FP32_MASTER = (torch.bfloat16, torch.float32)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_agrees_with_the_dense_oracle(dtype, adapter_dtype, compute_dtype, route):
    p = problem(route, 9, 14, 3, dtype, adapter_dtype)
    expected, actual = solve(p), run(p, mica_experts_linear, compute_dtype=compute_dtype)
    for name, value in actual.items():
        assert error(value, expected[name]) <= RELATIVE[dtype], name
    assert actual["y"].dtype == actual["grad_x"].dtype == dtype
    assert actual["grad_A"].dtype == adapter_dtype


def test_fp32_products_over_bf16_round_no_gradient_of_a():
    """In the backward too: x and dy are exact in fp32, and g is not rounded. Few rows never round it."""
    p = problem("all to the second", 40, 30, 3, *FP32_MASTER)
    expected, actual = solve(p), run(p, mica_experts_linear, compute_dtype=torch.float32)
    assert error(actual["grad_A"], expected["grad_A"]) <= RELATIVE[torch.float32]


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False), (False, False)])
def test_computes_and_saves_only_what_a_gradient_needs(needs):
    p = problem("idle ones", 8, 6, 2, *FP32_MASTER)
    x, lora_A = p.x.detach().clone().requires_grad_(needs[0]), p.lora_A.clone().requires_grad_(needs[1])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = mica_experts_linear(x, p.offsets, p.weight, lora_A, p.lora_B, p.scaling, p.bias)
    if not any(needs):
        assert not y.requires_grad
        assert not saved
        return
    pointers = {t.data_ptr() for t in saved if t is not None}
    assert (x.data_ptr() in pointers) == needs[1]  # x as it came, or not at all
    assert (p.weight.data_ptr() in pointers) == needs[0]
    assert pointers <= {t.data_ptr() for t in (x, p.offsets, p.weight, lora_A, p.lora_B)}  # no copies
    y.backward(p.grad_output)
    assert (x.grad is not None, lora_A.grad is not None) == needs


def test_gradcheck_and_second_derivatives():
    p = problem("rows of none", 4, 3, 2, torch.float64)

    def function(x, lora_A):
        return mica_experts_linear(x, p.offsets, p.weight, lora_A, p.lora_B, p.scaling, p.bias)

    inputs = p.x.detach().clone().requires_grad_(), p.lora_A.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_operators_pass_opcheck():
    p = problem("idle ones", 5, 4, 2, torch.float32)
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    arguments = (x, p.offsets, p.weight, lora_A, p.lora_B, p.scaling, p.bias, None)
    opcheck(torch.ops.mica.experts_linear.default, arguments)
    operands = (p.grad_output, p.x, p.offsets, p.weight, p.lora_A, p.lora_B, p.scaling, torch.float32)
    for mask in ([True, True], [True, False], [False, True]):
        opcheck(torch.ops.mica.experts_linear_backward.default, (*operands, mask))


@pytest.mark.parametrize("through", ["compiled", "eager"])
def test_calls_are_counted(through):
    torch.compiler.reset()
    p = problem("idle ones", 5, 4, 2, torch.float32)
    function = mica_experts_linear
    if through == "compiled":
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    before = dict(ops.call_counts)
    actual, expected = run(p, function), solve(p)
    for name in ("experts_linear", "experts_linear_backward"):
        assert ops.call_counts[name] == before.get(name, 0) + 1
    assert all(error(actual[name], expected[name]) <= RELATIVE[torch.float32] for name in actual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_products_run_in_the_dtype_of_the_weight(dtype):
    """As transformers' grouped experts do, whose products autocast does not reach."""
    p = problem("idle ones", 8, 6, 2, dtype, torch.float32)
    x = p.x.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mica_experts_linear(x, p.offsets, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias)
        y.backward(p.grad_output.to(y.dtype))
    expected = solve(p)
    assert y.dtype == dtype
    assert x.grad.dtype == torch.float32
    assert error(y, expected["y"]) <= RELATIVE[dtype]
    assert error(x.grad, expected["grad_x"]) <= RELATIVE[dtype]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_in_fp32_is_cast_to_the_input_s_dtype(monkeypatch, backend, dtype):
    """Which `mica.fast` passes under autocast; the public operator refuses it."""
    monkeypatch.setenv("MICA_BACKEND", backend)
    p = problem("rows of none", 16, 24, 3, dtype, torch.float32)
    expected = run(p, unchecked)
    p.weight, p.bias = p.weight.float(), p.bias.float()
    for name, value in run(p, unchecked).items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(TypeError, match="weight"):
        run(p, mica_experts_linear)


def test_function_transforms():
    """Of the rows, of A, and of both: what is mapped may be any of them."""
    p = problem("rows of none", 5, 4, 2, torch.float64)
    xs, lora_As = torch.stack([p.x, 2 * p.x]), torch.stack([p.lora_A, p.lora_A * 3])

    def loss(x, lora_A):
        y = mica_experts_linear(x, p.offsets, p.weight, lora_A, p.lora_B, p.scaling)
        return (y * p.grad_output).sum()

    grad = torch.func.grad(loss, argnums=(0, 1))
    for axes, arguments, pairs in (
        ((0, None), (xs, lora_As[0]), [(xs[0], lora_As[0]), (xs[1], lora_As[0])]),
        ((None, 0), (xs[0], lora_As), [(xs[0], lora_As[0]), (xs[0], lora_As[1])]),
        ((0, 0), (xs, lora_As), zip(xs, lora_As, strict=True)),
    ):
        mapped, expected = torch.func.vmap(grad, axes)(*arguments), [grad(*pair) for pair in pairs]
        for actual, each in zip(mapped, zip(*expected, strict=True), strict=True):
            assert error(actual, torch.stack(each)) <= RELATIVE[torch.float64]


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_batches_of_gradients(monkeypatch, backend):
    """In the backward alone: by `is_grads_batched`, which is none of torch.func's, and by vmap."""
    monkeypatch.setenv("MICA_BACKEND", backend)
    p = problem("rows of none", 5, 4, 2, torch.float32)
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    y = mica_experts_linear(x, p.offsets, p.weight, lora_A, p.lora_B, p.scaling)
    vectors = torch.stack([p.grad_output, -2 * p.grad_output])

    def grads(vector, **options):
        return torch.autograd.grad(y, (x, lora_A), vector, retain_graph=True, **options)

    expected = [torch.stack(pair) for pair in zip(*map(grads, vectors), strict=True)]
    for actual in (grads(vectors, is_grads_batched=True), torch.func.vmap(grads)(vectors)):
        for ours, exact in zip(actual, expected, strict=True):
            assert error(ours, exact) <= RELATIVE[torch.float32]


def test_an_edit_of_x_before_the_backward_is_refused():
    p = problem("idle ones", 5, 4, 2, torch.float32)
    x, lora_A = p.x.clone(), p.lora_A.clone().requires_grad_()
    y = mica_experts_linear(x, p.offsets, p.weight, lora_A, p.lora_B, p.scaling, p.bias)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_reruns_are_bitwise_equal():
    p = problem("all to the second", 65, 33, 7, *FP32_MASTER)
    first, second = run(p, mica_experts_linear), run(p, mica_experts_linear)
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------
# tokens instead of rows
# ---------------------------------------------------------------------------------------------------


def routed(dtype=torch.float32, adapter_dtype=None):
    """The operands of 6 tokens with 2 of 6 experts each, and their routing."""
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(6)])
    chosen[3, 0] = 6  # none of them
    routing = route(chosen, 6)
    p = problem("idle ones", 8, 6, 2, dtype, adapter_dtype)
    p.offsets, p.x = routing.offsets, p.x[:6]
    return p, routing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tokens_give_the_bits_of_their_rows(dtype):
    p, routing = routed(dtype, torch.promote_types(dtype, torch.float32))
    rest = p.offsets, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias, None

    def both(x, *order):
        x, lora_A = x.detach().clone().requires_grad_(), p.lora_A.clone().requires_grad_()
        y = experts_linear(x, *rest[:2], lora_A, *rest[3:], *order)
        y.backward(p.grad_output)
        return y, x.grad, lora_A.grad

    rows = both(to_experts(p.x, routing.tokens))
    y, grad_x, grad_A = both(p.x, routing.tokens, routing.inverse)
    assert torch.equal(y, rows[0])
    assert torch.equal(grad_x, summed(rows[1], routing.inverse, 6))
    assert torch.equal(grad_A, rows[2])


def test_tokens_are_saved_and_not_their_rows():
    p, routing = routed()
    x, lora_A = p.x.detach().clone().requires_grad_(), p.lora_A.clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = experts_linear(
            x, p.offsets, p.weight, lora_A, p.lora_B, 1.0, None, None, routing.tokens, routing.inverse
        )
    known = {t.data_ptr() for t in (x, p.weight, lora_A, p.lora_B, *routing[:4])}
    assert {t.data_ptr() for t in saved if t is not None} <= known
    y.sum().backward()


def test_tokens_compiled_and_twice_differentiated():
    p, routing = routed(torch.float64)

    def function(x, lora_A):
        rest = p.lora_B, p.scaling, p.bias, None, routing.tokens, routing.inverse
        return experts_linear(x, p.offsets, p.weight, lora_A, *rest)

    inputs = p.x.detach().clone().requires_grad_(), p.lora_A.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), function(*inputs))
    opcheck(
        torch.ops.mica.experts_linear.default,
        (
            inputs[0],
            p.offsets,
            p.weight,
            inputs[1],
            p.lora_B,
            1.0,
            None,
            None,
            routing.tokens,
            routing.inverse,
        ),
    )
    operands = (p.grad_output, p.x, p.offsets, p.weight, p.lora_A, p.lora_B, 1.0, torch.float64, [True, True])
    opcheck(torch.ops.mica.experts_linear_backward.default, (*operands, routing.tokens, routing.inverse, 6))


# ---------------------------------------------------------------------------------------------------
# on Triton kernels (interpreted where there is no GPU)
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 0])
@pytest.mark.parametrize("route", ["rows of none", "idle ones", "no rows"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("on_kernels", [True, False])
def test_with_an_adapter_and_without(monkeypatch, rank, route, bias, on_kernels):
    """Rank 0 stands for a stack without an adapter, which has an operator of its own."""
    monkeypatch.setenv("MICA_BACKEND", "triton" if on_kernels else "reference")
    p = problem(route, 8, 12, 3, torch.float32, bias=bias)
    if not rank:
        p.lora_A, p.lora_B = p.lora_A[:, :0], p.lora_B[:, :, :0]
    expected = solve(p)
    operands = ("x", "offsets", "weight", "lora_A", "lora_B", "bias", "grad_output")
    for name in operands:
        value = getattr(p, name)
        setattr(p, name, None if value is None else value.to(DEVICE))
    name, function = ("experts_linear", mica_experts_linear) if rank else ("experts_base", base_alone)
    before = ops.call_counts[f"{name}_kernels"]
    actual = run(p, function)
    assert (ops.call_counts[f"{name}_kernels"] > before) == on_kernels
    for name, value in actual.items():
        assert value is None or error(value.cpu(), expected[name]) <= RELATIVE[torch.float32], name


def base_alone(x, offsets, weight, lora_A, lora_B, scaling, bias):
    return experts_base(x, offsets, weight, bias)


@pytest.mark.parametrize("gathers", [True, False])
def test_without_an_adapter_through_the_dispatcher(gathers):
    """As `torch.compile` calls it, with its gradient, and with that one's."""
    routing = route(torch.tensor([[1, 0], [2, 1], [3, 2]]), 3)  # 3: no expert
    order = (routing.tokens, routing.inverse) if gathers else (None, None)
    x = torch.randn(3 if gathers else 6, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    arguments = x, routing.offsets, weight, bias, *order
    opcheck(torch.ops.mica.experts_base.default, arguments)
    torch.testing.assert_close(torch.ops.mica.experts_base(*arguments), experts_base(*arguments))
    assert torch.autograd.gradcheck(lambda x: experts_base(x, *arguments[1:]), (x,))
    assert torch.autograd.gradgradcheck(lambda x: experts_base(x, *arguments[1:]).sin(), (x,))


def unchecked(*operands):
    """`mica_experts_linear` without its checks, which refuse a weight of another dtype."""
    return experts_linear(*operands, None)
