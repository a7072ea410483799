"""``python -m bench.quality.energy``: how much of what training changes lies where MiCA can change anything.

MiCA adds B·A to W, where B (out, r) are the left singular vectors of W with the smallest singular values: of
an update ΔW it can make no more than B Bᵀ ΔW. So this trains SmolLM2-135M as `bench.quality` does, by full
fine-tuning and by LoRA, and measures for every linear layer the share ‖Uᵢᵀ ΔW‖² / ‖ΔW‖² along each tenth of
the left singular vectors U of W, and along the r smallest and largest ones. The gradient before training is
what MiCA's A sees of the loss in its first step. A share is to be compared with that of as many random
directions, their number over ``out``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import mean

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn

from bench.measure.machine import facts, output
from bench.quality.picture import trade_off
from bench.quality.recipes import OPTIONS, Method
from bench.quality.runs import load
from bench.quality.texts import Texts
from bench.quality.train import batches, candidate, evaluate, steps_per_epoch, train
from mica.cli.targets import ALL_LINEAR, find_targets

GRADIENT, FULL, LORA = "gradient before training", "full fine-tuning", "LoRA, r = 16"
# Rates at which the study's methods learn the new facts
TRAINED = {
    FULL: Method(FULL, "full", "all-linear", (2e-4,)),
    LORA: Method(LORA, "lora", "all-linear", (2e-3,), 16),
}
RANKS, PARTS = (16, 64, 128), 10


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that "all-linear" adapts: all but the output layer's."""
    return {name: module.weight for name, module in find_targets(model, ALL_LINEAR).modules.items()}


def shares(basis: Tensor, update: Tensor) -> dict:
    """Shares of the energy of ``update`` (out, in) along the columns of ``basis`` (out, n), largest first.

    "tenths": along each tenth of the columns; "smallest", "largest": rank -> along so many; "random": rank ->
    along as many random directions, and "tenth".
    """
    out_features, count = basis.shape
    along = (basis.T @ update.double()).square().sum(1) / update.double().square().sum()
    edges = [round(part * count / PARTS) for part in range(PARTS + 1)]
    return {
        "tenths": [along[a:b].sum().item() for a, b in itertools.pairwise(edges)],
        "smallest": {rank: along[-rank:].sum().item() for rank in RANKS},
        "largest": {rank: along[:rank].sum().item() for rank in RANKS},
        "random": {rank: rank / out_features for rank in RANKS} | {"tenth": count / PARTS / out_features},
    }


def measured(weights: dict[str, Tensor], update_of: Callable[[str], Tensor]) -> dict[str, dict]:
    """By layer. ``weights``: before training."""
    found = {}
    for name, weight in weights.items():
        basis = torch.linalg.svd(weight.detach().double(), full_matrices=False)[0]
        found[name] = shares(basis, update_of(name).detach())
    return found


def gradients(base: nn.Module, texts: Texts) -> dict[str, Tensor]:
    """Gradients of the sum of an epoch's losses, by layer."""
    model = base.train().requires_grad_(True)
    for batch in batches(texts.train, steps_per_epoch(texts.train), seed=0):
        model(input_ids=batch, labels=batch).loss.backward()
    found = {name: weight.grad for name, weight in linear_weights(model).items()}
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return found


def update_by(kind: str, model: nn.Module, weights: dict[str, Tensor]) -> Callable[[str], Tensor]:
    """name -> what training has added to the weight."""
    if kind == "full":
        return lambda name: model.get_submodule(name).weight - weights[name]
    return lambda name: model.base_model.model.get_submodule(name).get_delta_weight("default")


def experiment(base: nn.Module, texts: Texts, epochs: int) -> dict:
    """{"layers": update -> layer -> `shares`, "evaluations": update -> what was learned}."""
    weights = linear_weights(base)
    grads = gradients(base, texts)
    layers = {GRADIENT: measured(weights, grads.__getitem__)}
    evaluations = {GRADIENT: evaluate(base, texts)[0]}
    for name, method in TRAINED.items():
        with candidate(method, base, seed=0) as model:
            run = train(model, method, texts, method.rates[0], epochs, seed=0)
            evaluations[name], _ = evaluate(model, texts)
            print(f"{name}: training loss {run['losses'][0]:.3f} to {run['losses'][-1]:.3f}", flush=True)
            layers[name] = measured(weights, update_by(method.kind, model, weights))
    return {"layers": layers, "evaluations": evaluations}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.energy", allow_abbrev=False)
    parser.add_argument("--name", default=f"{date.today()}-energy", help="of the result file")
    parser.add_argument("--output", type=Path, default=output(), help="folder")
    args = parser.parse_args(argv)
    settings = {name: default for name, (default, _) in OPTIONS.items()}
    base, texts = load(settings)
    plan = {name: method._asdict() for name, method in TRAINED.items()}
    head = {"machine": facts(), "settings": settings, "texts": texts.about, "methods": plan}
    result = head | experiment(base, texts, settings["epochs"])
    path = args.output / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # 210 layers have 60 numbers each: three digits
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.3g}"))
    path.write_text(json.dumps(rounded) + "\n", encoding="utf-8")
    print(f"result in {path}")


def rows(result: dict) -> list[list[str]]:
    """The mean over all layers of a kind: their share over that of as many random directions."""
    layers = result["layers"]
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in layers[FULL])
    table = [["along 16 directions, random ones: 1", "smallest or largest", *(f"`{kind}`" for kind in kinds)]]
    for update, found in layers.items():
        for which in ("smallest", "largest"):
            by_kind = ([one for name, one in found.items() if name.endswith(kind)] for kind in kinds)
            means = (mean(one[which]["16"] / one["random"]["16"] for one in own) for own in by_kind)
            table.append([update, which, *(f"{value:.1f}" for value in means)])
    return table


def profiles(result: dict) -> dict[str, list[tuple[int, float]]]:
    """update -> (number of the tenth, energy along it over that along as many random directions), means."""
    found = {}
    for update, layers in result["layers"].items():
        of_layers = ([ten / one["random"]["tenth"] for ten in one["tenths"]] for one in layers.values())
        found[update] = [*enumerate(map(mean, zip(*of_layers, strict=True)), 1)]
    return found | {"random directions": [(1, 1.0), (PARTS, 1.0)]}


def picture(result: dict, path: Path) -> None:
    title = "Where updates lie, by the singular values of the weight"
    tenths = "tenth of the left singular vectors: 1 the largest, 10 the smallest"
    trade_off(profiles(result), path, title, tenths, "energy, random directions: 1")


if __name__ == "__main__":
    main()
