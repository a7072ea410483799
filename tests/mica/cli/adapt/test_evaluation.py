"""Perplexity against the same by hand."""

import math

import pytest
import torch

from mica.cli.adapt.evaluation import perplexity
from tests.support.tiny_cli import tiny_llama


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_by_hand(batch_size):
    model = tiny_llama()
    blocks = torch.randint(0, 257, (3, 16), generator=torch.Generator().manual_seed(0))
    total = 0.0
    for block in blocks:  # token by token: p(token | those before it in the block)
        for position in range(1, 16):
            scores = logits_of(model, block[None, :position])[0, -1].double()
            total -= (scores - scores.logsumexp(0))[block[position]].item()
    model.train()
    assert perplexity(model, blocks, batch_size) == pytest.approx(math.exp(total / 45), rel=1e-5)
    assert model.training


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_perplexity_takes_the_loss_in_fp32():
    model = tiny_llama().bfloat16()
    blocks = torch.arange(64).view(2, 32)
    scores = logits_of(model, blocks)[:, :-1].double().log_softmax(-1)
    expected = -scores.gather(-1, blocks[:, 1:, None]).mean()
    assert perplexity(model, blocks, 2) == pytest.approx(expected.exp().item(), rel=1e-6)
