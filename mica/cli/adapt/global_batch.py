"""The blocks of a step, and the processes that share them: when ``--resume`` may share them otherwise.

An optimiser step reads the next processes x batch_size x gradient_accumulation_steps blocks of an epoch's
order, which the seed alone decides. The same product is the same training, with sums in another order.
"""

import math
from pathlib import Path
from typing import Any

from torch import nn

from mica.cli.adapt import checkpoints
from mica.errors import UsageError

SHARES = ("processes", "batch_size", "gradient_accumulation_steps")
_WHOLE = ("NO", "MULTI_")  # engines (accelerate's) where each process has all of the optimiser's state
_HEADS = ("classifier", "summary")  # dropout of what a causal language model does not have


def check(
    checkpoint: Path, settings: dict[str, Any], blocks: int | None = None, model: nn.Module | None = None
) -> None:
    """`checkpoints.check`, which lets `SHARES` differ where a step's blocks do not.

    ``settings``: with `SHARES`, "dropout" and "steps". ``blocks``: of an epoch; ``model``: the base; None
    where they are not known yet.

    Raises UsageError with the reason if they must not: another product, dropout, an epoch that ends with
    other blocks, or state that is divided among the processes (FSDP).
    """
    found = settings | (checkpoints.facts(checkpoint) or {})
    before, now = ([each[name] for name in SHARES] for each in (found, settings))
    if before != now:
        engines = [each.get("engine", "NO") for each in (found, settings)]
        divided = [engine for engine in engines if not engine.startswith(_WHOLE)]
        if reason := _reason(before, now, settings, divided, blocks, model):
            changed = zip(SHARES, before, now, strict=True)
            values = ", ".join(f"{name} {old} (now {new})" for name, old, new in changed if old != new)
            again = f"Continue with the same, or start afresh from it by --adapter {checkpoint}"
            raise UsageError(f"--resume: {checkpoint.name} was written with {values}: {reason}. {again}")
        same = {*SHARES} if divided else {*SHARES, "engine"}
        settings = {name: value for name, value in settings.items() if name not in same}
    checkpoints.check(checkpoint, **settings)


def _reason(before, now, settings, divided, blocks, model) -> str | None:
    """Why the steps after ``now`` are not those after ``before``; None if they are."""
    steps, rounds = ([math.prod(each[:count]) for each in (before, now)] for count in (3, 2))
    if steps[0] != steps[1]:
        return f"{' x '.join(SHARES)} must be {steps[0]} as before, and is {steps[1]}"
    dropout = settings["dropout"]
    random = f"--dropout {dropout:g}" if dropout else model and _random(model)
    if random:
        return f"{random} would draw different masks: each process has its own generator"
    if before[0] != now[0] and divided:
        return f"{divided[0]} divides the optimiser's state among the processes"
    used = [blocks - blocks % size for size in rounds] if blocks is not None else [1, 1]
    read = (settings["steps"] or math.inf) * steps[0]  # in all, which may be less than an epoch
    if (used[0] != used[1] and read > min(used)) or used[0] == 0:
        same = f": {' x '.join(SHARES[:2])} must be {rounds[0]} as before" * (rounds[0] != rounds[1])
        return f"the last step of an epoch of {blocks} blocks would get different blocks{same}"
    return None


def _random(model: nn.Module) -> str | None:
    """What in a ``model`` that trains draws random numbers, by its configuration and its modules."""
    config = model.config.get_text_config().to_dict()
    for name, value in config.items():
        is_random = ("drop" in name or "jitter" in name) and not name.startswith(_HEADS)
        if is_random and isinstance(value, float) and value > 0:
            return f"the model's {name} {value:g}"
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p and ".lora_" not in name:
            return f"the model's {name}, {module},"
    return None


def history(checkpoint: Path | None, processes: int) -> dict[str, int]:
    """First step of a session -> its processes, where they changed: of the run up to ``checkpoint`` and on.

    JSON. The first step is 1.
    """
    facts = (checkpoint and checkpoints.facts(checkpoint)) or {}
    earlier = facts.get("processes_from") or ({"1": facts["processes"]} if "processes" in facts else {})
    if processes in list(earlier.values())[-1:]:
        return earlier
    return earlier | {str(facts.get("step", 0) + 1): processes}


def told(history: dict[str, int]) -> str:
    """`history` in words: "processes: 1 from step 1, 2 from step 9"."""
    return "processes: " + ", ".join(f"{number} from step {step}" for step, number in history.items())
