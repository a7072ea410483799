"""What the operators of a linear layer, of its factors and of a stack of experts have in common."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

from mica import ops
from mica.ops import mica_experts_linear, mica_linear
from tests.support import experts_oracle, oracle
from tests.support.linear_calls import addresses, agree, by_factors, call, leaves, run, saved_by
from tests.support.oracle import DTYPES
from tests.support.tolerances import RELATIVE, error

BACKENDS = ["reference", "triton"]
FP32_MASTER = (torch.bfloat16, torch.float32)


class Kind(NamedTuple):
    function: object  # as `mica_linear`
    problem: object  # of what follows, in_features, out_features, rank, dtype, adapter_dtype
    solve: object
    rows: object  # few
    many: object
    counted: tuple[str, ...]


KINDS = {
    "linear": Kind(mica_linear, oracle.problem, oracle.solve, (2, 3), (300,), ("linear",)),
    "factors": Kind(
        by_factors, oracle.problem, oracle.solve, (2, 3), (300,), ("down_projection", "up_projection")
    ),
    "experts": Kind(
        mica_experts_linear,
        experts_oracle.problem,
        experts_oracle.solve,
        "rows of none",
        "all to the second",
        ("experts_linear",),
    ),
}
of_each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
whole = pytest.mark.parametrize("kind", [KINDS["linear"], KINDS["experts"]], ids=["linear", "experts"])

# rows; in_features, out_features, rank
SIZES = [(1, 1, 1), (9, 14, 3), (33, 8, 8)]
LINEAR = [(rows, *sizes) for rows in ((), (1,), (3, 5), (2, 1, 7)) for sizes in SIZES]
FACTORS = [((), 9, 14, 3), ((3, 5), 33, 8, 8), ((70,), 40, 24, 16)]
SHAPES = [
    *(("linear", "reference", *shape) for shape in LINEAR),
    *(("factors", backend, *shape) for shape in FACTORS for backend in BACKENDS),
    *(("experts", "reference", route, 9, 14, 3) for route in experts_oracle.ROUTES),
]


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize(("kind", "backend", "rows", "in_features", "out_features", "rank"), SHAPES, ids=str)
def test_agrees_with_the_dense_oracle(
    monkeypatch, kind, backend, rows, in_features, out_features, rank, dtype, adapter_dtype, compute_dtype
):
    if (backend, dtype) == ("triton", torch.float64):
        pytest.skip("no such kernels")
    monkeypatch.setenv("MICA_BACKEND", backend)
    ops.call_counts.clear()
    function, problem, solve, _, _, counted = KINDS[kind]
    p = problem(rows, in_features, out_features, rank, dtype, adapter_dtype)
    expected, actual = solve(p), run(p, compute_dtype, function)
    agree(actual, expected, dtype)
    assert actual["y"].dtype == actual["grad_x"].dtype == dtype
    assert actual["grad_A"].dtype == adapter_dtype
    for name in counted:
        for operator in (name, f"{name}_backward"):
            assert ops.call_counts[operator] == 1
            assert ops.call_counts[f"{operator}_kernels"] == (backend == "triton")


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False), (False, False)])
@whole
def test_computes_and_saves_only_what_a_gradient_needs(kind, needs):
    p = kind.problem(kind.rows, 8, 6, 2, *FP32_MASTER)
    x, lora_A = leaves(p, needs)
    saved, y = saved_by(lambda: call(p, kind.function, x, lora_A))
    if not any(needs):
        assert not y.requires_grad
        assert not saved
        return
    assert (x.data_ptr() in saved) == needs[1]  # x as it came, or not at all
    assert (p.weight.data_ptr() in saved) == needs[0]
    # no cast, no h
    assert saved <= addresses(x, p.weight, lora_A, p.lora_B, getattr(p, "offsets", None))
    y.backward(p.grad_output)
    assert (x.grad is not None, lora_A.grad is not None) == needs


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
@pytest.mark.parametrize("dropout", [False, True])
@of_each_kind
def test_first_and_second_derivatives(kind, dropout):
    if dropout and kind is KINDS["experts"]:
        pytest.skip("has none")
    p = kind.problem(kind.rows, 5, 4, 2, torch.float64)
    seed, inputs = torch.tensor([-9]), leaves(p)
    options = {"dropout_p": 0.5, "seed": seed} if dropout else {}

    def function(x, lora_A):
        return call(p, kind.function, x, lora_A, **options)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    if dropout and kind is KINDS["linear"]:
        saved, _ = saved_by(lambda: function(*inputs))
        assert saved == addresses(*inputs, p.weight, p.lora_B, seed)  # the seed, and no mask


@of_each_kind
def test_function_transforms(kind):
    """Of the rows, of A, and of both: what is mapped may be any of them."""
    p = kind.problem(kind.rows, 5, 4, 2, torch.float64)
    xs, lora_As = torch.stack([p.x, 2 * p.x]), torch.stack([p.lora_A, p.lora_A * 3])

    def loss(x, lora_A):
        return (call(p, kind.function, x, lora_A) * p.grad_output).sum()

    grad = torch.func.grad(loss, argnums=(0, 1))
    agree(dict(zip(("grad_x", "grad_A"), grad(p.x, p.lora_A), strict=True)), kind.solve(p), torch.float64)
    for axes, arguments, pairs in (
        ((0, None), (xs, lora_As[0]), [(xs[0], lora_As[0]), (xs[1], lora_As[0])]),
        ((None, 0), (xs[0], lora_As), [(xs[0], lora_As[0]), (xs[0], lora_As[1])]),
        ((0, 0), (xs, lora_As), list(zip(xs, lora_As, strict=True))),
    ):
        outputs = torch.func.vmap(lambda x, A: call(p, kind.function, x, A), axes)(*arguments)
        expected = torch.stack([call(p, kind.function, *pair) for pair in pairs])
        assert error(outputs, expected) <= RELATIVE[torch.float64]
        mapped, expected = torch.func.vmap(grad, axes)(*arguments), [grad(*pair) for pair in pairs]
        for actual, each in zip(mapped, zip(*expected, strict=True), strict=True):
            assert error(actual, torch.stack(each)) <= RELATIVE[torch.float64]


@pytest.mark.parametrize("name", ["x", "lora_A"])
@pytest.mark.parametrize("dropout", [False, True])
def test_forward_mode_with_dual_tensors(name, dropout):
    p = oracle.problem((3,), 5, 4, 2, torch.float64)
    options = {"dropout_p": 0.5, "seed": torch.tensor([7])} if dropout else {}

    def linear(tensor):
        q = replace(p, **{name: tensor})
        return call(q, mica_linear, q.x, q.lora_A, **options)

    primal = getattr(p, name).detach()
    tangent = torch.randn_like(primal)
    _, expected = torch.func.jvp(linear, (primal,), (tangent,))
    with forward_ad.dual_level():
        out, actual = forward_ad.unpack_dual(linear(forward_ad.make_dual(primal, tangent)))
    assert error(actual, expected) <= RELATIVE[torch.float64]
    assert error(out, linear(primal)) <= RELATIVE[torch.float64]


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("backend", BACKENDS)
@whole
def test_batches_of_gradients(monkeypatch, backend, kind):
    """In the backward alone: by `is_grads_batched`, which is none of torch.func's, and by vmap."""
    monkeypatch.setenv("MICA_BACKEND", backend)
    p = kind.problem(kind.rows, 5, 4, 2, torch.float32)
    inputs = leaves(p)
    y = call(p, kind.function, *inputs)
    vectors = torch.stack([p.grad_output, -2 * p.grad_output])

    def grads(vector, **options):
        return torch.autograd.grad(y, inputs, vector, retain_graph=True, **options)

    expected = [torch.stack(pair) for pair in zip(*map(grads, vectors), strict=True)]
    for actual in (grads(vectors, is_grads_batched=True), torch.func.vmap(grads)(vectors)):
        for ours, exact in zip(actual, expected, strict=True):
            assert error(ours, exact) <= RELATIVE[torch.float32]


