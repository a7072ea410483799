"""A training run of every method on a tiny Llama, and what is measured after it."""

import math
from statistics import mean

import pytest
import torch
from peft.tuners.lora import LoraLayer

import mica.fast
from bench.quality import texts as sources
from bench.quality.recipes import RECIPES, methods
from bench.quality.train import Candidate, batches, probe_losses, train


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


def test_a_run_restarts(base, texts):
    """Dropout, LoRA's A and the order of the batches follow from the seed alone."""
    for method in methods(4):
        before = mica.fast.call_counts.total()
        candidate = Candidate(method, base)
        first, other, again = (train(candidate, texts, 1e-3, 1, seed) for seed in (0, 1, 0))
        assert first["losses"] == again["losses"] != other["losses"], method.name
        assert (mica.fast.call_counts.total() > before) == (method.kind == "mica"), method.name


def test_adapters_are_those_of_the_recipe(base):
    for method in methods(4)[:4]:
        candidate, recipe = Candidate(method, base), RECIPES[method.recipe]
        layers = {name: one for name, one in candidate.model.named_modules() if isinstance(one, LoraLayer)}
        ends = {name.rpartition(".")[2] for name in layers}
        assert ends == {"q_proj", "v_proj"} or (method.recipe == "all-linear" and len(ends) == 7)
        for layer in layers.values():
            assert layer.scaling["default"] == recipe.scaling
            assert layer.r["default"] == method.rank
            dropout = layer.lora_dropout["default"]
            assert (dropout.p if isinstance(dropout, torch.nn.Dropout) else 0.0) == recipe.dropout
        frozen = any("lora_B" in name for name, p in candidate.model.named_parameters() if p.requires_grad)
        assert frozen == (method.kind == "lora")


@pytest.mark.parametrize("name", RECIPES)
def test_training_follows_the_recipe(base, texts, monkeypatch, name):
    (method, *_) = (one for one in methods(4) if one.recipe == name)
    norms, rates, decay = [], [], set()
    clip, step = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def clipped(parameters, norm):
        norms.append(norm)
        return clip(parameters, norm)

    def stepped(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        decay.add(self.param_groups[0]["weight_decay"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    train(Candidate(method, base), texts, 1e-3, 4, 0)  # 20 steps, 2 of them warm-up
    recipe = RECIPES[name]
    assert norms == [recipe.max_grad_norm] * 20
    assert decay == {recipe.weight_decay}
    left = [(20 - step) / 18 for step in range(2, 20)]
    if recipe.scheduler == "cosine":
        left = [(1 - math.cos(math.pi * share)) / 2 for share in left]
    assert rates == pytest.approx([0.0, 5e-4, *(1e-3 * share for share in left)])
