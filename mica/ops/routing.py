"""From tokens to rows sorted by expert, and back: what surrounds `mica_experts_linear` in a layer of experts.

Both directions are gathers, in the backward too: a sum over a token's experts has a fixed order, no atomic
addition, and one rounding (index_add, autograd's choice, adds in the dtype of the activations).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The order of the rows of S = num_tokens·top_k (token, expert) pairs."""

    order: Tensor  # (S) int64: which pair a row is, token·top_k + its place among the token's experts
    inverse: Tensor  # (S) int64: in which row a pair is
    offsets: Tensor  # (num_experts) int32: the end of each expert's rows
    top_k: int


def route(top_k_index: Tensor, num_experts: int) -> Routing:
    """top_k_index: (num_tokens, top_k) integers; num_experts or more is no expert, and sorted to the end."""
    experts = top_k_index.reshape(-1)
    ids, order = torch.sort(experts, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    all_experts = torch.arange(num_experts, dtype=ids.dtype, device=ids.device)
    offsets = torch.searchsorted(ids, all_experts, right=True, out_int32=True)
    return Routing(order, inverse, offsets, top_k_index.shape[-1])


def to_experts(x: Tensor, routing: Routing) -> Tensor:
    """The rows (S, features) of tokens x (num_tokens, features), sorted by expert."""
    return _ToExperts.apply(x, routing.order, routing.inverse, routing.top_k)


def from_experts(y: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """Σ over a token's experts of weight·y: (num_tokens, features) in the wider dtype of y and weights.

    y: (S, features) sorted by expert; weights: (num_tokens, top_k).
    """
    return _FromExperts.apply(y, weights, routing.order, routing.inverse, routing.top_k)


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, inverse, top_k):
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx, grad_rows):
        (inverse,) = ctx.saved_tensors
        pairs = grad_rows.index_select(0, inverse)
        return pairs.view(-1, ctx.top_k, grad_rows.shape[1]).sum(dim=1), None, None, None


class _FromExperts(torch.autograd.Function):
    """Keeps y as it came; autograd would keep it in the order of the tokens as well."""

    @staticmethod
    def forward(ctx, y, weights, order, inverse, top_k):
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weights, order, inverse)
        ctx.top_k = top_k
        pairs = y.index_select(0, inverse).view(-1, top_k, y.shape[1])
        return _weighted(pairs, weights).sum(dim=1)

    @staticmethod
    def backward(ctx, grad_output):
        y, weights, order, inverse = ctx.saved_tensors
        grad_y = grad_weights = None
        if ctx.needs_input_grad[0]:
            rows = grad_output.index_select(0, order // ctx.top_k)
            grad_y = _weighted(rows, weights.reshape(-1).index_select(0, order))
        if y is not None:
            pairs = y.index_select(0, inverse).view(-1, ctx.top_k, y.shape[1])
            grad_weights = (pairs * grad_output.unsqueeze(1)).sum(dim=-1).to(weights.dtype)
        return grad_y, grad_weights, None, None, None


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    return rows * weights.unsqueeze(-1)
