import pytest
import torch

from mica.ops.routing import from_experts, route, summed, to_experts
from tests.support.linear_calls import saved_by
from tests.support.tolerances import RELATIVE, error

EXPERTS = 5
in_each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def tokens(num_tokens=9, top_k=3, sentinels=False):
    """Distinct experts for each token; 5 is none of them."""
    chosen = torch.stack([torch.randperm(EXPERTS)[:top_k] for _ in range(num_tokens)])
    if sentinels:
        chosen[::2, 1] = EXPERTS
    return chosen


@pytest.mark.parametrize("sentinels", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_are_sorted_by_expert(sentinels, dtype):
    chosen = tokens(sentinels=sentinels).to(dtype)
    routing = route(chosen, EXPERTS)
    sorted_ids = chosen.flatten()[routing.order]
    assert (sorted_ids.diff() >= 0).all()
    assert torch.equal(routing.order[routing.inverse], torch.arange(27))
    counts = torch.bincount(chosen.flatten().long(), minlength=EXPERTS)[:EXPERTS]
    assert torch.equal(routing.offsets, counts.cumsum(0).to(torch.int32))
    assert routing.offsets.dtype == torch.int32


def test_a_token_of_equal_experts_keeps_its_order():
    """The sort is stable, so that reruns are equal bit for bit."""
    routing = route(torch.zeros(6, 2, dtype=torch.int64), EXPERTS)
    assert torch.equal(routing.order, torch.arange(12))


@pytest.mark.parametrize("index", [-1, EXPERTS + 1])
def test_what_is_no_expert_is_refused(index):
    chosen = tokens()
    chosen[4, 1] = index
    with pytest.raises(RuntimeError, match=f"index {index} is out of bounds"):
        route(chosen, EXPERTS)


def test_without_tokens():
    routing = route(torch.empty(0, 2, dtype=torch.int64), EXPERTS)
    rows = to_experts(torch.empty(0, 4), routing.tokens)
    assert rows.shape == summed(rows, routing.inverse, 0).shape == (0, 4)
    assert from_experts(rows, torch.empty(0, 2), routing).shape == (0, 4)
    assert torch.equal(routing.offsets, torch.zeros(EXPERTS, dtype=torch.int32))


@in_each_dtype
def test_to_and_from_experts(dtype):
    """With its derivatives, against sums token by token in fp64."""
    chosen = tokens()
    x = torch.randn(9, 4).to(dtype)
    weights = torch.rand(9, 3).to(dtype).requires_grad_()
    grad = torch.randn(9, 4).to(dtype)
    routing = route(chosen, EXPERTS)
    rows = to_experts(x, routing.tokens).requires_grad_()
    assert torch.equal(rows, x[routing.order // 3])
    out = from_experts(rows * 2, weights, routing)
    out.backward(grad)
    total = weights.detach().double().sum(dim=1, keepdim=True)
    assert error(out, 2 * total * x.double()) <= RELATIVE[dtype]
    pairs = 2 * weights.detach().double().unsqueeze(2) * grad.double().unsqueeze(1)
    assert error(rows.grad, pairs.flatten(0, 1)[routing.order]) <= RELATIVE[dtype]
    dot = 2 * (x.double() * grad.double()).sum(dim=1, keepdim=True)
    assert error(weights.grad, dot.expand(9, 3)) <= RELATIVE[dtype] * 4  # the dot product cancels
    assert rows.grad.dtype == weights.grad.dtype == dtype


@in_each_dtype
def test_the_gradient_of_to_experts_is_rounded_once(dtype):
    routing = route(tokens(), EXPERTS)
    grad = torch.randn(27, 4).to(dtype)
    exact = torch.zeros(9, 4).double().index_add(0, routing.tokens, grad.double())
    actual = summed(grad, routing.inverse, 9)
    assert actual.dtype == dtype
    assert error(actual, exact) <= RELATIVE[dtype] / 2


def test_weights_wider_than_the_rows_are_not_rounded():
    """Some models route in fp32 over 16-bit experts: the sum is in the wider dtype."""
    y, weights = torch.randn(6, 4).bfloat16(), torch.rand(2, 3)
    routing = route(torch.tensor([[0, 1, 2], [2, 1, 0]]), EXPERTS)
    out = from_experts(y, weights, routing)
    expected = (y.float()[routing.inverse].view(2, 3, 4) * weights.unsqueeze(2)).sum(1)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


def test_gradcheck():
    routing = route(tokens(4, 2), EXPERTS)
    x, weights = torch.randn(4, 3).double().requires_grad_(), torch.rand(4, 2).double().requires_grad_()

    def function(x, weights):
        return from_experts(to_experts(x, routing.tokens).sin(), weights, routing)

    assert torch.autograd.gradcheck(function, (x, weights))
    assert torch.autograd.gradgradcheck(function, (x, weights))


@pytest.mark.parametrize("trains_router", [True, False])
def test_saves_the_rows_only_for_the_router(trains_router):
    y, weights = torch.randn(6, 4, requires_grad=True), torch.rand(3, 2, requires_grad=trains_router)
    routing = route(torch.tensor([[0, 1], [2, 1], [3, 0]]), EXPERTS)
    saved, _ = saved_by(lambda: from_experts(y, weights, routing))
    assert (y.data_ptr() in saved) == trains_router
