"""`bench.quality` end to end on a tiny Llama: training by the recipe, a file after every run, resumption."""

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import mean

import pytest
import torch
from peft.tuners.lora import LoraLayer

import mica.fast
from bench.quality import energy, runs
from bench.quality import texts as sources
from bench.quality.recipes import METHODS, RECIPES, Method
from bench.quality.schedule import KNOWN, VALIDATION, missing, rates_that_count
from bench.quality.store import resume, save
from bench.quality.train import Candidate, batches, evaluate, probe_losses, train

SETTINGS = {"epochs": 1, "rounds": 2, "rates": 1, "seeds": 2, "length": 32, "people": 8}
SMALL = [  # ranks that a tiny model has
    Method(one.name, one.kind, one.recipe, one.rates, one.rank and one.rank // 4)
    for one in METHODS
    if one.rank not in (64, 128)
]
LEARNED = dict.fromkeys((*KNOWN, VALIDATION), 1.0)


@pytest.fixture(scope="module")
def begin(texts):
    """() -> a result without runs, like that of the command."""

    def begin():
        head = {"machine": {"cpu": "a machine", "threads": 2}, "starts": [{"commit": "abc"}], "model": "tiny"}
        result = runs.start(texts, SETTINGS | {"eval_blocks": 2}, **head)
        assert result["plan"].keys() == {one.name for one in METHODS}
        return result | {"plan": {one.name: one.facts() for one in SMALL}}

    return begin


@pytest.fixture(scope="module")
def finished(base, texts, begin):
    """A whole experiment, which leaves the base model as it was; not to be changed."""
    result, before = begin(), {name: value.clone() for name, value in base.state_dict().items()}
    runs.experiment(base, texts, result, lambda result: None)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    return result


def untimed(result):
    """The runs without what differs between machines and moments."""
    return [{key: one[key] for key in one if not key.endswith("seconds")} for one in result["runs"]]


def test_every_method_has_its_rates_and_seeds_and_size(base, finished):
    assert missing(finished) == []
    for method in SMALL:
        runs = [one for one in finished["runs"] if one["method"] == method.name]
        assert [(one["rate"], one["seed"]) for one in runs] == [
            (method.rates[1], 0),
            *((rate, 1) for rate in rates_that_count(finished, method.name)),
        ]
        for run in runs:
            steps = [one["step"] for one in run["points"]]
            assert steps == [math.ceil(len(run["losses"]) * stop) for stop in (0.25, 0.5, 1)]
    trained = {name: one["trained_parameters"] for name, one in finished["methods"].items()}
    assert trained["full fine-tuning"] == sum(p.numel() for p in base.parameters())
    assert (
        trained["MiCA by the paper, r = 16"]
        == 2 * base.config.num_hidden_layers * 4 * base.config.hidden_size
    )
    frozen = {trained[one.name] for one in SMALL if one.rank == 4 and one.recipe == "all-linear"}
    assert frozen == {trained["MiCA, r = 16"], trained["LoRA, r = 16"]}
    assert trained["MiCA, r = 16"] < trained["LoRA, r = 16"] < trained["LoRA, r = 32"]


@pytest.mark.parametrize("kind", ["random", "largest"])
def test_another_frozen_b(base, texts, kind):
    """Orthonormal, not MiCA's, frozen in training; the model starts as the base."""
    method = Method(kind, kind, "all-linear", (1e-3,), 4)
    candidate, mica_s = Candidate(method, base), Candidate(Method("", "mica", "all-linear", (1e-3,), 4), base)
    assert evaluate(candidate.model, texts) == pytest.approx(evaluate(base, texts), rel=1e-5)
    layers, others = (
        [module for module in one.model.modules() if isinstance(module, LoraLayer)]
        for one in (candidate, mica_s)
    )
    before = [layer.lora_B["default"].weight.clone() for layer in layers]
    train(candidate, texts, 1e-3, 1, 0)
    for layer, other, start in zip(layers, others, before, strict=True):
        B = layer.lora_B["default"].weight
        assert torch.equal(B, start)
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-5)
        minor = other.lora_B["default"].weight
        if kind == "largest":
            torch.testing.assert_close(B.T @ minor, torch.zeros(4, 4), rtol=0, atol=1e-4)
            norms = (B.T @ layer.get_base_layer().weight).norm(dim=1)
            assert all(a >= b - 1e-4 for a, b in pairwise(norms.tolist()))
        else:
            assert (B.T @ minor).norm() < 1.9  # 2 if it were MiCA's
    assert candidate.facts()["trained_parameters"] == mica_s.facts()["trained_parameters"]


def test_energy_of_updates(base, texts, monkeypatch):
    monkeypatch.setattr(energy, "RANKS", (2, 4))
    monkeypatch.setattr(energy, "TRAINED", {"MiCA": Method("MiCA", "mica", "all-linear", (1e-3,), 4)})
    result = energy.experiment(base, texts, 1)
    layers = result["layers"]
    assert layers.keys() == result["evaluations"].keys() == {energy.GRADIENT, "MiCA"}
    assert len(layers["MiCA"]) == 7 * base.config.num_hidden_layers
    for of_mica, of_gradient in zip(layers["MiCA"].values(), layers[energy.GRADIENT].values(), strict=True):
        assert of_mica["smallest"][4] == pytest.approx(1, abs=1e-5)  # what MiCA changes lies there
        assert of_mica["largest"][4] == pytest.approx(0, abs=1e-5)
        assert sum(of_gradient["tenths"]) <= 1 + 1e-9
        assert 0 < of_gradient["smallest"][2] < of_gradient["smallest"][4]
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(base, texts, begin, finished, tmp_path):
    path, result = tmp_path / "run.json", begin()

    class Killed(BaseException):
        """Not an Exception, like what ends a process."""

    def keep(result):
        save(path, result)
        if len(result["runs"]) in (3, 8):
            raise Killed

    for done in (3, 8):
        with pytest.raises(Killed):
            runs.experiment(base, texts, result, keep)
        result = resume(path, begin())
        assert len(result["runs"]) == done
    runs.experiment(base, texts, result, lambda result: save(path, result))
    assert untimed(json.loads(path.read_text())) == untimed(finished)
    assert len(result["starts"]) == 3


