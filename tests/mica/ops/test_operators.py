"""What the operators of a linear layer, of its factors and of a stack of experts have in common."""

import itertools
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

from mica import ops
from mica.ops import mica_experts_linear, mica_linear
from tests.support import expert_cases, linear_calls, oracle
from tests.support.linear_calls import (
    adapted,
    addresses,
    agree,
    by_call,
    call,
    leaves,
    run,
    same_bits,
    saved_by,
)
from tests.support.oracle import solve
from tests.support.tolerances import RELATIVE, error

FP32, BF16 = torch.float32, torch.bfloat16
FP32_MASTER = (BF16, FP32)
SEED = torch.tensor([-11])
DROPOUT = {"dropout_p": 0.5, "seed": SEED}


class Kind(NamedTuple):
    operator: str
    function: object  # as `mica_linear`
    problem: object  # of what follows, in_features, out_features, rank, dtype, adapter_dtype
    rows: object  # few
    many: object

    @property
    def counted(self):
        return self.operator, f"{self.operator}_backward"


def dense(function, **options):
    return Kind("linear", function, partial(oracle.problem, **options), (2, 3), (300,))


def experts(**options):
    problem = partial(expert_cases.problem, **options)
    return Kind("experts_linear", mica_experts_linear, problem, "rows of none", "all to the second")


KINDS = {
    "linear": dense(mica_linear),
    "LoRA": dense(mica_linear, trains_B=True),
    "base called": dense(by_call),
    "LoRA, base called": dense(by_call, trains_B=True),
    "experts": experts(),
    "LoRA, experts": experts(trains_B=True),
}
of_each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
with_options = pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, id=name + ", dropout" * bool(options))
        for name, kind in KINDS.items()
        for options in ({}, DROPOUT)
        if not options or "experts" not in name  # which have none
    ],
)
in_each_autocast = pytest.mark.parametrize("autocast_dtype", [BF16, torch.float16])
WHOLE = ("linear", "LoRA", "experts", "LoRA, experts")
whole = pytest.mark.parametrize("kind", [KINDS[name] for name in WHOLE], ids=WHOLE)
NAMES = ("grad_x", "grad_A", "grad_B")  # of the gradients of `leaves`


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        (name, needs)
        for name in KINDS
        for needs in itertools.product((True, False), repeat=3 if "LoRA" in name else 2)
    ],
)
def test_computes_and_saves_only_what_a_gradient_needs(backend, name, needs):
    """lora_A alone is trained (LoRA with a frozen B), lora_B alone (LoRA-FA), and so on."""
    kind = KINDS[name]
    p = kind.problem(kind.rows, 8, 6, 2, *FP32_MASTER)
    tensors = leaves(p, needs)
    saved, y = saved_by(lambda: call(p, kind.function, *tensors))
    if not any(needs):
        assert not y.requires_grad
        assert not saved
        return
    needs_B = needs[2:] == (True,)
    x, *factors = tensors
    assert (x.data_ptr() in saved) == needs[1]  # x as it came, or not at all
    assert (p.weight.data_ptr() in saved) == needs[0]
    others = saved - addresses(x, p.weight, *factors, p.lora_B, p.offsets)  # no cast; h for dB alone
    assert len(others) == needs_B
    y.backward(p.grad_output)
    assert tuple(tensor.grad is not None for tensor in tensors) == needs
    gradients = {
        name: tensor.grad for name, tensor in zip(NAMES, tensors, strict=False) if tensor.requires_grad
    }
    agree(gradients, solve(p), BF16)


def test_y_keeps_its_dtype_and_its_precision(backend):
    """A base layer may return fp32 next to 16-bit products: the sum is not rounded to theirs."""
    y, x = torch.randn(20, 20), torch.randn(20, 8).bfloat16()
    lora_A, lora_B = torch.randn(4, 8), 1e-3 * torch.randn(20, 4)
    out = adapted(y, x, lora_A, lora_B)
    assert out.dtype == FP32
    assert error(out, y.double() + x.double() @ (lora_B.double() @ lora_A.double()).t()) <= 1e-4


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
@with_options
def test_first_and_second_derivatives(kind, options):
    p = kind.problem(kind.rows, 5, 4, 2, torch.float64)
    inputs = leaves(p)

    def function(*inputs):
        return call(p, kind.function, *inputs, **options)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    if options and kind is KINDS["linear"]:  # of LoRA h as well
        saved, _ = saved_by(lambda: function(*inputs))
        # no mask; the seed is saved by Python alone, C++ has read it
        assert saved | addresses(SEED) == addresses(*inputs, p.weight, p.lora_B, SEED)


