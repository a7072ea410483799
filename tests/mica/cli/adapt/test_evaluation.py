"""Perplexity against the same by hand."""

import math

import pytest
import torch

from mica.cli.adapt import evaluation
from mica.cli.adapt.evaluation import Likelihood, likelihood
from mica.errors import UsageError
from tests.support.adapt_runs import blocks
from tests.support.tiny_cli import tiny_llama


def logits_of(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more).logits


def by_hand(model, documents):
    """Token by token: p(token | those before it in the document)."""
    total = 0.0
    count = 0
    for document in documents:
        for position in range(1, len(document)):
            scores = logits_of(model, document[None, :position])[0, -1].double()
            total -= (scores - scores.logsumexp(0))[document[position]].item()
            count += 1
    return total, count


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_by_hand(batch_size, monkeypatch):
    monkeypatch.setattr(evaluation, "_SLICE", 257 * 7)  # 7 rows of logits at a time, and a rest
    model = tiny_llama()
    data = blocks(3, 0, documents=False, length=16)
    total, count = by_hand(model, [block["input_ids"] for block in data])
    model.train()
    score = likelihood(model, data, batch_size)
    assert score.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert score.tokens == count == 45
    assert model.training


def test_the_first_token_of_a_document_is_not_predicted():
    model = tiny_llama()
    data = blocks(4, 0, documents=True, length=16)
    cuts = [int((block["labels"] == -100).nonzero()[-1]) for block in data]
    ids = [block["input_ids"] for block in data]
    documents = [part for row, cut in zip(ids, cuts, strict=True) for part in (row[:cut], row[cut:])]
    total, count = by_hand(model, documents)  # with position_ids attention stays within a document
    score = likelihood(model, data, 3)
    assert score.tokens == count == 4 * 14
    assert score.nll == pytest.approx(total, rel=1e-6)


def test_perplexity_takes_the_loss_in_fp32():
    model = tiny_llama().bfloat16()
    ids = torch.arange(64).view(2, 32)
    scores = logits_of(model, ids)[:, :-1].double().log_softmax(-1)
    expected = -scores.gather(-1, ids[:, 1:, None]).mean()
    data = [{"input_ids": row, "labels": row} for row in ids]
    assert likelihood(model, data, 2).perplexity == pytest.approx(expected.exp().item(), rel=1e-6)


@pytest.mark.parametrize(("nll", "tokens"), [(math.nan, 3), (math.inf, 3), (1e6, 3), (0.0, 0)])
def test_a_perplexity_that_is_not_finite_is_refused(nll, tokens):
    with pytest.raises(UsageError, match="not finite"):
        _ = Likelihood(nll, tokens).perplexity
