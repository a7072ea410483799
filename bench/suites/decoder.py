"""Forward and backward of decoder blocks without a head, for `bench_block` and `bench_layers`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.support import models


def forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x.requires_grad_()).last_hidden_state


def step(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(y, dx) for the inputs (x, dy); the gradients of A are left in the model."""
    x = inputs[0].detach().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = forward(model, x)
    y.backward(inputs[1])
    return y.detach(), x.grad


def results(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """y, dx and the dA of all layers, in fp32."""
    y, dx = step(model, inputs)
    dA = torch.cat([grad.flatten() for grad in models.gradients(model).values()])
    return {"y": y.float(), "dx": dx.float(), "dA": dA.float()}
