"""The models that `bench.quality` compares, a training run, and what is measured after it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

import mica.fast
from bench.quality.recipes import RECIPES, Method
from bench.quality.texts import BATCH, Texts, TokenisedProbes

PROBE_BATCH = 16
# In place of MiCA's B: kind -> (weight (out, in), rank) -> (out, rank), orthonormal
OTHER_B = {
    "random": lambda weight, rank: torch.linalg.qr(torch.randn(len(weight), rank))[0],
    "largest": lambda weight, rank: torch.linalg.svd(weight, full_matrices=False)[0][:, :rank],
}


class Candidate:
    """A method's model, to be trained repeatedly from the same start: a copy of ``base``, in its dtype, under
    PEFT's adapter by the method's recipe, or with all weights trained."""

    def __init__(self, method: Method, base):
        self.method, self.recipe = method, RECIPES[method.recipe]
        model = copy.deepcopy(base)
        if method.kind == "full":
            self.model = model.requires_grad_(True)
        else:
            targets = self.recipe.target_modules
            config = LoraConfig(
                r=method.rank,
                lora_alpha=self.recipe.scaling * method.rank,
                target_modules=targets if isinstance(targets, str) else [*targets],
                lora_dropout=self.recipe.dropout,
                init_lora_weights=True if method.kind == "lora" else "mica",
                task_type="CAUSAL_LM",
            )
            self.model = get_peft_model(model, config)
            if method.kind in OTHER_B:
                self._replace_b(OTHER_B[method.kind])
        self.model.config.use_cache = False
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self._initial = [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def _replace_b(self, basis: Callable[[Tensor, int], Tensor]) -> None:
        torch.manual_seed(0)
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                B = module.lora_B["default"].weight
                B.copy_(basis(module.get_base_layer().weight, B.shape[1]))

    def restart(self, seed: int) -> None:
        """Back to the start: ``seed`` redraws LoRA's A and decides the dropout; the rest as at first."""
        with torch.no_grad():
            for parameter, value in zip(self.trained, self._initial, strict=True):
                parameter.copy_(value)
        torch.manual_seed(seed)
        if self.method.kind == "lora":
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.reset_lora_parameters("default", True)

    def facts(self) -> dict:
        return self.method.facts() | {
            "trained_parameters": sum(p.numel() for p in self.trained),
            "on_fast_path": self.method.kind not in ("lora", "full") and mica.fast.is_enabled(),
        }


def recipe_facts() -> dict[str, dict]:
    """All recipes, as JSON."""
    return {name: asdict(recipe) for name, recipe in RECIPES.items()}


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
    candidate: Candidate, texts: Texts, rate: float, epochs: int, seed: int, stops: Iterable[float] = ()
) -> dict:
    """One training run by the method's recipe: AdamW, warm-up, decay, gradients clipped.

    Returns the loss (nats per token) and the seconds of every step, and under "points" what `evaluate` gives
    after each of these shares of the steps. A loss that is not finite ends the run, and is noted under
    "diverged"; what was measured before counts.
    """
    candidate.restart(seed)
    model, recipe = candidate.model.train(), candidate.recipe
    steps = epochs * steps_per_epoch(texts.train)
    optimizer = torch.optim.AdamW(candidate.trained, lr=rate, weight_decay=recipe.weight_decay)
    schedule = get_scheduler(recipe.scheduler, optimizer, math.ceil(recipe.warm_up * steps), steps)
    run: dict = {"rate": rate, "seed": seed, "diverged": None, "losses": [], "seconds": [], "points": []}
    measured = {math.ceil(stop * steps) for stop in stops}

    for step, batch in enumerate(batches(texts.train, steps, seed)):
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        if not math.isfinite(value := loss.item()):
            run["diverged"] = f"training loss {value} at step {step + 1}"
            return run
        loss.backward()
        torch.nn.utils.clip_grad_norm_(candidate.trained, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        run["seconds"].append(round(time.perf_counter() - start, 4))
        run["losses"].append(value)
        if step + 1 in measured:
            evaluation = evaluate(model, texts)
            bad = [name for name, value in evaluation.items() if not math.isfinite(value)]
            if bad:
                run["diverged"] = f"loss on '{bad[0]}' after step {step + 1}: {evaluation[bad[0]]}"
                return run
            run["points"].append({"step": step + 1, "evaluation": evaluation})
    return run


@torch.no_grad()
def evaluate(model, texts: Texts) -> dict[str, float]:
    """Every loss in nats per token. For probes, "NAME" is the loss of the answer and "NAME, recalled" the
    share whose whole answer is the likeliest. With other answers: "NAME, among answers" is the loss of the
    right one when only these are possible, "NAME, picked" the share where it is the likeliest of them."""
    was_training = model.training
    model.eval()
    losses = {}
    for name, blocks in texts.prose.items():
        each = [model(input_ids=b, labels=b).loss.double().item() for b in blocks.split(1)]
        losses[name] = sum(each) / len(each)  # all blocks have the same length
    for name, probes in texts.probes.items():
        losses |= {f"{name}{ending}": value for ending, value in probe_losses(model, probes).items()}
    model.train(was_training)
    return losses


def probe_losses(model, probes: TokenisedProbes) -> dict[str, float]:
    """Ending of the name, see `evaluate` -> value."""
    loss, among = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    recalled = picked = 0
    for tokens, is_answer, candidates in zip(*(one.split(PROBE_BATCH) for one in probes), strict=True):
        logits = model(input_ids=tokens).logits[:, :-1]  # (num_probes, longest - 1, vocab_size)
        marked, labels = is_answer[:, 1:], tokens[:, 1:]
        loss += cross_entropy(logits[marked].float(), labels[marked], reduction="sum")
        recalled += ((logits.argmax(-1) == labels) | ~marked).all(1).sum().item()
        first = marked.int().argmax(1)  # where the first token of the answer is predicted
        scores = logits[torch.arange(len(tokens)), first].gather(1, candidates).float()
        among += cross_entropy(scores, torch.zeros(len(tokens), dtype=torch.int64), reduction="sum")
        picked += (scores[:, :1] > scores[:, 1:]).all(1).sum().item()
    count = len(probes.tokens)
    losses = {"": loss.item() / probes.is_answer.sum().item(), ", recalled": recalled / count}
    if probes.candidates.shape[1] > 1:
        losses |= {", among answers": among.item() / count, ", picked": picked / count}
    return losses
