"""A training step of SmolLM2-135M, all linear layers, r = 16: bare, stock PEFT, mica.fast.

Every rival gets embeddings that require a gradient, so that the bare frozen model has a backward too and
all of them do the same base work. The adapted ones also run AdamW on A. Memory: what is saved for the
backward, by how much the process grows within a step, what is trained, and AdamW's states.
"""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch

import mica.fast
from bench.measure.memory import saved_bytes
from bench.results.names import BARE, FAST, STOCK, STOCK_16
from bench.suites.harness import DEVICE, optimizer_bytes, peak_growth, pick, trainable_bytes
from tests.support import models

ROUNDS = pick(quick={"bfloat16": 4}, default={"bfloat16": 6, "float32": 3})
TOKENS = pick(quick={"bfloat16": (1, 256)}, default={"bfloat16": (2, 512), "float32": (1, 512)})
RANK = 16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
GATE = {"bfloat16": 2e-2, "float32": 1e-5}  # relative difference of the losses


def adapted(bare, **options):
    model = models.wrap(copy.deepcopy(bare), rank=RANK, targets="all-linear", **options)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


@functools.lru_cache(maxsize=1)
def setting(dtype):
    """Token ids and rivals: model, context to run it in, optimizer; all have taken a few steps."""
    torch.manual_seed(0)
    bare = models.smollm2(DTYPES[dtype]).requires_grad_(False).to(DEVICE)
    masters = adapted(bare)
    batch, sequence = TOKENS[dtype]
    ids = models.python_reference_tokens()[: batch * sequence].view(batch, sequence).to(DEVICE)
    rivals = {BARE: (bare, nullcontext, None)}
    rivals[STOCK] = (masters[0], mica.fast.disabled, masters[1])
    if dtype != "float32":
        narrow = adapted(bare, autocast_adapter_dtype=False)
        rivals[STOCK_16] = (narrow[0], mica.fast.disabled, narrow[1])
    rivals[FAST] = (masters[0], nullcontext, masters[1])
    for _ in range(2):
        for rival in rivals.values():
            step(rival, ids, bare)
    losses = {name: forward(rival, ids, bare).item() for name, rival in rivals.items()}
    assert abs(losses[FAST] / losses[STOCK] - 1) <= GATE[dtype], f"the losses differ: {losses}"
    return bare, ids, rivals


def forward(rival, ids, bare):
    model, context, _ = rival
    with context():
        embedded = bare.get_input_embeddings()(ids).detach().requires_grad_()
        return model(inputs_embeds=embedded, labels=ids).loss


def step(rival, ids, bare):
    _, context, optimizer = rival
    with context():
        forward(rival, ids, bare).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def memory(rival, ids, bare):
    """Megabytes, of the model's own."""
    model, _, optimizer = rival
    facts = {"saved_mb": saved_bytes(lambda: forward(rival, ids, bare), (model, bare)) / 1e6}
    facts["trained_mb"] = trainable_bytes(model) / 1e6
    facts["optimizer_mb"] = 0.0 if optimizer is None else optimizer_bytes(optimizer) / 1e6
    return facts


# the first named parameter is the innermost loop: rivals take turns within a round
CASES = [
    (dtype, round_, rival)
    for dtype, rounds in ROUNDS.items()
    for round_ in range(rounds)
    for rival in (BARE, STOCK, *([STOCK_16] if dtype != "float32" else []), FAST)
]


@pytest.mark.parametrize(("dtype", "round_", "rival"), CASES)
def bench_step(once, gated, dtype, round_, rival):
    batch, sequence = TOKENS[dtype]
    group = f"training step, {batch} x {sequence} tokens, r = {RANK}, {dtype}"
    bare, ids, rivals = gated(group, lambda: setting(dtype))
    axes = {"suite": "step", "model": "SmolLM2-135M", "tokens": batch * sequence, "sequence": sequence}
    facts = memory(rivals[rival], ids, bare) if round_ == 0 else {}
    with peak_growth() as growth:
        once(
            lambda: step(rivals[rival], ids, bare),
            group,
            rival,
            {**axes, "rank": RANK, "dtype": dtype},
            warm_up=True,
            **facts,
        )
    if growth() is not None:
        once.note(peak_mb=growth() / 1e6)
