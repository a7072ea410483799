"""The definition against an independent one: the dense update s·B·A, and autograd."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import definition, expert_cases
from tests.support.kernel_cases import seed_of
from tests.support.oracle import dropout_mask, problem
from tests.support.tolerances import RELATIVE, error

FP64 = torch.float64


def dense(x, weight, lora_A, lora_B, scaling, bias, mask):
    """y of the weight with its update, where x is dropped before the update alone."""
    update = scaling * (lora_B @ lora_A)
    return F.linear(x, weight, bias) + F.linear(x * mask, update)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("tokens", [(7,), (2, 3)], ids=str)
def test_a_layer_is_the_dense_update_and_its_gradients(tokens, dropout_p):
    p = problem(tokens, 11, 6, 3, FP64)
    mask = dropout_mask(p.x, dropout_p, seed_of(7))
    x = p.x.detach().requires_grad_()
    lora_A = p.lora_A.detach().requires_grad_()
    lora_B = p.lora_B.detach().requires_grad_()
    expected = dense(x, p.weight, lora_A, lora_B, p.scaling, p.bias, mask)
    expected_grads = torch.autograd.grad(expected, (x, lora_A, lora_B), p.grad_output)

    factors = p.weight, p.lora_A, p.lora_B, p.scaling
    y = definition.linear(p.x, *factors, p.bias, mask)
    grads = definition.linear_backward(p.grad_output, p.x, *factors, mask)
    for actual, truth in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert error(actual, truth) <= RELATIVE[FP64]


def test_each_expert_is_a_layer_of_its_own():
    """With experts without rows, and rows of no expert."""
    p = expert_cases.problem("tiles", 11, 6, 3, FP64, FP64)
    x = p.x.detach().requires_grad_()
    lora_A = p.lora_A.detach().requires_grad_()
    lora_B = p.lora_B.detach().requires_grad_()
    weights = p.weight + p.scaling * (lora_B @ lora_A)
    expected = torch.zeros_like(p.grad_output)
    start = 0
    for expert, end in enumerate(p.offsets.tolist()):
        expected[start:end] = F.linear(x[start:end], weights[expert], p.bias[expert])
        start = end
    expected_grads = torch.autograd.grad(expected, (x, lora_A, lora_B), p.grad_output)

    factors = p.weight, p.lora_A, p.lora_B, p.scaling
    y = definition.experts_linear(p.x, p.offsets, *factors, p.bias)
    grads = definition.experts_linear_backward(p.grad_output, p.x, p.offsets, *factors)
    for actual, truth in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert error(actual, truth) <= RELATIVE[FP64]
