"""Forward + backward of SmolLM2-135M in nf4, all linear layers adapted, r = 16, 2 x 512 tokens.

Rivals: the bare frozen model, plain PEFT LoRA (MiCA is what stock PEFT cannot do over bitsandbytes) with its
default fp32 adapters and with bf16 ones, and MiCA on mica.fast. No optimizer: LoRA's would have twice the
parameters. All get embeddings that require a gradient, so that the bare model has a backward too. Asked: at
most half the overhead of LoRA, (mica.fast - bare) / (PEFT LoRA - bare) <= 0.5.
"""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

import mica.fast
from bench.measure.memory import saved_bytes
from bench.results.names import BARE, FAST, LORA
from bench.suites.harness import SIZE, pick
from tests.support import models, quantised_models

# A step takes 6 s, unpacking most of it: part of a full run.
pytestmark = pytest.mark.skipif(SIZE != "full", reason="part of --full")
ROUNDS = pick(quick=2, default=6)
TOKENS, RANK = (2, 512), 16
LORA_16 = "PEFT LoRA, bf16 adapters"
RIVALS = (BARE, LORA, LORA_16, FAST)
# Relative differences from PEFT's own forward of the same MiCA adapters, which computes them in fp32. Met:
# 1e-3 and 3e-2, where the adapters change the loss by 12 %.
LOSS_GATE, GRADIENT_GATE = 5e-3, 1e-1
nf4 = functools.partial(quantised_models.bnb_4bit, compute_dtype=torch.bfloat16)


def lora(base, autocast_adapter_dtype):
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear")
    return get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)


@functools.cache
def setting():
    """name -> (model, context to run it in), and the embeddings and labels of the tokens."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    bare = quantised_models.quantise(models.smollm2(torch.bfloat16), nf4).requires_grad_(False)
    bare.is_loaded_in_4bit = True
    ids = models.python_reference_tokens()[: TOKENS[0] * TOKENS[1]].view(TOKENS)
    adapted = models.wrap(copy.deepcopy(bare), rank=RANK, targets="all-linear")
    with mica.fast.disabled():
        peft = [lora(copy.deepcopy(bare), autocast) for autocast in (True, False)]
    contexts = (nullcontext, mica.fast.disabled, mica.fast.disabled, nullcontext)
    rivals = dict(zip(RIVALS, zip((bare, *peft, adapted), contexts, strict=True), strict=True))
    for model, _ in rivals.values():
        model.train()  # in eval mode bitsandbytes repacks 4-bit weights on some CPUs
    inputs = bare.get_input_embeddings()(ids).detach(), ids
    check(rivals, inputs)
    for rival in rivals.values():
        for _ in range(2):
            step(rival, inputs)
    return rivals, inputs


def check(rivals, inputs):
    """mica.fast against PEFT's forward, on adapters that say something; each LoRA in its dtype."""
    for name, dtype in ((LORA, torch.float32), (LORA_16, torch.bfloat16)):
        trained = {parameter.dtype for parameter in rivals[name][0].parameters() if parameter.requires_grad}
        assert trained == {dtype}, f"{name} has adapters in {trained}"
    adapted, _ = rivals[FAST]
    assert mica.fast.explain(adapted).counts().keys() <= {"kernel", "reference"}, "not on the operators"
    models.randomise(adapted, 0.1)
    losses, gradients = [], []
    for context in (nullcontext, mica.fast.disabled):
        losses.append(step((adapted, context), inputs, keep=True).item())
        gradients.append(torch.cat([grad.flatten() for grad in models.gradients(adapted).values()]))
        adapted.zero_grad(set_to_none=True)
    bare = forward(rivals[BARE], inputs).item()
    assert abs(losses[1] / bare - 1) > 10 * LOSS_GATE, "the adapters make no difference"
    assert abs(losses[0] / losses[1] - 1) <= LOSS_GATE, f"no timing of a wrong result: {losses}"
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error <= GRADIENT_GATE, f"no timing of a wrong gradient: {error:.3g}"


def forward(rival, inputs):
    model, context = rival
    embedded, ids = inputs
    with context():
        return model(inputs_embeds=embedded.detach().requires_grad_(), labels=ids).loss


def step(rival, inputs, keep=False):
    model, context = rival
    loss = forward(rival, inputs)
    with context():
        loss.backward()
    if not keep:
        model.zero_grad(set_to_none=True)
    return loss.detach()


# the first named parameter is the innermost loop: rivals take turns within a round
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("round_", range(ROUNDS))
def bench_quantised(once, gated, round_, rival):
    group = "forward + backward, bfloat16 over nf4"
    rivals, inputs = gated(group, setting)
    axes = {"suite": "quantised", "model": "SmolLM2-135M", "tokens": TOKENS[0] * TOKENS[1], "rank": RANK}
    extra = {}
    if round_ == 0:
        saved = saved_bytes(lambda: forward(rivals[rival], inputs), [rivals[rival][0]])
        extra["saved_mb"] = saved / 1e6
    once(lambda: step(rivals[rival], inputs), group, rival, axes, **extra)