def test_the_budget_ends_before_a_run_that_would_not_fit(base, texts, begin, monkeypatch, capsys):
    now, result = [0.0], begin()

    def measure(base, texts, result, planned):
        now[0] += 40
        run = planned._asdict() | {"diverged": "made up", "points": [], "wall_seconds": 40.0}
        return result["plan"][planned.method], run

    monkeypatch.setattr(runs, "measure", measure)
    runs.experiment(base, texts, result, lambda result: None, 100, lambda: now[0])
    assert len(result["runs"]) == 2  # the third would end at 120
    ended = capsys.readouterr().out.splitlines()[-1]
    assert ended == f"the budget is used up: no time for {SMALL[2].name}, rate {SMALL[2].rates[1]:g}"


def test_a_pool_has_so_many_runs_at_once_and_the_seeds_wait_for_all_rates(base, texts, begin, monkeypatch):
    """Runs end in another order than they began; the last of the first seeds is the slowest."""
    under_way, most, seen, lock = set(), 0, [], threading.Lock()
    slowest = (SMALL[-1].name, 0)

    def measure(base, texts, result, one):
        nonlocal most
        with lock:
            under_way.add(one)
            most = max(most, len(under_way))
            seen.append((one.method, one.seed))
        time.sleep(0.2 if (one.method, one.seed) == slowest else 0.01)
        with lock:
            under_way.remove(one)
        points = [{"step": 1, "evaluation": LEARNED}]
        run = one._asdict() | {"diverged": None, "points": points, "seconds": [1.0], "losses": [1.0]}
        return result["plan"][one.method], run | {"wall_seconds": 1.0}

    monkeypatch.setattr(runs, "measure", measure)
    monkeypatch.setattr(runs, "_loaded", [base, texts])
    result, kept = begin() | {"base": dict.fromkeys(LEARNED, 2.0)}, []
    with ThreadPoolExecutor(3) as pool:
        runs.experiment(base, texts, result, lambda one: kept.append(len(one["runs"])), pool=pool, at_once=3)
    assert most == 3
    assert seen.index((SMALL[0].name, 1)) > seen.index(slowest)
    assert sorted(seen) == sorted((one.name, seed) for one in SMALL for seed in (0, 1))
    assert missing(result) == []
    assert kept == [*range(1, len(seen) + 1)]


def test_a_diverged_run_is_named_and_not_chosen(base, texts, begin):
    result = begin()
    result["plan"] = {"LoRA": Method("LoRA", "lora", "paper", (1e-3, 1e30), 4).facts()}
    runs.experiment(base, texts, result, lambda result: None)
    json.dumps(result, allow_nan=False)
    (run,) = result["runs"]  # no further seed
    assert run["diverged"] == "loss on 'prose, validation' after step 2: nan"
    assert run["points"] == []


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
    found = [probe_losses(base, sources.tokenise(tokenizer, some)) for some in probes_of]
    among = [row.log_softmax(0)[0].item() for row in rows]
    assert found[0][""] == pytest.approx(-mean(row[0].item() for row in rows), rel=1e-5)
    assert found[0][", among answers"] == pytest.approx(-mean(among), rel=1e-5)
    assert found[0][", recalled"] == 0
    assert [one[", picked"] for one in found] == [0.5, 1, 0]
    known = sources.tokenise(tokenizer, [sources.Probe(prompts[1], f" {likeliest}")])
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


@pytest.mark.parametrize("method", SMALL, ids=lambda method: method.name)
def test_a_run_follows_its_recipe_and_restarts(base, texts, monkeypatch, method):
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
    before, candidate, recipe = mica.fast.call_counts.total(), Candidate(method, base), RECIPES[method.recipe]
    first = train(candidate, texts, 1e-3, 4, 0)  # 20 steps, 2 of them warm-up
    assert (mica.fast.call_counts.total() > before) == (method.kind not in ("lora", "full"))
    assert norms == [recipe.max_grad_norm] * 20
    assert decay == {recipe.weight_decay}
    left = [(20 - step) / 18 for step in range(2, 20)]
    if recipe.scheduler == "cosine":
        left = [(1 - math.cos(math.pi * share)) / 2 for share in left]
    assert rates == pytest.approx([0.0, 5e-4, *(1e-3 * share for share in left)])
    other, again = (train(candidate, texts, 1e-3, 4, seed) for seed in (1, 0))
    assert first["losses"] == again["losses"] != other["losses"]
    if method.kind == "full":
        return
    layers = {name: one for name, one in candidate.model.named_modules() if isinstance(one, LoraLayer)}
    ends = {name.rpartition(".")[2] for name in layers}
    assert ends == {"q_proj", "v_proj"} or (method.recipe == "all-linear" and len(ends) == 7)
    for layer in layers.values():
        assert (layer.scaling["default"], layer.r["default"]) == (recipe.scaling, method.rank)
        dropout = layer.lora_dropout["default"]
        assert (dropout.p if isinstance(dropout, torch.nn.Dropout) else 0.0) == recipe.dropout
    frozen = any("lora_B" in name for name, p in candidate.model.named_parameters() if p.requires_grad)
    assert frozen == (method.kind == "lora")
