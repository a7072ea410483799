"""Which step was best and whether to stop, from the Trainer's log alone: a resumed run has the same one.

transformers' ``EarlyStoppingCallback`` does not compare with the measurement before training, and its count
is kept beside the log; ``load_best_model_at_end`` wants every checkpoint measured.
"""

from argparse import Namespace
from pathlib import Path

from mica.cli.adapt import checkpoints
from mica.errors import UsageError


def measured(history: list[dict], text: str = "held_out") -> dict[int, float]:
    """The perplexities on ``text`` ("held_out" or "retain") by step, in order; step 0 is before training."""
    key = f"eval_{text}_perplexity"
    return {entry["step"]: entry[key] for entry in history if key in entry}


def best(history: list[dict], args: Namespace) -> int | None:
    """The step with the lowest held-out perplexity; the first of equals.

    Step 0 does not count: nothing was trained there. None if nothing else was measured, and without
    ``--keep-best``.
    """
    if not args.keep_best:
        return None
    trained = {step: perplexity for step, perplexity in measured(history).items() if step}
    return min(trained, key=trained.get, default=None)


def reason(history: list[dict], args: Namespace) -> str | None:
    """Why to stop after the last measurement in ``history``, beginning with the option; None: go on.

    All processes have the same perplexities, and so the same answer.
    """
    perplexities = measured(history)
    if not args.patience or not perplexities:
        return None
    steps = list(perplexities)
    lowest = min(perplexities, key=perplexities.get)
    waited = len(steps) - 1 - steps.index(lowest)
    if waited < args.patience:
        return None
    return (
        f"--patience {args.patience}: no lower held-out perplexity than the "
        f"{perplexities[lowest]:.2f} of step {lowest}"
    )


def to_load(checkpoint: Path) -> Path:
    """``checkpoint``, which holds the best step. Raises UsageError if it is missing or incomplete."""
    if checkpoints.facts(checkpoint) is None:
        raise UsageError(
            f"--keep-best: {checkpoint.name}, which holds the best step, is missing or incomplete; "
            f"{checkpoints.saved(checkpoint.parent)}; --resume --no-keep-best uses the last step instead"
        )
    return checkpoint