@of_each_kind
def test_function_transforms(kind):
    """Mapped over the rows, over A, and over both."""
    p = kind.problem(kind.rows, 5, 4, 2, torch.float64)
    xs, lora_As = torch.stack([p.x, 2 * p.x]), torch.stack([p.lora_A, p.lora_A * 3])

    def loss(*tensors):
        return (call(p, kind.function, *tensors) * p.grad_output).sum()

    tensors = [leaf.detach() for leaf in leaves(p)]
    grads = torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
    agree(dict(zip(NAMES, grads, strict=False)), solve(p), torch.float64)
    grad = torch.func.grad(loss, argnums=(0, 1))
    for axes, arguments, pairs in (
        ((0, None), (xs, p.lora_A), [(x, p.lora_A) for x in xs]),
        ((None, 0), (p.x, lora_As), [(p.x, lora_A) for lora_A in lora_As]),
        ((0, 0), (xs, lora_As), list(zip(xs, lora_As, strict=True))),
    ):
        outputs = torch.func.vmap(lambda x, A: call(p, kind.function, x, A), axes)(*arguments)
        expected = torch.stack([call(p, kind.function, *pair) for pair in pairs])
        assert error(outputs, expected) <= RELATIVE[torch.float64]
        mapped, expected = torch.func.vmap(grad, axes)(*arguments), [grad(*pair) for pair in pairs]
        for actual, each in zip(mapped, zip(*expected, strict=True), strict=True):
            assert error(actual, torch.stack(each)) <= RELATIVE[torch.float64]


@pytest.mark.whole
@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("through_dispatcher", [False, True])
@of_each_kind
def test_vmap_within_ordinary_autograd(kind, through_dispatcher, autocast):
    """By the plain formulas: PyTorch maps each product, and autograd sums the gradient of A in one."""
    p = kind.problem(kind.rows, 8, 6, 2, FP32)
    xs, lora_A = torch.stack([p.x, 2 * p.x]).requires_grad_(), p.lora_A.clone().requires_grad_()
    operators = {mica_linear: torch.ops.mica.linear, mica_experts_linear: torch.ops.mica.experts_linear}

    def function(*operands, compute_dtype=None):
        if through_dispatcher and kind.function in operators:
            return operators[kind.function](*operands, compute_dtype)[0]
        return kind.function(*operands, compute_dtype=compute_dtype)

    with torch.autocast("cpu", BF16, enabled=autocast):
        ys = torch.func.vmap(lambda x: call(p, function, x, lora_A))(xs)
    grads = torch.autograd.grad(ys.sum(), (xs, lora_A))
    each = [call(p, kind.function, x, lora_A) for x in xs]
    expected = torch.autograd.grad(sum(y.sum() for y in each), (xs, lora_A))
    limit = RELATIVE[BF16 if autocast else FP32]
    if kind.function is not by_call:  # whose base layer's bias PyTorch adds in fp32, under vmap
        assert ys.dtype == (BF16 if autocast and kind.function is mica_linear else FP32)
    assert error(ys, torch.stack(each)) <= limit
    for ours, exact in zip(grads, expected, strict=True):
        assert error(ours, exact) <= limit


@of_each_kind
def test_tangents_of_a_backward(language, kind):
    """The gradients are linear in the output's, and so are their tangents."""
    p = kind.problem(kind.rows, 5, 4, 2, torch.float64)
    inputs = leaves(p)
    y = call(p, kind.function, *inputs)
    tangent = torch.randn_like(p.grad_output)
    expected = torch.autograd.grad(y, inputs, tangent, retain_graph=True)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(y, inputs, forward_ad.make_dual(p.grad_output, tangent))
        tangents = [forward_ad.unpack_dual(grad).tangent for grad in grads]
    for ours, exact in zip(tangents, expected, strict=True):
        assert error(ours, exact) <= RELATIVE[torch.float64]


