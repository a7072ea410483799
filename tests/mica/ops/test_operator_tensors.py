"""What becomes of the tensors that operators take and give: lazy ones, saved ones, outputs in other hands."""

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad

from mica.ops import (
    mica_experts_linear,
    mica_linear,
)
from mica.ops.experts import experts_base, experts_linear
from mica.ops.linear import linear_eager
from mica.ops.routing import from_experts, route
from tests.support.expert_cases import problem as problem_of_experts
from tests.support.linear_calls import Marked, adapted, arguments, by_call, embedding
from tests.support.oracle import problem

# -- memory that does not hold the values -------------------------------------------------------------

LAZY = {
    "negated": lambda t: (torch._neg_view(-t), t),
    "zero": lambda t: (torch._efficientzerotensor(t.shape, dtype=t.dtype), torch.zeros_like(t)),
}


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", arguments())
def test_lazy_tensors_are_what_pytorch_says_they_are(backend, name, dtype, lazy):
    """Each operand of each operator in turn."""
    operator = getattr(torch.ops.mica, name).default
    operands = [
        arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in arguments()[name]
    ]
    for place, operand in enumerate(operands):
        if isinstance(operand, torch.Tensor) and operand.is_floating_point():
            given, plain = LAZY[lazy](operand)
            actual = operator(*operands[:place], given, *operands[place + 1 :])
            expected = operator(*operands[:place], plain, *operands[place + 1 :])
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_gradient_that_arrives_lazily_negated(backend):
    p = problem((4,), 16, 24, 4, torch.float32)
    grads, seen = [], []
    for lazily in (True, False):
        lora_A = p.lora_A.clone().requires_grad_()
        y = mica_linear(p.x, p.weight, lora_A, p.lora_B)
        y.register_hook(lambda grad: seen.append(grad.is_neg()))
        z = torch.complex(torch.zeros_like(y), y)
        loss = (z.conj() * (1 + 2j)).real.sum() if lazily else (2 * y).sum()
        grads.append(torch.autograd.grad(loss, lora_A)[0])
    assert seen[0]
    torch.testing.assert_close(*grads)


# -- what is tracked ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "base_output"])
def test_what_alone_needs_a_gradient_gets_it(backend, name):
    """A base layer that is called may be all that is trained: its bias."""
    p = problem((4,), 16, 24, 4, torch.float32)
    tensors = {"x": p.x, "lora_A": p.lora_A, "lora_B": p.lora_B, "base_output": torch.randn(4, 24)}
    leaf = tensors[name] = tensors[name].detach().clone().requires_grad_()
    x, lora_A, lora_B, base_output = tensors.values()
    expected = base_output + p.scaling * x @ lora_A.t() @ lora_B.t()
    y = adapted(base_output, x, lora_A, lora_B, p.scaling)
    grads = (torch.autograd.grad(output.square().sum(), leaf) for output in (y, expected))
    torch.testing.assert_close(*grads)


# -- what is saved ------------------------------------------------------------------------------------


class Form(NamedTuple):
    function: object  # of the operands by name
    operands: object  # () -> by name
    needs_x: bool = True


def of_layer(*rows):
    def operands():
        p = problem(rows or (2, 3), 8, 6, 2, torch.float64)
        return {"x": p.x, "weight": p.weight, "lora_A": p.lora_A, "lora_B": p.lora_B}

    return operands


def with_seed():
    return of_layer()() | {"seed": torch.tensor([3])}


def of_embedding():
    indices = torch.tensor([[1, 4], [1, 0]])
    return {"indices": indices, "lora_A": torch.randn(2, 6).double(), "lora_B": torch.randn(3, 2).double()}


def of_experts():
    p = problem_of_experts("rows of none", 8, 6, 2, torch.float64)
    lora_B = p.lora_B.contiguous()
    return {"x": p.x, "offsets": p.offsets, "weight": p.weight, "lora_A": p.lora_A, "lora_B": lora_B}


CHOSEN = torch.tensor([[1, 0], [2, 1], [0, 2]])


def of_tokens():
    routing = route(CHOSEN, 3)
    order = {"offsets": routing.offsets, "tokens": routing.tokens, "inverse": routing.inverse}
    shapes = {"x": (3, 4), "weight": (3, 5, 4), "lora_A": (3, 2, 4), "lora_B": (3, 5, 2)}
    return order | {name: torch.randn(shape).double() for name, shape in shapes.items()}


def without_adapter():
    operands = of_tokens()
    return {name: operands[name] for name in ("x", "offsets", "weight", "tokens", "inverse")}


def of_sums():
    return {"y": torch.randn(6, 4).double(), "weights": torch.rand(3, 2).double()}


def summed(y, weights):
    return from_experts(y, weights, route(CHOSEN, 3))


def eager(x, weight, lora_A, lora_B):
    return linear_eager(x, weight, lora_A, lora_B, 0.75, None, None)


def dropped(x, weight, lora_A, lora_B, seed):
    return mica_linear(x, weight, lora_A, lora_B, 0.75, dropout_p=0.5, seed=seed)


def base_called(x, weight, lora_A, lora_B):
    return by_call(x[...], weight, lora_A, lora_B, 0.75)


def experts_of_tokens(x, offsets, weight, lora_A, lora_B, tokens, inverse):
    return experts_linear(x, offsets, weight, lora_A, lora_B, 0.75, None, None, tokens, inverse)


def experts_alone(x, offsets, weight, tokens, inverse):
    return experts_base(x, offsets, weight, None, tokens, inverse)


