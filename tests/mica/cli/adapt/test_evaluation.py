"""Perplexity against the same by hand."""

import math

import pytest
import torch

from mica.cli.adapt import evaluation
from mica.cli.adapt.evaluation import Likelihood, likelihood
from mica.errors import UsageError
from tests.support.adapt_runs import blocks
from tests.support.tiny_cli import tiny_llama


@torch.no_grad()
def by_hand(model, documents):
    """Token by token: p(token | those before it in the document)."""
    total = 0.0
    count = 0
    for document in documents:
        for position in range(1, len(document)):
            scores = model(document[None, :position]).logits[0, -1].double()
            total -= (scores - scores.logsumexp(0))[document[position]].item()
            count += 1
    return total, count


@pytest.mark.parametrize(("batch_size", "documents"), [(1, False), (2, False), (5, False), (3, True)])
def test_perplexity_by_hand(batch_size, documents, monkeypatch):
    """With ``documents`` there are two in a block, and the first token of neither is predicted."""
    monkeypatch.setattr(evaluation, "_SLICE", 257 * 7)  # 7 rows of logits at a time, and a rest
    model = tiny_llama()
    data = blocks(4, 0, documents=documents, length=16)
    texts = []
    for block in data:
        cut = int((block["labels"] == -100).nonzero()[-1]) if documents else 16
        texts += [part for part in (block["input_ids"][:cut], block["input_ids"][cut:]) if len(part)]
    total, count = by_hand(model, texts)  # with position_ids attention stays within a document
    model.train()
    score = likelihood(model, data, batch_size)
    assert score.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert score.tokens == count == 4 * (14 if documents else 15)
    assert model.training


@torch.no_grad()
def test_perplexity_takes_the_loss_in_fp32():
    model = tiny_llama().bfloat16()
    ids = torch.arange(64).view(2, 32)
    scores = model(ids).logits[:, :-1].double().log_softmax(-1)
    expected = -scores.gather(-1, ids[:, 1:, None]).mean()
    data = [{"input_ids": row, "labels": row} for row in ids]
    assert likelihood(model, data, 2).perplexity == pytest.approx(expected.exp().item(), rel=1e-6)


@pytest.mark.parametrize(("nll", "tokens"), [(math.nan, 3), (math.inf, 3), (1e6, 3), (0.0, 0)])
def test_a_perplexity_that_is_not_finite_is_refused(nll, tokens):
    with pytest.raises(UsageError, match="not finite"):
        _ = Likelihood(nll, tokens).perplexity
