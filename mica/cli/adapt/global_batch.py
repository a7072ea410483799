"""How processes share the blocks of a step, and when ``--resume`` may change that.

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

    Raises UsageError with the reason if they must not differ: another product, dropout, an epoch that ends
    with other blocks, or state that is sharded across the processes (FSDP).
    """
    before = settings | (checkpoints.facts(checkpoint) or {})
    if _shares(before) != _shares(settings):
        engine = _sharding_engine(before, settings)
        reason = _reason(before, settings, engine, blocks, model)
        if reason is not None:
            raise UsageError(_refusal(checkpoint, before, settings, reason))
        compared = {*SHARES} if engine else {*SHARES, "engine"}
        settings = {name: value for name, value in settings.items() if name not in compared}
    checkpoints.check(checkpoint, **settings)


def _shares(settings: dict[str, Any]) -> list[int]:
    return [settings[name] for name in SHARES]


def _sharding_engine(*every: dict[str, Any]) -> str | None:
    """The first engine in ``every`` settings that shards the optimiser's state; None if none does."""
    for settings in every:
        engine = settings.get("engine", "NO")
        if not engine.startswith(_WHOLE):
            return engine
    return None


def _refusal(checkpoint: Path, before: dict[str, Any], now: dict[str, Any], reason: str) -> str:
    changed = [name for name in SHARES if before[name] != now[name]]
    values = ", ".join(f"{name} {before[name]} (now {now[name]})" for name in changed)
    remedy = f"Continue with the same values, or start a new run from it with --adapter {checkpoint}"
    return f"--resume: {checkpoint.name} was written with {values}: {reason}. {remedy}"


def _reason(
    before: dict[str, Any],
    now: dict[str, Any],
    engine: str | None,
    blocks: int | None,
    model: nn.Module | None,
) -> str | None:
    """Why the steps with the settings ``now`` are not those with ``before``; None if they are.

    ``engine``: see `_sharding_engine`. ``blocks``, ``model``: see `check`.
    """
    step_before = math.prod(_shares(before))
    step_now = math.prod(_shares(now))
    if step_before != step_now:
        return f"{' x '.join(SHARES)} must stay {step_before}, but is now {step_now}"

    random = _source_of_randomness(now["dropout"], model)
    if random is not None:
        return f"{random} would draw different masks: each process has its own random generator"

    if engine is not None and before["processes"] != now["processes"]:
        return f"{engine} shards the optimiser's state across the processes"

    if blocks is not None and not _reads_the_same(before, now, blocks):
        reason = f"the last step of an epoch of {blocks} blocks would get different blocks"
        round_before = _round(before)
        if round_before != _round(now):
            reason += f": {' x '.join(SHARES[:2])} must stay {round_before}"
        return reason
    return None


def _round(settings: dict[str, Any]) -> int:
    """Blocks that all processes together read in a forward."""
    return settings["processes"] * settings["batch_size"]


def _reads_the_same(before: dict[str, Any], now: dict[str, Any], blocks: int) -> bool:
    """Whether the last step of an epoch reads the same of its ``blocks``, given that all others do."""
    used_before = blocks - blocks % _round(before)
    used_now = blocks - blocks % _round(now)
    if used_before == 0:  # no full round: processes fill theirs up with copies
        return False
    total = (now["steps"] or math.inf) * math.prod(_shares(now))  # may be less than an epoch
    return used_before == used_now or total <= min(used_before, used_now)


def _source_of_randomness(dropout: float, model: nn.Module | None) -> str | None:
    """What draws random numbers in training; None if nothing does, as far as ``model`` is known."""
    if dropout:
        return f"--dropout {dropout:g}"
    if model is None:
        return None
    return _random(model)


def _random(model: nn.Module) -> str | None:
    """What in a ``model`` that trains draws random numbers, by its configuration and its modules."""
    config = model.config.get_text_config().to_dict()
    for name, value in config.items():
        is_random = ("drop" in name or "jitter" in name) and not name.startswith(_HEADS)
        if is_random and isinstance(value, float) and value > 0:
            return f"the model's {name} {value:g}"
    for name, module in model.named_modules():
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd) and ".lora_" not in name
        if is_dropout and module.p > 0:
            return f"the model's {name}, {module},"
    return None


def history(checkpoint: Path | None, processes: int) -> dict[str, int]:
    """First step -> processes, for each session that changed them: of the run up to ``checkpoint``, and this.

    JSON: steps are strings. The first step is 1.
    """
    facts = {}
    if checkpoint is not None:
        facts = checkpoints.facts(checkpoint) or {}
    sessions = facts.get("processes_from")
    if not sessions:
        sessions = {"1": facts["processes"]} if "processes" in facts else {}
    if processes in list(sessions.values())[-1:]:
        return sessions
    next_step = facts.get("step", 0) + 1
    return sessions | {str(next_step): processes}


def told(history: dict[str, int]) -> str:
    """`history` in words: "processes: 1 from step 1, 2 from step 9"."""
    sessions = [f"{number} from step {step}" for step, number in history.items()]
    return f"processes: {', '.join(sessions)}"