FORMS = {
    "linear, dropout": Form(dropped, with_seed),
    "linear": Form(eager, of_layer()),
    "linear of a matrix": Form(eager, of_layer(6)),
    "base called": Form(base_called, of_layer()),
    "embedding": Form(embedding, of_embedding, needs_x=False),
    "experts": Form(mica_experts_linear, of_experts),
    "experts of tokens": Form(experts_of_tokens, of_tokens),
    "experts without an adapter": Form(experts_alone, without_adapter),
    "sums of experts": Form(summed, of_sums),
}
TRAINED = ("x", "lora_A", "y", "weights")
OF_EACH = [(name, operand) for name, form in FORMS.items() for operand in form.operands()]


@pytest.fixture
def form(request):
    return FORMS[request.param]


def leaves_of(operands, trained=TRAINED):
    """Each in memory of its own; those that are trained need a gradient."""
    return {
        name: tensor.detach().clone().requires_grad_(name in trained) for name, tensor in operands.items()
    }


def derivatives(y, inputs):
    """The first ones and those of their squares."""
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    plain = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    total = sum(grad.square().sum() for grad in first if grad.requires_grad)
    second = torch.autograd.grad(total, inputs, allow_unused=True) if isinstance(total, torch.Tensor) else ()
    return *first, *plain, *second


@pytest.mark.parametrize("through_an_operation", [False, True])
@pytest.mark.parametrize(("form", "replaced"), OF_EACH, indirect=["form"])
def test_other_memory_after_the_forward_changes_no_derivative(language, form, replaced, through_an_operation):
    """``tensor.data = other``, of a leaf and of an activation: no version counts it."""
    operands, results = form.operands(), []
    for replaces in (False, True):
        leaves = leaves_of(operands)
        inputs = [leaf for leaf in leaves.values() if leaf.requires_grad]
        given = dict(leaves)
        if through_an_operation and leaves[replaced].requires_grad:
            given[replaced] = leaves[replaced] * 1.0
        y = form.function(**given)
        if replaces:
            other = given[replaced].data
            given[replaced].data = other * -2 if other.is_floating_point() else torch.zeros_like(other)
        results.append(derivatives(y, inputs))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    "form",
    ["linear, dropout", "linear", "base called", "embedding", "experts", "experts of tokens"],
    indirect=True,
)
def test_an_edit_of_lora_a_matters_to_the_gradient_of_x_alone(language, form):
    """As in stock PEFT: two losses, and a step of the optimiser between their backwards."""
    operands = form.operands()

    def second_gradient(edits):
        leaves = leaves_of(operands, trained=("lora_A",))
        lora_A = leaves["lora_A"]
        y = form.function(**leaves)
        torch.autograd.grad(y.sum(), lora_A, retain_graph=True)
        if edits:
            with torch.no_grad():
                lora_A.mul_(3.0)
        return torch.autograd.grad(2 * y.sum(), lora_A)[0]

    assert torch.equal(second_gradient(edits=True), second_gradient(edits=False))
    if form.needs_x:
        leaves = leaves_of(operands)
        y = form.function(**leaves)
        with torch.no_grad():
            leaves["lora_A"].mul_(3.0)
        with pytest.raises(RuntimeError, match="of an adapted layer has been modified"):
            y.sum().backward()


# -- outputs ------------------------------------------------------------------------------------------


OUTPUTS = {
    "linear": lambda x, p, A: mica_linear(x, p.weight, A, p.lora_B, 0.75),
    "linear, past every check": lambda x, p, A: linear_eager(x, p.weight, A, p.lora_B, 0.75, None, None),
    "base called": lambda x, p, A: by_call(x, p.weight, A, p.lora_B, 0.75),
    "embedding": lambda x, p, A: embedding(torch.zeros(x.shape[:-1]).long(), A, p.lora_B),
}


@pytest.mark.parametrize("around", [nullcontext, forward_ad.dual_level], ids=["eager", "dual level"])
@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_is_nobody_s_view(backend, name, rows, around):
    """A hook on it is called although it has been changed in place; it may be detached, and marked."""
    p = problem((3,), 8, 6, 2, torch.float32)
    x = torch.randn(*rows, 8)

    def output():
        lora_A = p.lora_A.clone().requires_grad_()
        y = OUTPUTS[name](x, p, lora_A)
        assert not y._is_view()
        return y, lora_A

    with around():
        y, lora_A = output()
        expected = torch.autograd.grad(10 * y.sum(), lora_A)[0]
        y, lora_A = output()
        y.register_hook(lambda grad: grad * 10)
        y += 1.0
        assert torch.equal(torch.autograd.grad(y.sum(), lora_A)[0], expected)
        output()[0].detach_()
        y, lora_A = output()
        marked, _ = Marked.apply(y)
        actual = torch.autograd.grad(marked.sum(), lora_A)[0]
        torch.testing.assert_close(actual, 0.3 * expected)


@pytest.mark.parametrize(
    "form", ["experts", "experts of tokens", "experts without an adapter"], indirect=True
)
def test_an_output_of_experts_is_nobody_s_view(language, form):
    leaves = leaves_of(form.operands())
    y = form.function(**leaves)
    assert not y._is_view()
    expected = torch.autograd.grad(10 * y.sum(), leaves["x"], retain_graph=True)[0]
    y.register_hook(lambda grad: grad * 10)
    y += 1.0
    assert torch.equal(torch.autograd.grad(y.sum(), leaves["x"])[0], expected)


def test_a_gradient_that_is_differentiated_is_nobody_s_view(language):
    p = problem((2, 3), 8, 6, 2, torch.float32)
    x, lora_A = p.x.clone().requires_grad_(), p.lora_A.clone().requires_grad_()
    y = mica_linear(x, p.weight, lora_A, p.lora_B)
    for grad in torch.autograd.grad(y.square().sum(), (x, lora_A), create_graph=True):
        assert not grad._is_view()