@whole
def test_an_edit_of_x_in_place_is_reported(kind):
    p = kind.problem(kind.rows, 5, 4, 2, torch.float32)
    lora_A = p.lora_A.clone().requires_grad_()
    y = call(p, kind.function, p.x, lora_A)
    p.x.mul_(2.0)
    with pytest.raises(RuntimeError, match="a MiCA layer has been modified by an inplace operation"):
        y.sum().backward()
    y = call(p, kind.function, p.x, lora_A).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):  # other errors are autograd's own
        y.backward()


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("name", ["linear", "factors"])
def test_autocast(autocast_dtype, backward_inside, name):
    """As PEFT's layer: out in autocast's dtype. The fp32 master's gradient stays unrounded."""
    kind = KINDS[name]
    p = kind.problem((16,), 12, 10, 3, torch.float32)
    x, lora_A = leaves(p)
    with torch.autocast("cpu", autocast_dtype):
        y = call(p, kind.function, x, lora_A)
    with torch.autocast("cpu", autocast_dtype, enabled=backward_inside):
        y.backward(p.grad_output.to(autocast_dtype))
    assert y.dtype == autocast_dtype
    assert x.grad.dtype == lora_A.grad.dtype == torch.float32
    assert (lora_A.grad != lora_A.grad.to(autocast_dtype).float()).any()
    agree({"y": y, "grad_x": x.grad, "grad_A": lora_A.grad}, kind.solve(p), autocast_dtype)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@of_each_kind
