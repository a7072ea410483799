"""Training steps of adapted models, every launch emulated, against the reference path.

Loss and gradients of both paths from the same weights; three steps of SGD, so that later ones launch by kept
plans. A case's result is its largest relative error in units of what its dtype allows.
"""

from __future__ import annotations

import os
from functools import partial

import torch

import mica.fast
from tests.emulator.driver import settings, statistics
from tests.emulator.judging import BF16, F32, WrongError
from tests.support.models import net, randomise
from tests.support.moe_models import tokens
from tests.support.moe_steps import adapted
from tests.support.stock import step
from tests.support.tolerances import error
from tests.support.training import llama

TOLERANCE = {F32: 2e-5, BF16: 4e-2}
LORA = {"init_lora_weights": True}
wide = partial(llama, base={"hidden_size": 64, "intermediate_size": 96})
CASES = {  # experts in fp32: in bf16 a rounding can move a token to another one
    "net fp32": (net, F32, {}),
    "net bf16, rank 5": (net, BF16, {"rank": 5}),
    "llama fp32, dropout": (wide, F32, {"rank": 8, "lora_dropout": 0.2}),
    "llama bf16": (wide, BF16, {"rank": 16}),
    "llama bf16, 16-bit adapters": (wide, BF16, {"rank": 24, "autocast_adapter_dtype": False}),
    "llama bf16, dropout": (wide, BF16, {"rank": 16, "lora_dropout": 0.2}),
    "qwen3_moe fp32": (partial(adapted, "qwen3_moe"), F32, {}),
    "gpt_oss fp32": (partial(adapted, "gpt_oss"), F32, {}),
    "mixtral fp32": (partial(adapted, "mixtral"), F32, {"rank": 16}),
    "net bf16, LoRA, rank 5": (net, BF16, {"rank": 5, **LORA}),
    "llama fp32, LoRA, dropout": (wide, F32, {"rank": 8, "lora_dropout": 0.2, **LORA}),
    "qwen3_moe fp32, LoRA": (partial(adapted, "qwen3_moe"), F32, LORA),
}


def built(name: str):
    """A case's model, and what does a forward and a backward pass of it."""
    mica.fast.enable(lora=True)
    make, dtype, options = CASES[name]
    model, ids = randomise(make(dtype=dtype, **options)).train(), tokens(2, 9) % 29
    return model, partial(step, model, ids, **({} if make is net else {"labels": ids}))


def run(name: str) -> float:
    model, once = built(name)

    def by(backend):
        """(loss, gradients, number of launches)."""
        os.environ["MICA_BACKEND"] = backend
        before = statistics.launches
        torch.manual_seed(5)  # of dropout
        return *once(), statistics.launches - before

    errors = []
    for seed, order in enumerate(settings.orders):
        settings.order, settings.seed = order, seed
        loss, grads, launches = by("reference")
        own_loss, own_grads, own_launches = by("triton")
        if launches or not own_launches or grads.keys() != own_grads.keys():
            raise WrongError(f"{launches} and {own_launches} launches, {len(own_grads)} gradients")
        errors += [error(own_loss, loss), *(error(own_grads[key], grads[key]) for key in grads)]
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in grads:
                    parameter -= 0.5 * grads[key]
    worst = max(errors) / TOLERANCE[CASES[name][1]]
    if worst > 1:
        raise WrongError(f"relative errors up to {worst:.2g} times what is allowed")
    return worst
