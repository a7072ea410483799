"""What a forward keeps for its backward, beside the bare model: bytes, which no busy machine changes.

SmolLM2-135M without its head, whole and four layers of its widths with random weights: 512 tokens, all linear
layers adapted, r = 16. A step has to run the operators that its name implies; results are compared in the
suites that time them. The one round of each cell shows that it runs, not how fast.
"""

import functools

import torch
from transformers import AutoModel

from bench.measure.machine import DEVICE
from bench.results.names import BARE, FAST, FAST_NORMS, MICA, PLAIN_LORA, stock
from bench.suites.bench_step import AUTOCAST, CONFIGS, DROPOUT, DTYPES, Cell
from bench.suites.decoder import SMOLLM2, Work, adapted, config_of
from bench.suites.harness import build_all, each, pick, under_autocast
from bench.suites.rounds import Once, prepared, rounds
from bench.suites.steps import CONTEXTS, Prepared, Step, operators
from tests.support import models

TOKENS = pick(default=512, dry=8)
TOY = "toy"
FOUR_LAYERS = "4 layers of SmolLM2-135M"
A_SCALE = 0.02


CELLS = [
    Cell(model, (1, TOKENS), dtype, how=how, adapter=adapter)
    for model in pick(default=(FOUR_LAYERS, SMOLLM2), dry=(TOY,))
    for adapter in (MICA, PLAIN_LORA)
    for dtype, how in (("bfloat16", ""), ("bfloat16", DROPOUT), ("float32", ""), ("float32", AUTOCAST))
]


def implementations(cell: Cell) -> list[str]:
    return [BARE, *stock(cell.dtype, cell.how == AUTOCAST), FAST, FAST_NORMS]


def bare_of(cell: Cell) -> torch.nn.Module:
    dtype = DTYPES[cell.dtype]
    if cell.model == SMOLLM2:
        return models.smollm2(dtype).model
    torch.manual_seed(0)
    widths = cell.model if cell.model == TOY else "SmolLM2-135M's widths"
    return AutoModel.from_config(config_of(widths, layers=4), dtype=dtype)


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Prepared:
    bare = bare_of(cell).train().requires_grad_(False).to(DEVICE)
    masters = adapted(bare, A_SCALE, adapter=cell.adapter, **CONFIGS.get(cell.how, {})).train()
    shape = (1, TOKENS, bare.config.hidden_size)
    x, dy = torch.randn(2, *shape, device=DEVICE, dtype=DTYPES[cell.dtype]).unbind()
    work = Work(bare, masters, x, dy)
    if cell.how == AUTOCAST:
        work = work._replace(wrap=under_autocast)
    layers = len(models.adapted_layers(masters))

    def build(name: str) -> Step:
        ran = operators(layers, adapter=cell.adapter) if name in (FAST, FAST_NORMS) else {}
        return work.step(name, CONTEXTS[name], ran)

    steps = build_all(kept_by(cell), implementations(cell), build)
    return Prepared(steps, {name: {"saved_mb": step.saved_mb()} for name, step in steps.items()})


def kept_by(cell: Cell) -> str:
    return f"{cell.name}, kept"


@each(CELLS)
def bench_kept(cell):
    group = kept_by(cell)
    steps = prepared(group, lambda: setting(cell))
    axes = {**cell.axes, "suite": "kept"}

    def sample(once: Once, _: str) -> None:
        steps.time(once, axes, warm_up=lambda: None)

    rounds(group, implementations(cell), sample, seconds=0.0, fewest=1)