@pytest.mark.parametrize("name", ["x", "lora_A"])
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
def test_forward_mode_with_dual_tensors(name, options):
    p = oracle.problem((3,), 5, 4, 2, torch.float64)

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
@whole
def test_batches_of_gradients(backend, kind):
    """In the backward alone: by `is_grads_batched`, which is none of torch.func's, and by vmap."""
    p = kind.problem(kind.rows, 5, 4, 2, FP32)
    inputs = leaves(p)
    y = call(p, kind.function, *inputs)
    vectors = torch.stack([p.grad_output, -2 * p.grad_output])

    def grads(vector, **options):
        return torch.autograd.grad(y, inputs, vector, retain_graph=True, **options)

    expected = [torch.stack(pair) for pair in zip(*map(grads, vectors), strict=True)]
    for actual in (grads(vectors, is_grads_batched=True), torch.func.vmap(grads)(vectors)):
        for ours, exact in zip(actual, expected, strict=True):
            assert error(ours, exact) <= RELATIVE[FP32]


@whole
def test_an_edit_of_x_in_place_is_reported(kind):
    p = kind.problem(kind.rows, 5, 4, 2, FP32)
    lora_A = p.lora_A.clone().requires_grad_()
    y = call(p, kind.function, p.x, lora_A)
    p.x.mul_(2.0)
    with pytest.raises(RuntimeError, match="an adapted layer has been modified by an inplace operation"):
        y.sum().backward()
    y = call(p, kind.function, p.x, lora_A).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):  # other errors are autograd's own
        y.backward()


@in_each_autocast
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("name", ["linear", "LoRA", "base called", "LoRA, base called"])
def test_autocast(path, autocast_dtype, backward_inside, name):
    """As PEFT's layer: out in autocast's dtype. On kernels the fp32 master's gradient stays unrounded.

    The weight is kept as it is, and no copy in autocast's dtype.
    """
    kind = KINDS[name]
    p = kind.problem((17,), 12, 10, 3, FP32)
    tensors = leaves(p)

    def forward():
        with torch.autocast("cpu", autocast_dtype):
            return call(p, kind.function, *tensors)

    if kind.function is mica_linear:
        assert p.weight.data_ptr() in saved_by(forward)[0]
    ops.call_counts.clear()
    y = forward()
    with torch.autocast("cpu", autocast_dtype, enabled=backward_inside):
        y.backward(p.grad_output.to(autocast_dtype))
    assert y.dtype == autocast_dtype
    grads = [tensor.grad for tensor in tensors]
    assert {grad.dtype for grad in grads} == {FP32}
    rounds = path in (linear_calls.OWN, linear_calls.NATIVE)
    for grad in grads[1:]:
        assert torch.equal(grad, grad.to(autocast_dtype).float()) == rounds
    agree({"y": y, **dict(zip(NAMES, grads, strict=False))}, solve(p), autocast_dtype)
    assert ops.call_counts[f"{kind.operator}_kernels"] == (path == "triton")


@in_each_autocast
def test_autocast_of_x_and_of_a_wider_y(autocast_dtype):
    p = oracle.problem((16,), 12, 10, 3, FP32)
    with torch.autocast("cpu", autocast_dtype):
        y = torch.zeros(16, 10)
        update = adapted(y, p.x, p.lora_A, p.lora_B, p.scaling)
        dropped = adapted(y, p.x, p.lora_A, p.lora_B, p.scaling, **DROPOUT)
        same = adapted(y, p.x.to(autocast_dtype), p.lora_A, p.lora_B, p.scaling)
    assert update.dtype == FP32
    assert torch.equal(update, same)
    assert error(dropped, update) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@with_options
