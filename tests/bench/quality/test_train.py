"""Training by the recipe on a tiny Llama, and what is measured."""

import math
from statistics import mean

import pytest
import torch
from peft.tuners.lora import LoraLayer

import mica.fast
from bench.quality import texts as sources
from bench.quality.recipes import RECIPES, Method
from bench.quality.train import batches, candidate, probe_losses, train
from tests.bench.quality.conftest import SMALL


def adapted(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def test_the_b_of_the_largest_directions(base):
    with candidate(Method("", "largest", "all-linear", (1e-3,), 4), base, 0) as model:
        for layer in adapted(model):
            B, weight = layer.lora_B["default"].weight, layer.get_base_layer().weight
            expected = torch.linalg.svdvals(weight)[:4].square().diag()
            torch.testing.assert_close(B.T @ weight @ weight.T @ B, expected, rtol=0, atol=1e-5)


def test_losses_of_probes(base, tokenizer):
    """One question whose right answer is the likeliest, and one whose is the second."""
    questions = {"The pet of Velma is a": " wolf| goat| fox", "By trade, Velma is a": " nurse| tailor| baker"}
    probes, right, among = [], [], []
    for prompt, answers in questions.items():
        with torch.no_grad():
            score = base(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1].log_softmax(-1)
        by_answer = {answer: score[tokenizer(answer).input_ids[0]].item() for answer in answers.split("|")}
        others = sorted(by_answer, key=by_answer.get, reverse=True)
        answer = others.pop(len(probes))
        probes.append(sources.Probe(prompt, answer, tuple(others)))
        right.append(by_answer[answer])
        among.append(by_answer[answer] - math.log(sum(map(math.exp, by_answer.values()))))
    likeliest = f" {tokenizer.convert_ids_to_tokens(int(score.argmax()))}"
    losses, picked = probe_losses(base, sources.tokenise(tokenizer, probes))
    assert losses == {
        "": pytest.approx(-mean(right), rel=1e-5),
        ", recalled": 0,
        ", among answers": pytest.approx(-mean(among), rel=1e-5),
        ", picked": 0.5,
    }
    assert picked == "10"
    known = sources.tokenise(tokenizer, [sources.Probe(prompt, likeliest)])
    losses, _ = probe_losses(base, known)
    assert losses == {"": pytest.approx(-score.max().item(), rel=1e-5), ", recalled": 1}


def test_batches_are_the_same_for_all_and_an_epoch_has_each_block_once(texts):
    first, again, other = ([*batches(texts.train, 5, seed)] for seed in (0, 0, 1))
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(torch.stack(first), torch.stack(other))
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat([*texts.train.values()]).tolist())


@pytest.mark.parametrize("method", SMALL, ids=lambda method: method.name)
def test_a_run_follows_its_recipe_and_its_seed(base, texts, monkeypatch, method):
    """Dropout, LoRA's A, a random B and the order of the batches follow from the seed alone."""
    norms, groups = [], []
    clip, step = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def clipped(parameters, norm):
        norms.append(norm)
        return clip(parameters, norm)

    def stepped(self, *args, **kwargs):
        groups.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)

    def losses(seed):
        with candidate(method, base, seed) as model:
            for layer in adapted(model):
                assert (layer.scaling["default"], layer.r["default"]) == (recipe.scaling, method.rank)
                assert getattr(layer.lora_dropout["default"], "p", 0.0) == recipe.dropout
                assert layer.lora_B["default"].weight.requires_grad == (method.kind == "lora")
            return train(model, method, texts, 1e-3, 4, seed)["losses"]

    recipe, before = RECIPES[method.recipe], mica.fast.call_counts.total()
    first = losses(0)  # 20 steps, 2 of them warm-up
    assert (mica.fast.call_counts.total() > before) == (method.kind not in ("lora", "full"))
    assert norms == [recipe.max_grad_norm] * 20
    left = [(20 - step) / 18 for step in range(2, 20)]
    if recipe.scheduler == "cosine":
        left = [(1 - math.cos(math.pi * share)) / 2 for share in left]
    rates = [0.0, 5e-4, *(1e-3 * share for share in left)]
    assert groups == [pytest.approx((rate, recipe.weight_decay)) for rate in rates]
    assert losses(1) != first == losses(0)
