"""Training steps of adapted models, every launch emulated, against the reference path.

Loss and gradients of both paths from the same weights; three steps of SGD, so that later ones launch by kept
plans. A case's result is its largest relative error in units of what its dtype allows.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mica.fast
from tests.emulator.driver import settings, statistics
from tests.emulator.judging import BF16, F32, WrongError
from tests.support.models import Net, randomise, wrap
from tests.support.moe_models import tokens
from tests.support.moe_steps import adapted

TOLERANCE = {F32: 2e-5, BF16: 4e-2}


def llama(dtype, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = LlamaForCausalLM(config).to(dtype)
    return randomise(wrap(model, targets=targets, **options)).train(), tokens(2, 19)


def experts(kind):
    def build(dtype, **options):
        return adapted(kind, dtype, **options).train(), tokens(2, 9)

    return build


class Classifier(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, ids, labels):
        logits = self.net(ids).float()
        return SimpleNamespace(
            loss=torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten() % 10)
        )


def small(dtype, **options):
    torch.manual_seed(0)
    return Classifier(randomise(wrap(Net(dtype), **options)).train()), tokens(3, 11) % 29


CASES = {
    "net fp32": (small, F32, {}),
    "net bf16, rank 5": (small, BF16, {"rank": 5}),
    "llama fp32, dropout": (llama, F32, {"rank": 8, "lora_dropout": 0.2}),
    "llama bf16": (llama, BF16, {"rank": 16}),
    "llama bf16, 16-bit adapters": (llama, BF16, {"rank": 24, "autocast_adapter_dtype": False}),
    "llama bf16, dropout": (llama, BF16, {"rank": 16, "lora_dropout": 0.2}),
    "llama bf16, fp32 products": (llama, BF16, {"rank": 16, "compute_dtype": F32}),
    "qwen3_moe fp32": (experts("qwen3_moe"), F32, {}),
    "qwen3_moe bf16": (experts("qwen3_moe"), BF16, {"rank": 16}),
    "gpt_oss fp32": (experts("gpt_oss"), F32, {}),
    "gpt_oss bf16": (experts("gpt_oss"), BF16, {"rank": 5}),
    "mixtral bf16": (experts("mixtral"), BF16, {"rank": 16}),
}


def _watched(model) -> list:
    """Which experts the routers choose, by call: in bf16 a rounding can move a token to another expert."""
    chosen = []

    def note(module, inputs, outputs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        chosen.extend(o.sort(-1)[0].clone() for o in outputs if not o.is_floating_point())

    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "mlp.router")):
            module.register_forward_hook(note)
    return chosen


def _step(model, ids, backend, chosen):
    """(loss, gradients, experts, number of launches) of one forward and backward pass."""
    os.environ["MICA_BACKEND"] = backend
    before = statistics.launches
    chosen.clear()
    torch.manual_seed(5)  # of dropout
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, list(chosen), statistics.launches - before


def _distance(actual, exact) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-9))


def built(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A case's model, and the tokens that it is trained on."""
    build, dtype, options = CASES[name]
    mica.fast.enable(compute_dtype=options.get("compute_dtype"))
    return build(dtype, **{key: value for key, value in options.items() if key != "compute_dtype"})


def run(name: str) -> float:
    dtype = CASES[name][1]
    os.environ["MICA_BACKEND"] = "reference"
    model, ids = built(name)
    chosen, errors = _watched(model), []
    for seed, order in enumerate(settings.orders):
        settings.order, settings.seed = order, seed
        loss, grads, routed, launches = _step(model, ids, "reference", chosen)
        own_loss, own_grads, own_routed, own_launches = _step(model, ids, "triton", chosen)
        if launches or not own_launches or grads.keys() != own_grads.keys():
            raise WrongError(f"{launches} and {own_launches} launches, {len(own_grads)} gradients")
        if all(map(torch.equal, routed, own_routed)):  # else they are not comparable
            errors += [_distance(own_loss, loss), *(_distance(own_grads[key], grads[key]) for key in grads)]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
    if not errors or max(errors) > TOLERANCE[dtype]:
        raise WrongError(f"relative errors up to {max(errors, default=float('nan')):.2g}")
    return max(errors) / TOLERANCE[dtype]
