"""What a forward keeps for its backward, beside the bare model: bytes, which no busy machine changes.

SmolLM2-135M without its head, whole and four layers of its widths with random weights: 512 tokens, all linear
layers adapted, r = 16. A step has to run the operators that its name implies; results are compared in the
suites that time them. The one round of each cell shows that it runs, not how fast.
"""

import functools

import torch
from transformers import AutoModel

from bench.results.names import BARE, DORA, FAST, FAST_ACTIVATIONS, MICA, PLAIN_LORA, stock
from bench.suites.bench_step import AUTOCAST, CONFIGS, DROPOUT, Cell
from bench.suites.decoder import SMOLLM2, config_of, under_autocast, work_on
from bench.suites.harness import build_all, each, pick
from bench.suites.rounds import Once, prepared, rounds
from bench.suites.steps import Prepared, with_bytes
from tests.support import models

TOKENS = pick(default=512, dry=8)
TOY = "toy"
FOUR_LAYERS = "4 layers of SmolLM2-135M"
CELLS = [
    Cell(model, (1, TOKENS), dtype, how=how, adapter=adapter, suite="kept")
    for model in pick(default=(FOUR_LAYERS, SMOLLM2), dry=(TOY,))
    for adapter in (MICA, PLAIN_LORA, DORA)
    for dtype, how in (("bfloat16", ""), ("bfloat16", DROPOUT), ("float32", ""), ("float32", AUTOCAST))
]


def implementations(cell: Cell) -> list[str]:
    return [BARE, *stock(cell.dtype, cell.how == AUTOCAST), FAST, FAST_ACTIVATIONS]


def bare_of(cell: Cell) -> torch.nn.Module:
    dtype = getattr(torch, cell.dtype)
    if cell.model == SMOLLM2:
        return models.smollm2(dtype).model
    torch.manual_seed(0)
    widths = cell.model if cell.model == TOY else "SmolLM2-135M's widths"
    return AutoModel.from_config(config_of(widths, layers=4), dtype=dtype)


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Prepared:
    bare = bare_of(cell)
    config = CONFIGS.get(cell.how, {})
    work = work_on(bare, (1, TOKENS, bare.config.hidden_size), cell.adapter, **config)
    if cell.how == AUTOCAST:
        work = work._replace(call=functools.partial(under_autocast, work.call))
    return with_bytes(build_all(cell.name, implementations(cell), work.step))


@each(CELLS)
def bench_kept(cell):
    steps = prepared(cell.name, lambda: setting(cell))

    def sample(once: Once, _: str) -> None:
        steps.time(once, cell.axes, warm_up=lambda: None)

    rounds(cell.name, implementations(cell), sample, seconds=0.0, fewest=1)
