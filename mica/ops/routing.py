"""From tokens to rows sorted by expert, and back: what surrounds `mica_experts_linear` in a layer of experts.

Both directions are gathers, in the backward too: a sum over a token's experts has a fixed order, no atomic
addition, and one rounding (index_add, autograd's choice, adds in the dtype of the activations).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mica.ops.operator import save


class Routing(NamedTuple):
    """The order of the rows of S = num_tokens·top_k pairs of a token and an expert.

    Attributes:
        order: Which pair each row is, (S) int64: token·top_k + the expert's place among those of the token.
        inverse: The row in which each pair is, (S) int64.
        tokens: The token of each row, (S) int64.
        offsets: The end of each expert's rows, (num_experts) int32.
        top_k: The number of experts of a token.
    """

    order: Tensor
    inverse: Tensor
    tokens: Tensor
    offsets: Tensor
    top_k: int


def route(top_k_index: Tensor, num_experts: int) -> Routing:
    """The order in which the rows of each expert follow one another.

    Args:
        top_k_index: The experts of each token, (num_tokens, top_k) integers. The number ``num_experts``
            stands for no expert, and its pairs are sorted to the end.
        num_experts: The number of experts.

    Raises:
        RuntimeError: There is another index. On a GPU, where nothing waits for the indices, it is a
            device-side assertion.
    """
    experts = top_k_index.reshape(-1).long()
    order = torch.argsort(experts, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    counts = experts.new_zeros(num_experts + 1)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    offsets = torch.cumsum(counts[:-1], dim=0, dtype=torch.int32)
    top_k = top_k_index.shape[-1]
    return Routing(order, inverse, order // top_k, offsets, top_k)


def to_experts(x: Tensor, tokens: Tensor) -> Tensor:
    """The rows (S, features), sorted by expert, of the tokens.

    Args:
        x: The tokens, (num_tokens, features).
        tokens: The token of each row, which is `Routing.tokens`.
    """
    return x.index_select(0, tokens)


def summed(grad_rows: Tensor, inverse: Tensor, num_tokens: int) -> Tensor:
    """The gradient of `to_experts`, (num_tokens, features).

    Args:
        grad_rows: The gradient of the rows, (S, features).
        inverse: The row of each pair, which is `Routing.inverse`.
        num_tokens: The number of tokens.
    """
    if not num_tokens:
        return grad_rows.new_empty(0, grad_rows.shape[1])
    pairs = grad_rows.index_select(0, inverse)
    return pairs.view(num_tokens, -1, grad_rows.shape[1]).sum(dim=1)


def from_experts(y: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """Σ over a token's experts of weight·y: (num_tokens, features) in the wider dtype of y and weights.

    Args:
        y: The experts' outputs, (S, features), sorted by expert.
        weights: The router's weights, (num_tokens, top_k).
        routing: The order of the rows of y.
    """
    return _FromExperts.apply(y, weights, *routing[:3], routing.top_k)


class _FromExperts(torch.autograd.Function):
    """Keeps y as it came; autograd would keep it in the order of the tokens as well."""

    @staticmethod
    def forward(ctx, y, weights, order, inverse, tokens, top_k):
        save(ctx, y if ctx.needs_input_grad[1] else None, weights, order, inverse, tokens)
        ctx.top_k = top_k
        pairs = y.index_select(0, inverse).view(-1, top_k, y.shape[1])
        return (pairs * weights.unsqueeze(-1)).sum(dim=1)

    @staticmethod
    def backward(ctx, grad_output):
        y, weights, order, inverse, tokens = ctx.saved_tensors
        grad_y = grad_weights = None
        if ctx.needs_input_grad[0]:
            rows = grad_output.index_select(0, tokens)
            grad_y = rows * weights.reshape(-1).index_select(0, order).unsqueeze(-1)
        if y is not None:
            pairs = y.index_select(0, inverse).view(-1, ctx.top_k, y.shape[1])
            grad_weights = (pairs * grad_output.unsqueeze(1)).sum(dim=-1).to(weights.dtype)
        return grad_y, grad_weights, *[None] * 4
