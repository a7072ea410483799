"""Training by the recipe on a tiny Llama, and what is measured."""

import math
from itertools import pairwise
from statistics import mean

import pytest
import torch
from peft.tuners.lora import LoraLayer

import mica.fast
from bench.quality import texts as sources
from bench.quality.recipes import RECIPES, Method
from bench.quality.train import batches, candidate, evaluate, probe_losses, train
from tests.bench.quality.conftest import SMALL


def all_b(model):
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return [layer.lora_B["default"].weight.clone() for layer in layers]


@pytest.mark.parametrize("kind", ["random", "largest"])
def test_another_frozen_b(base, texts, kind):
    """Orthonormal, not MiCA's, frozen in training; the model starts as the base."""
    method = Method(kind, kind, "all-linear", (1e-3,), 4)
    untrained, _ = evaluate(base, texts)
    with candidate(Method("", "mica", "all-linear", (1e-3,), 4), base, 0) as model:
        others = all_b(model)
    drawn = {}
    for seed in (0, 1):
        with candidate(method, base, seed) as model:
            drawn[seed] = all_b(model)
    with candidate(method, base, 0) as model:
        assert evaluate(model, texts)[0] == pytest.approx(untrained, rel=1e-5)
        before = all_b(model)
        train(model, method, texts, 1e-3, 1, 0)
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        after = all_b(model)
    for layer, B, start, same, other, minor in zip(
        layers, after, before, drawn[0], drawn[1], others, strict=True
    ):
        assert torch.equal(B, start)
        assert torch.equal(B, same)
        assert torch.equal(B, other) == (kind == "largest")  # a random B is drawn by the seed
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-5)
        if kind == "largest":
            torch.testing.assert_close(B.T @ minor, torch.zeros(4, 4), rtol=0, atol=1e-4)
            norms = (B.T @ layer.get_base_layer().weight).norm(dim=1)
            assert all(a >= b - 1e-4 for a, b in pairwise(norms.tolist()))
        else:
            assert (B.T @ minor).norm() < 1.9  # 2 if it were MiCA's


@pytest.mark.parametrize("recipe", RECIPES)
def test_loras_a_follows_from_the_seed_as_in_earlier_results(base, recipe):
    """Layer by layer, and nothing else is drawn between or before."""
    with candidate(Method("", "lora", recipe, (1e-3,), 4), base, 3) as model:
        found = [
            one.lora_A["default"].weight.clone() for one in model.modules() if isinstance(one, LoraLayer)
        ]
        state = torch.get_rng_state()
    torch.manual_seed(3)
    for A in found:
        assert torch.equal(A, torch.nn.init.kaiming_uniform_(torch.empty_like(A), a=math.sqrt(5)))
    assert torch.equal(torch.get_rng_state(), state)


def test_losses_of_probes(base, tokenizer):
    """One question whose right answer is the likeliest, and one whose is the least likely."""
    prompts, rows, words = ("The pet of Velma is a", "By trade, Velma is a"), [], []
    for prompt, answers in zip(prompts, (("wolf", "goat", "fox"), ("nurse", "tailor", "baker")), strict=True):
        with torch.no_grad():
            score = base(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1].log_softmax(-1)
        by_word = {word: score[tokenizer(word).input_ids[0]] for word in answers}
        words.append(sorted(answers, key=by_word.get, reverse=not words))
        rows.append(torch.stack([by_word[word] for word in words[-1]]))
        likeliest = tokenizer.convert_ids_to_tokens(int(score.argmax()))
    probes = [
        sources.Probe(prompt, f" {right}", tuple(f" {word}" for word in others))
        for prompt, (right, *others) in zip(prompts, words, strict=True)
    ]
    probes_of = (probes, probes[:1], probes[1:])
    found, right = zip(
        *(probe_losses(base, sources.tokenise(tokenizer, some)) for some in probes_of), strict=True
    )
    among = [row.log_softmax(0)[0].item() for row in rows]
    assert found[0][""] == pytest.approx(-mean(row[0].item() for row in rows), rel=1e-5)
    assert found[0][", among answers"] == pytest.approx(-mean(among), rel=1e-5)
    assert found[0][", recalled"] == 0
    assert [one[", picked"] for one in found] == [0.5, 1, 0]
    assert right == ("10", "1", "0")
    known = sources.tokenise(tokenizer, [sources.Probe(prompts[1], f" {likeliest}")])
    losses, right = probe_losses(base, known)
    assert losses[", recalled"] == 1
    assert ", picked" not in losses
    assert right == ""


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


@pytest.mark.parametrize("method", SMALL, ids=lambda method: method.name)
def test_a_run_follows_its_recipe_and_its_seed(base, texts, monkeypatch, method):
    """Dropout, LoRA's A and the order of the batches follow from the seed alone."""
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
    recipe, before = RECIPES[method.recipe], mica.fast.call_counts.total()

    def losses(seed):
        with candidate(method, base, seed) as model:
            return train(model, method, texts, 1e-3, 4, seed)["losses"]

    first = losses(0)  # 20 steps, 2 of them warm-up
    assert (mica.fast.call_counts.total() > before) == (method.kind not in ("lora", "full"))
    assert norms == [recipe.max_grad_norm] * 20
    assert decay == {recipe.weight_decay}
    left = [(20 - step) / 18 for step in range(2, 20)]
    if recipe.scheduler == "cosine":
        left = [(1 - math.cos(math.pi * share)) / 2 for share in left]
    assert rates == pytest.approx([0.0, 5e-4, *(1e-3 * share for share in left)])
    assert losses(1) != first == losses(0)
    if method.kind == "full":
        return
    with candidate(method, base, 0) as model:
        layers = {name: one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
        trains_b = any("lora_B" in name for name, p in model.named_parameters() if p.requires_grad)
    ends = {name.rpartition(".")[2] for name in layers}
    assert ends == {"q_proj", "v_proj"} or (method.recipe == "all-linear" and len(ends) == 7)
    for layer in layers.values():
        assert (layer.scaling["default"], layer.r["default"]) == (recipe.scaling, method.rank)
        dropout = layer.lora_dropout["default"]
        assert (dropout.p if isinstance(dropout, torch.nn.Dropout) else 0.0) == recipe.dropout
    assert trains_b == (method.kind == "lora")