def test_compiles_into_one_graph_whose_calls_are_counted(backend, compiler, kind, options):
    """Whatever multiplies: no compiler looks into a body."""
    torch.compiler.reset()
    p = kind.problem(kind.rows, 5, 7, 2, *(FP32_MASTER if options else (FP32, FP32)))
    compiled = torch.compile(kind.function, fullgraph=True, backend=compiler)
    expected = run(p, function=kind.function, **options)
    ops.call_counts.clear()
    is_compiled_too = kind.function is by_call and compiler != "eager"  # the base layer, PyTorch's own
    for calls in (1, 2):
        result = run(p, function=compiled, **options)
        if is_compiled_too:  # on some processors with products in another order
            agree(result, expected, BF16 if options else FP32)
        else:
            same_bits(result, expected)
        for name in kind.counted:
            assert ops.call_counts[name] == calls
            assert ops.call_counts[f"{name}_kernels"] == (calls if backend == "triton" else 0)


@of_each_kind
def test_gradient_of_a_master_is_not_rounded_to_16_bit(kind):
    result = run(kind.problem(kind.many, 32, 24, 4, *FP32_MASTER), function=kind.function)
    for name in result.keys() & {"grad_A", "grad_B"}:
        grad = result[name][result[name] != 0]  # 0: of experts without rows
        assert (grad != grad.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "compute_dtype", "bias"),
    [(FP32, FP32, None, True), (BF16, BF16, None, False), (BF16, FP32, FP32, True)],
)
@whole
def test_opcheck(backend, kind, dtype, adapter_dtype, compute_dtype, bias):
    """With dropout where there is no bias. A gradient's wrong dtype, which autograd casts, is seen here.

    Of kernels only what they return: the rest of the check is of what is registered, whatever computes it.
    """
    p = kind.problem(kind.rows, 5, 7, 2, dtype, adapter_dtype, bias)
    offsets = [] if p.offsets is None else [p.offsets]
    dropout = [] if bias or offsets else [0.3, SEED]
    x, *factors = leaves(p)
    forward, backward = (getattr(torch.ops.mica, name).default for name in kind.counted)
    lora_A, lora_B = (*factors, p.lora_B)[:2]
    arguments = x, *offsets, p.weight, lora_A, lora_B, p.scaling, p.bias, compute_dtype, *dropout
    of_results = partial(opcheck, test_utils=("test_schema", "test_faketensor"))
    whole = opcheck if backend == "reference" else of_results
    # all of it differentiates h, too, and of experts that train B its formula waits for the offsets
    (of_results if kind is KINDS["LoRA, experts"] else whole)(forward, arguments)
    operands = p.weight, p.lora_A, p.lora_B.detach(), p.scaling, None, compute_dtype or dtype, *dropout
    rows = p.grad_output, p.x, *offsets
    whole(backward, (*rows, [True, True], *operands))
    for mask in ([True, False], [False, True]):  # only what is returned depends on it
        of_results(backward, (*rows, mask, *operands))


@pytest.mark.parametrize("compute_dtype", [None, FP32])
def test_opcheck_where_the_base_was_called(compute_dtype):
    p = oracle.problem((2, 3), 5, 7, 2, *FP32_MASTER)
    y, x = p.grad_output.clone().requires_grad_(), p.x.clone().requires_grad_()
    numbers = 0.5, None, compute_dtype, 0.3, SEED, None
    for lora_B in (p.lora_B, p.lora_B.detach().clone().requires_grad_()):
        lora_A = p.lora_A.clone().requires_grad_()
        opcheck(torch.ops.mica.linear.default, (x, None, lora_A, lora_B, *numbers, lora_B.requires_grad, y))
    h = torch.randn(2, 3, 2).bfloat16()
    opcheck(torch.ops.mica.grad_b.default, (y.detach(), h, FP32, compute_dtype, 0))
    for mask in ([True, True], [True, False], [False, True]):
        operands = None, p.lora_A, p.lora_B, 0.5, None, compute_dtype or BF16, 0.3, SEED
        arguments = y.detach(), p.x, mask, *operands
        opcheck(torch.ops.mica.linear_backward.default, arguments, {"is_called": True})
