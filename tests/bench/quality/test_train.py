"""A training run of every method on a tiny Llama, and what is measured after it."""

from statistics import mean

import pytest
import torch

import mica.fast
from bench.quality import __main__ as quality
from bench.quality import texts as sources
from bench.quality.train import Candidate, batches, evaluate, probe_losses, same_size_rank, train


def test_losses_of_probes(base, tokenizer):
    prompts = ("The pet of Velma is a", "By trade, Velma is a")

    def token(word):
        return tokenizer(word).input_ids[0]

    with torch.no_grad():
        ids = [torch.tensor([tokenizer(prompt).input_ids]) for prompt in prompts]
        scores = [base(one).logits[0, -1].log_softmax(-1) for one in ids]
    words = [(" wolf", " goat", " fox"), (" nurse", " tailor", " baker")]
    best, worst = (
        [*sorted(some, key=lambda word, score=score: -score[token(word)])]
        for some, score in zip(words, scores, strict=True)
    )
    answers = (best, worst[::-1])  # the right one first: the likeliest, and the least likely
    probes = [sources.Probe(prompts[i], one[0], tuple(one[1:])) for i, one in enumerate(answers)]
    rows = [[token(word) for word in one] for one in answers]
    right = [score[row[0]].item() for score, row in zip(scores, rows, strict=True)]
    among = [score[row].log_softmax(0)[0].item() for score, row in zip(scores, rows, strict=True)]
    losses = probe_losses(base, sources.tokenise(tokenizer, probes))
    assert losses[""] == pytest.approx(-mean(right), rel=1e-5)
    assert losses[", among answers"] == pytest.approx(-mean(among), rel=1e-5)
    assert losses[", recalled"] == 0
    picked = [
        probe_losses(base, sources.tokenise(tokenizer, some))[", picked"] for some in (probes[:1], probes[1:])
    ]
    assert [*picked, losses[", picked"]] == [1, 0, 0.5]
    likeliest = tokenizer.convert_ids_to_tokens(int(scores[0].argmax()))
    known = sources.tokenise(tokenizer, [sources.Probe(prompts[0], f" {likeliest}")])
    assert probe_losses(base, known)[", recalled"] == 1
    assert ", picked" not in probe_losses(base, known)


def test_batches_are_the_same_for_all_and_have_a_block_of_each(texts):
    first, again, other = (torch.stack([*batches(texts.train, 40, seed)]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (40, 4, 32)
    start = 0
    for name, count in sources.BATCH.items():
        blocks, seen = texts.train[name], first[:, start : start + count].flatten(0, 1)
        epoch = seen[: len(blocks)]  # every block once
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, blocks.tolist()))
        start += count


def test_same_size_is_the_closest_rank():
    assert [same_size_rank(r, 49, 100) for r in (1, 2, 3, 16)] == [1, 1, 1, 8]
    assert same_size_rank(16, 60, 100) == 10  # 9.6


def test_a_run_restarts_and_stock_is_stock(base, texts):
    for method in quality.methods(base, 4):
        before = mica.fast.call_counts.total()
        candidate = Candidate(method, base)
        first, _, again = (train(candidate, texts, 1e-2, 3, seed) for seed in (0, 1, 0))
        assert first["losses"] == again["losses"], method.name
        evaluate(candidate.model, texts, candidate.autocast, candidate.context)
        ran = mica.fast.call_counts.total() > before
        assert ran == (method.kind == "mica" and not method.stock), method.name
