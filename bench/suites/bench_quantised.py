"""Forward + backward of SmolLM2-135M in nf4, all linear layers adapted, r = 16, 2 x 512 tokens.

Implementations: the bare frozen model, plain PEFT LoRA (stock PEFT cannot do MiCA over bitsandbytes), and
MiCA on mica.fast. No optimizer: LoRA's would have twice the parameters.
Target: at most half the overhead of LoRA, (mica.fast - bare) / (PEFT LoRA - bare) <= 0.5.
"""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

import mica.fast
from bench.measure.machine import ON_ACCELERATOR, SIZE
from bench.measure.memory import saved_bytes
from bench.results.names import BARE, FAST, LORA, STOCK
from bench.suites.decoder import LINEAR_LAYERS, RANK, Work, adapted
from bench.suites.harness import build_all
from bench.suites.steps import Step, checked
from tests.support import models, quantised_models

# A step takes 6 s, unpacking most of it: part of a full run.
pytestmark = pytest.mark.skipif(SIZE != "full" or ON_ACCELERATOR, reason="part of --full on a CPU")
ROUNDS, TOKENS = 6, (2, 512)
IMPLEMENTATIONS = (BARE, LORA, FAST)
# Relative differences from PEFT's own forward with the same MiCA adapters, which computes in fp32. Measured:
# 1e-3 and 3e-2, where the adapters change the loss by 12 %.
GATES = {"y": 5e-3, "dx": 1e-1, "dA": 1e-1}
nf4 = functools.partial(quantised_models.bnb_4bit, compute_dtype=torch.bfloat16)


def lora(work: Work) -> Step:
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear")
    with mica.fast.disabled():
        model = get_peft_model(copy.deepcopy(work.bare), config)
    return work.step_of(model.train(), mica.fast.disabled, {})


@functools.cache
def setting(group: str) -> dict[str, Step]:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    bare = quantised_models.quantise(models.smollm2(torch.bfloat16), nf4).requires_grad_(False)
    bare.is_loaded_in_4bit = True
    ids = models.python_reference_tokens()[: TOKENS[0] * TOKENS[1]].view(TOKENS)
    masters = adapted(bare, 0.1)
    for model in (bare, masters):
        model.train()  # in eval mode bitsandbytes repacks 4-bit weights on some CPUs
    work = Work(bare, masters, bare.get_input_embeddings()(ids).detach(), labels=ids)
    expected = work.step(STOCK, mica.fast.disabled, {}).results()
    alone = work.step(BARE, nullcontext, {})
    difference = abs(float(expected["y"] / alone.results()["y"]) - 1)
    assert difference > 10 * GATES["y"], f"the adapters change the loss by only {difference:.1e}"
    # the base layer is called, since it unpacks the weight
    projections = [f"{name}_projection{part}" for name in ("down", "up") for part in ("", "_backward")]
    ran = dict.fromkeys(projections, LINEAR_LAYERS * bare.config.num_hidden_layers)
    builds = {
        BARE: lambda: alone,
        LORA: lambda: lora(work),
        FAST: lambda: checked(work.step(FAST, nullcontext, ran), expected, GATES),
    }
    return build_all(group, builds, lambda name: builds[name]())


# the first named parameter is the innermost loop: implementations take turns within a round
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("round_", range(ROUNDS))
def bench_quantised(once, gated, round_, implementation):
    group = "forward + backward, bfloat16 over nf4"
    step = gated(group, lambda: setting(group), implementation)[implementation]
    axes = {"suite": "quantised", "model": "SmolLM2-135M", "tokens": TOKENS[0] * TOKENS[1], "rank": RANK}
    facts = {}
    if round_ == 0:
        form = step.form
        with form.context():
            facts["saved_mb"] = saved_bytes(form.forward, [form.module]) / 1e6
    step.time(once, group, implementation, axes, **facts)
