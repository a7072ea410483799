"""The methods that `bench.quality` compares: their models, a training run, and what is measured after it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

import mica.fast
from bench.measure.memory import optimizer_bytes, saved_bytes
from bench.quality.texts import BATCH, Texts, TokenisedProbes

# For all methods. `warm_up`: share of the steps; `scaling`: lora_alpha over the rank, at every rank.
FIXED = {"weight_decay": 0.0, "warm_up": 0.1, "max_grad_norm": 1.0, "scaling": 1.0}
PROBE_BATCH = 16


@dataclass(frozen=True)
class Method:
    """``kind``: "mica", "lora" or "full"; ``start``: first rate tried; ``stock``: on PEFT's own code."""

    name: str
    kind: str
    start: float
    rank: int | None = None
    stock: bool = False


class Candidate:
    """A method's model, to be trained repeatedly from the same start.

    Adapters: a frozen ``base`` in its own dtype under PEFT's default fp32 adapter, scaling 1. Full
    fine-tuning: the same weights in fp32, under bf16 autocast where ``base`` is bf16.
    """

    def __init__(self, method: Method, base):
        self.method = method
        self.autocast = nullcontext
        self.context = mica.fast.disabled if method.stock else nullcontext
        model = copy.deepcopy(base)
        start = time.perf_counter()
        if method.kind == "full":
            self.model = model.float().requires_grad_(True)
            if base.dtype != torch.float32:
                self.autocast = lambda: torch.autocast(self.model.device.type, base.dtype)
        else:
            config = LoraConfig(
                r=method.rank,
                lora_alpha=int(FIXED["scaling"] * method.rank),
                target_modules="all-linear",
                init_lora_weights="mica" if method.kind == "mica" else True,
                task_type="CAUSAL_LM",
            )
            with self.context():
                self.model = get_peft_model(model, config)
        self.initialisation_seconds = time.perf_counter() - start
        self.model.config.use_cache = False
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self._initial = [p.detach().clone() for p in self.trained]
        self.optimizer_bytes = self.saved_bytes = 0  # known after training

    def restart(self, seed: int) -> None:
        """Back to the start: LoRA's A is redrawn by ``seed``, everything else has its initial values."""
        if self.method.kind == "lora":
            torch.manual_seed(seed)
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.reset_lora_parameters("default", True)
            return
        with torch.no_grad():
            for parameter, value in zip(self.trained, self._initial, strict=True):
                parameter.copy_(value)

    def facts(self) -> dict:
        return {
            "kind": self.method.kind,
            "rank": self.method.rank,
            "trained_parameters": sum(p.numel() for p in self.trained),
            "optimizer_bytes": self.optimizer_bytes,
            "saved_bytes": self.saved_bytes,
            "initialisation_seconds": round(self.initialisation_seconds, 3),
        }


def adapter_sizes(base) -> tuple[int, int]:
    """Trained parameters at rank 1 of MiCA and of LoRA, on the layers that PEFT adapts in ``base``."""
    config = LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")
    named = [*get_peft_model(copy.deepcopy(base), config).named_parameters()]
    a, b = (sum(p.numel() for name, p in named if part in name) for part in ("lora_A", "lora_B"))
    return a, a + b


def same_size_rank(rank: int, mica_size: int, lora_size: int) -> int:
    """The LoRA rank, at least 1, whose trained parameters are closest to those of MiCA at ``rank``."""
    size = rank * mica_size
    below = max(1, size // lora_size)
    return min(below, below + 1, key=lambda r: abs(r * lora_size - size))


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


def train(candidate: Candidate, texts: Texts, rate: float, steps: int, seed: int) -> dict:
    """One training run: AdamW without weight decay, linear warm-up, cosine decay, gradients clipped.

    Returns the loss (nats per token) and the seconds of every step; a loss that is not finite ends the run
    and is noted under "diverged".
    """
    candidate.restart(seed)
    model = candidate.model.train()
    optimizer = torch.optim.AdamW(candidate.trained, lr=rate, weight_decay=FIXED["weight_decay"])
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(FIXED["warm_up"] * steps), steps)
    run: dict = {"rate": rate, "seed": seed, "diverged": None, "losses": [], "seconds": []}

    def forward(batch):
        with candidate.autocast():
            return model(input_ids=batch, labels=batch).loss

    with candidate.context():
        for step, batch in enumerate(batches(texts.train, steps, seed)):
            if not candidate.saved_bytes:
                candidate.saved_bytes = saved_bytes(lambda b=batch: forward(b), (model,))
            start = time.perf_counter()
            loss = forward(batch)
            if not math.isfinite(value := loss.item()):
                run["diverged"] = f"training loss {value} at step {step + 1}"
                return run
            loss.backward()
            torch.nn.utils.clip_grad_norm_(candidate.trained, FIXED["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            run["seconds"].append(round(time.perf_counter() - start, 4))
            run["losses"].append(value)
    candidate.optimizer_bytes = optimizer_bytes(optimizer)
    return run


@torch.no_grad()
def evaluate(model, texts: Texts, autocast=nullcontext, context=nullcontext) -> dict[str, float]:
    """Every loss in nats per token. For probes, "NAME" is the loss of the answer and "NAME, recalled" the
    share whose whole answer is the likeliest. With other answers: "NAME, among answers" is the loss of the
    right one when only these are possible, "NAME, picked" the share where it is the likeliest of them."""
    was_training = model.training
    model.eval()
    losses = {}
    with context(), autocast():
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
