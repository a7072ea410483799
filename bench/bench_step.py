"""A training step of SmolLM2-135M, all linear layers, r = 16, 2 x 512 tokens: bare, stock PEFT, mica.fast.

Every rival gets embeddings that require a gradient, so that the bare frozen model has a backward too and
all of them do the same base work. The adapted ones also run AdamW on A.
"""

import functools
from contextlib import nullcontext

import models
import pytest
import torch

import mica.fast
from bench.saved import saved_bytes

ROUNDS, TOKENS, RANK = 6, (2, 512), 16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
GATE = {"bfloat16": 2e-2, "float32": 1e-5}  # relative difference of the losses


@functools.lru_cache(maxsize=1)
def setting(dtype):
    """Bare model, adapted model, optimizer and token ids; the adapted one has taken a few steps."""
    torch.manual_seed(0)
    bare = models.smollm2(DTYPES[dtype]).requires_grad_(False)
    adapted = models.wrap(models.smollm2(DTYPES[dtype]), rank=RANK, targets="all-linear")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    ids = models.python_reference_tokens()[: TOKENS[0] * TOKENS[1]].view(TOKENS)
    rivals = {
        "bare frozen model": (bare, nullcontext, None),
        "stock PEFT": (adapted, mica.fast.disabled, optimizer),
        "mica.fast": (adapted, nullcontext, optimizer),
    }
    for _ in range(2):
        for rival in rivals.values():
            step(rival, ids, bare)
    losses = {name: forward(rival, ids, bare).item() for name, rival in rivals.items()}
    difference = abs(losses["mica.fast"] / losses["stock PEFT"] - 1)
    assert difference <= GATE[dtype], f"no timing of a wrong result: {losses}"
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


# the first named parameter is the innermost loop: rivals take turns within a round
@pytest.mark.parametrize("rival", ["bare frozen model", "stock PEFT", "mica.fast"])
@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("dtype", DTYPES)
def bench_step(once, dtype, round_, rival):
    bare, ids, rivals = setting(dtype)
    extra = {}
    if round_ == 0:
        saved = saved_bytes(lambda: forward(rivals[rival], ids, bare), (rivals[rival][0], bare))
        extra["saved_mb"] = saved / 1e6
    once(lambda: step(rivals[rival], ids, bare), f"training step, {dtype}", rival, **extra)
