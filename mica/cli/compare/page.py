"""The page of a comparison: what each method has learned and forgotten, and how to train it again."""

import argparse
import math
import shlex
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from mica.cli.compare import methods
from mica.cli.compare.methods import FULL, METHODS
from mica.cli.compare.outcomes import between_documents
from mica.cli.compare.schedule import Comparison
from mica.cli.output import markdown_table, shown

_MEASURED = {"learned": "test", "forgotten": "retained"}  # amount -> the blocks it is measured on
_HEADER = ["", "trained parameters", "learning rate", "seed", "learned", "forgotten"]
_VARIES = """\
What was {amount} differs by {seeds} between seeds of one method. The difference of two methods has a \
standard error of {others} over the documents, of which there are {documents}."""
_CAUTION = """\
A difference between two methods that is not larger than both of these can come from seeds or documents \
alone: it means nothing. A larger one may be chance, too, as few seeds and documents say little of others."""
_PAGE = """\
# {model_name} on {text_names}

*Learned* is the fall of the mean loss on {test} blocks of held-out text, *forgotten* its rise on {retained} \
blocks of {retain_names} (negative: it fell), both in nats per token: 0.1 less is a perplexity that is 10 % \
lower. Of each method's learning rates the one is shown whose seed 0 learned most of {validation} other \
held-out blocks.

{table}

{spread}

## The trainings

All have {steps} steps of {step_tokens:,} tokens, of a text of {blocks:,} training blocks of \
{sequence_length}; longer ones may show something else. Weights are {dtype}, those of full fine-tuning \
float32; adapters are on {target_modules}; {optimizer}, {scheduler} schedule, warm-up {warmup_ratio:g}, \
weight decay {weight_decay:g}, gradients clipped at {max_grad_norm:g}. \
All of it took {minutes:.1f} minutes. At each learning rate seed 0 has learned and forgotten:

{tried}
"""
_COMMAND = """\
mica adapt --method {method} --model {model} --text {text} --retain {retain} \
--sequence-length {sequence_length} --rank {rank} --alpha {alpha} --batch-size {batch_size} \
--eval-blocks {eval_blocks} --learning-rate {rate:g} --steps {steps} --output {method}
"""


def markdown(comparison: Comparison, facts: dict[str, Any]) -> str:
    """The page of a comparison. ``facts``: see `Trainings.facts`."""
    found = comparison.found()
    steps = comparison.steps()
    tried = []
    commands = []
    quoted = {name: shlex.join(facts[name]) for name in ("text", "retain")}
    quoted |= {"model": shlex.quote(facts["model"]), "steps": steps}
    for method, one in found.items():
        for rate, end in one.curve.items():
            tried.append([METHODS[method].title, f"{rate:g}", *(f"{mean:.3f}" for mean in end.means)])
        if method != FULL:
            own = vars(methods.options(method, argparse.Namespace(**facts)))
            commands.append(_COMMAND.format(**own | quoted, rate=one.rate))
    values = facts | {
        "model_name": shown(Path(facts["model"]).name),
        "text_names": _names(facts["text"]),
        "retain_names": _names(facts["retain"]),
        "table": table(comparison),
        "spread": "\n\n".join(spread(comparison)),
        "steps": steps,
        "step_tokens": facts["batch_size"] * facts["sequence_length"],
        "minutes": comparison.spent() / 60,
        "tried": markdown_table(["", "learning rate", "learned", "forgotten"], tried),
    }
    page = _PAGE.format(**values)
    if commands:
        page += f"\nTo train with an adapter again:\n\n```sh\n{''.join(commands)}```\n"
    failed = [f"- `{key}`: {why}\n" for key, why in comparison.failed().items()]
    if failed:
        page += "\n## Failed\n\n" + "".join(failed)
    return page


def table(comparison: Comparison) -> str:
    """What each method has learned and forgotten: the means over its seeds, and each of them."""
    base = comparison.base["losses"]
    before = [mean(base[blocks]) for blocks in _MEASURED.values()]
    rows = []
    for method, found in comparison.found().items():
        size = f"{comparison.whole()[method][0]['trained_parameters']:,}"
        head = [METHODS[method].title, size, f"{found.rate:g}", "mean"]
        rows.append([*head, *_cells(before, *found.each.mean(axis=0))])
        for seed, end in found.seeds.items():
            rows.append(["", "", "", str(seed), *_cells(before, *end.means)])
    perplexities = [
        f"{blocks} perplexity (before: {math.exp(loss):.2f})"
        for blocks, loss in zip(_MEASURED.values(), before, strict=True)
    ]
    return markdown_table([*_HEADER, *perplexities], rows)


def _cells(before: list[float], learned: float, forgotten: float) -> list[str]:
    losses = before[0] - learned, before[1] + forgotten
    return [f"{learned:.3f}", f"{forgotten:.3f}", *(f"{math.exp(loss):.2f}" for loss in losses)]


def spread(comparison: Comparison) -> list[str]:
    """How far seeds and documents make what was measured vary, and what follows from that."""
    found = comparison.found().values()
    lines = []
    for column, (amount, blocks) in enumerate(_MEASURED.items()):
        seeds = [float(np.ptp(one.each[:, column])) for one in found if len(one.seeds) > 1]
        documents = comparison.base["documents"][blocks]
        lines.append(
            _VARIES.format(
                amount=amount,
                seeds=_nats(max(seeds, default=math.nan)),
                others=_nats(between_documents(found, amount, documents)),
                documents=len(set(documents)),
            )
        )
    return [*lines, _CAUTION]


def _nats(amount: float) -> str:
    if math.isnan(amount):
        return "an unknown amount"
    return f"up to {amount:.3f}"


def _names(paths: list[str]) -> str:
    return ", ".join(f"`{shown(Path(path).name)}`" for path in paths)