def test_compiles_into_one_graph_whose_calls_are_counted(backend, dtype, kind):
    torch.compiler.reset()
    p = kind.problem(kind.rows, 5, 7, 2, dtype, torch.float32)
    compiled = torch.compile(kind.function, fullgraph=True, backend=backend)
    expected = run(p, function=kind.function)
    ops.call_counts.clear()
    for calls in (1, 2):
        for name, value in run(p, function=compiled).items():
            assert torch.equal(value, expected[name]), name
        for name in kind.counted:
            assert ops.call_counts[name] == ops.call_counts[f"{name}_backward"] == calls


@whole
def test_reruns_are_bitwise_equal(kind):
    p = kind.problem(kind.many, 65, 33, 7, *FP32_MASTER)
    first, second = run(p, function=kind.function), run(p, function=kind.function)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_tokens():
    result = run(oracle.problem((0,), 4, 3, 2, torch.float32))
    assert result["y"].shape == (0, 3)
    assert torch.equal(result["grad_A"], torch.zeros(2, 4))


def test_transposed_weight_and_permuted_input():
    p = oracle.problem((5, 6), 7, 4, 2, torch.float32)
    plain = run(p)
    p.weight = p.weight.t().contiguous().t()
    p.x = p.x.transpose(0, 1).contiguous().transpose(0, 1)
    p.grad_output = p.grad_output.transpose(0, 1).contiguous().transpose(0, 1)
    agree(run(p), plain, torch.float32)


@of_each_kind
def test_gradient_of_a_master_is_not_rounded_to_16_bit(kind):
    grad = run(kind.problem(kind.many, 32, 24, 4, *FP32_MASTER), function=kind.function)["grad_A"]
    grad = grad[grad != 0]  # of experts without rows
    assert (grad != grad.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@whole
def test_opcheck(kind, dtype, adapter_dtype, compute_dtype, bias):
    p = kind.problem(kind.rows, 5, 7, 2, dtype, adapter_dtype, bias)
    (name,), offsets = kind.counted, [p.offsets] if hasattr(p, "offsets") else []
    x, lora_A = leaves(p)
    forward, backward = (getattr(torch.ops.mica, op).default for op in (name, f"{name}_backward"))
    opcheck(forward, (x, *offsets, p.weight, lora_A, p.lora_B, p.scaling, p.bias, compute_dtype))
    operands = p.grad_output, p.x, *offsets, p.weight, p.lora_A, p.lora_B, p.scaling, compute_dtype or dtype
    for mask in ([True, True], [True, False], [False, True]):
        opcheck(backward, (*operands, mask))
