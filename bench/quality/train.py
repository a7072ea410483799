"""The models that `bench.quality` compares, a training run, and what is measured after it."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from bench.quality.recipes import RECIPES, Method
from bench.quality.texts import BATCH, Texts, TokenisedProbes
from mica.cli.compare.models import built, random_basis, replace_b

PROBE_BATCH = 16


def largest_basis(layer: LoraLayer, rank: int) -> torch.Tensor:
    """(out, rank): the left singular vectors with the largest singular values."""
    weight = layer.get_base_layer().weight
    return torch.linalg.svd(weight, full_matrices=False)[0][:, :rank]


OTHER_B = {"random": random_basis, "largest": largest_basis}  # in place of MiCA's


@contextmanager
def candidate(method: Method, base: nn.Module, seed: int) -> Iterator[nn.Module]:
    """The model that ``method`` trains, an adapter on ``base`` or a copy of it: see `built`.

    ``seed`` draws LoRA's A, a random B and the dropout.
    """
    recipe, rank = RECIPES[method.recipe], method.rank or 0
    targets = recipe.target_modules
    args = argparse.Namespace(
        rank=rank,
        alpha=recipe.scaling * rank,
        dropout=recipe.dropout,
        target_modules=targets if isinstance(targets, str) else ",".join(targets),
        experts=None,
        seed=seed,
    )
    with built("mica" if method.kind in OTHER_B else method.kind, base, args) as model:
        if method.kind in OTHER_B:
            torch.manual_seed(seed)
            replace_b(model, OTHER_B[method.kind])
        torch.manual_seed(seed)
        if method.kind == "lora":  # PEFT's first draw depends on how it builds a layer
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.reset_lora_parameters("default", True)
        yield model


def steps_per_epoch(train: dict[str, torch.Tensor]) -> int:
    (steps,) = {len(blocks) // BATCH[name] for name, blocks in train.items()}
    return steps


def batches(train: dict[str, torch.Tensor], steps: int, seed: int) -> Iterator[torch.Tensor]:
    """``steps`` batches, (sum of `BATCH`, length) int64: `BATCH` blocks of every text, each text in random
    order and reshuffled once all its blocks were seen."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for name, blocks in train.items():
        epochs = math.ceil(steps * BATCH[name] / len(blocks))
        order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(epochs)])
        drawn.append(blocks[order[: steps * BATCH[name]]].split(BATCH[name]))
    for parts in zip(*drawn, strict=True):
        yield torch.cat(parts)


def train(
    model, method: Method, texts: Texts, rate: float, epochs: int, seed: int, stops: Iterable[float] = ()
) -> dict:
    """Train a `candidate` by its recipe: AdamW, warm-up, decay, gradients clipped. ``seed``: of the batches.

    Returns the loss (nats per token) and the seconds of every step, and under "points" the losses
    ("evaluation") and the answers ("right") that `evaluate` gives after each of these shares of the steps.
    A loss that is not finite ends the run, and is noted under "diverged"; what was measured before counts.
    """
    model.train()
    model.config.use_cache = False
    recipe = RECIPES[method.recipe]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = epochs * steps_per_epoch(texts.train)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=recipe.weight_decay)
    schedule = get_scheduler(recipe.scheduler, optimizer, math.ceil(recipe.warm_up * steps), steps)
    run: dict = {"diverged": None, "losses": [], "seconds": [], "points": []}
    measured = {math.ceil(stop * steps) for stop in stops}

    for step, batch in enumerate(batches(texts.train, steps, seed)):
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        if not math.isfinite(value := loss.item()):
            run["diverged"] = f"training loss {value} at step {step + 1}"
            return run
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        run["seconds"].append(round(time.perf_counter() - start, 4))
        run["losses"].append(value)
        if step + 1 in measured:
            evaluation, right = evaluate(model, texts)
            bad = [name for name, value in evaluation.items() if not math.isfinite(value)]
            if bad:
                run["diverged"] = f"loss on '{bad[0]}' after step {step + 1}: {evaluation[bad[0]]}"
                return run
            run["points"].append({"step": step + 1, "evaluation": evaluation, "right": right})
    return run


@torch.no_grad()
def evaluate(model, texts: Texts) -> tuple[dict[str, float], dict[str, str]]:
    """Losses, and for each set of questions with other answers which of them were answered rightly.

    Every loss is in nats per token. For probes, "NAME" is the loss of the answer and "NAME, recalled" the
    share whose whole answer is the likeliest. With other answers: "NAME, among answers" is the loss of the
    right one when only these are possible, "NAME, picked" the share where it is the likeliest of them. The
    second dictionary has a string by NAME, one character a question: "1" where it was picked, else "0".
    """
    was_training = model.training
    model.eval()
    losses = {}
    for name, blocks in texts.prose.items():
        each = [model(input_ids=b, labels=b).loss.double().item() for b in blocks.split(1)]
        losses[name] = sum(each) / len(each)  # all blocks have the same length
    answers = {}
    for name, probes in texts.probes.items():
        found, right = probe_losses(model, probes)
        losses |= {f"{name}{ending}": value for ending, value in found.items()}
        if right:
            answers[name] = right
    model.train(was_training)
    return losses, answers


def probe_losses(model, probes: TokenisedProbes) -> tuple[dict[str, float], str]:
    """Ending of the name, see `evaluate` -> value; and which were picked ("" if there is no choice)."""
    loss, among = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    recalled, picked = 0, []
    for tokens, is_answer, candidates in zip(*(one.split(PROBE_BATCH) for one in probes), strict=True):
        logits = model(input_ids=tokens).logits[:, :-1]  # (num_probes, longest - 1, vocab_size)
        marked, labels = is_answer[:, 1:], tokens[:, 1:]
        loss += cross_entropy(logits[marked].float(), labels[marked], reduction="sum")
        recalled += ((logits.argmax(-1) == labels) | ~marked).all(1).sum().item()
        first = marked.int().argmax(1)  # where the first token of the answer is predicted
        scores = logits[torch.arange(len(tokens)), first].gather(1, candidates).float()
        among += cross_entropy(scores, torch.zeros(len(tokens), dtype=torch.int64), reduction="sum")
        picked += (scores[:, :1] > scores[:, 1:]).all(1).tolist()
    count = len(probes.tokens)
    losses = {"": loss.item() / probes.is_answer.sum().item(), ", recalled": recalled / count}
    if probes.candidates.shape[1] == 1:
        return losses, ""
    losses |= {", among answers": among.item() / count, ", picked": sum(picked) / count}
    return losses, "".join("1" if one else "0" for one in picked)
