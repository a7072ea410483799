"""What ``mica compare`` compares: MiCA, MiCA with another frozen B, LoRA, and full fine-tuning."""

import argparse
from typing import NamedTuple


def doubling(lowest: float, number: int = 4) -> tuple[float, ...]:
    """``number`` learning rates, each twice the one before."""
    return tuple(float(f"{lowest * 2**power:.2g}") for power in range(number))


class Method(NamedTuple):
    """``title``: on the page. ``rates``: what is tried; those of the study, which enclose its best.

    ``divisor``: of the rank of MiCA, for that of this method's adapter; None: no adapter, all weights are
    trained. LoRA trains A and B, so that half the rank has about as many trained parameters. ``init``: PEFT's
    ``init_lora_weights``.
    """

    title: str
    rates: tuple[float, ...]
    divisor: int | None = 1
    init: str | bool = "mica"


RANDOM = "random"  # a control, which shows what MiCA's B is worth: compared only where it is named
METHODS = {
    "mica": Method("MiCA", doubling(5e-4)),
    "lora": Method("LoRA", doubling(2.5e-4), 2, init=True),
    RANDOM: Method("MiCA with a random B", doubling(5e-4)),
    "full": Method("full fine-tuning", doubling(5e-5), None),
}


def options(method: str, args: argparse.Namespace, **more) -> argparse.Namespace:
    """The options of `mica adapt` for a training by ``method``: ``args``, with the rank of the method.

    ``init`` is beside them.
    """
    divisor = METHODS[method].divisor
    rank = max(1, args.rank // (divisor or 1))
    alpha = max(1, round(args.alpha * rank / args.rank))  # the same scaling
    own = {"rank": rank, "alpha": alpha, "init": METHODS[method].init}
    return argparse.Namespace(**vars(args) | own | more)
