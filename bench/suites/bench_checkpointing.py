"""A training step with LoRA, r = 16 on all linear layers, and no, a third or all of its layers checkpointed.

`mica fits --memory` says how few layers a device needs checkpointed, and this what each costs. All of it is
one cell, so that PEFT's steps with all layers checkpointed and ours with fewer take turns. The first layers
are checkpointed. On a CPU SmolLM2-135M in bf16 with 512 tokens; memory: what a forward keeps.
"""

import functools
from fractions import Fraction

import torch

from bench.measure.machine import DEVICE
from bench.results.names import FAST, PLAIN_LORA, STOCK, STOCK_16, checkpointed
from bench.suites.bench_step import GATES, Cell
from bench.suites.decoder import SMOLLM2, causal, loss, reference_ids, work_on
from bench.suites.harness import build_all, pick
from bench.suites.rounds import prepared, rounds
from bench.suites.steps import Prepared, checked, with_bytes
from mica.cli.step_memory import checkpoint_first, decoder_layers
from tests.support import models

CELL = pick(
    default=Cell(SMOLLM2, (1, 512), adapter=PLAIN_LORA, suite="checkpointing"),
    cuda=Cell("Llama-3.2-1B", (4, 2048), layers=6, adapter=PLAIN_LORA, suite="checkpointing"),
    dry=Cell("toy", (1, 8), layers=3, vocabulary=64, adapter=PLAIN_LORA, suite="checkpointing"),
)
SHARES = (Fraction(0), Fraction(1, 3), Fraction(1))
STEPS = {checkpointed(name, share): (name, share) for name in (STOCK, STOCK_16, FAST) for share in SHARES}
SECONDS = pick(default=180.0, cuda=10.0, dry=0.0)


@functools.lru_cache(maxsize=1)
def setting() -> Prepared:
    torch.manual_seed(0)
    if CELL.model == SMOLLM2:
        bare, ids = models.smollm2(torch.bfloat16), reference_ids(CELL.tokens).to(DEVICE)
    else:
        bare = causal(CELL.model, CELL.layers, CELL.vocabulary, torch.bfloat16)
        ids = torch.randint(CELL.vocabulary, CELL.tokens).to(DEVICE)
    shape = (*CELL.tokens, bare.config.hidden_size)
    work = work_on(bare, shape, PLAIN_LORA, call=functools.partial(loss, ids))
    work = work._replace(x=bare.get_input_embeddings()(ids).detach(), grad_output=None)
    layers = decoder_layers(bare)
    expected = work.step(STOCK).results()

    def build(implementation: str):
        name, share = STEPS[implementation]
        step = work.step(name, forwards=1 + share)
        checkpoint_first(step.form.module, int(share * len(layers)))
        return checked(step, expected, GATES[CELL.dtype])

    return with_bytes(build_all(CELL.name, list(STEPS), build))


def bench_checkpointing():
    steps = prepared(CELL.name, setting)
    rounds(CELL.name, list(STEPS), lambda once, _: steps.time(once, CELL.axes), SECONDS)
