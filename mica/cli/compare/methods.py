"""What ``mica compare`` compares: MiCA, LoRA, and full fine-tuning."""

from argparse import Namespace
from typing import NamedTuple


class Method(NamedTuple):
    """``title``: on the page. ``rates``: what is tried; those of the study, which enclose its best.

    ``init``: PEFT's ``init_lora_weights``; None: no adapter, all weights are trained. ``divisor``: of the
    rank of MiCA, for that of this method's adapter. LoRA trains A and B, so that half the rank has about as
    many trained parameters.
    """

    title: str
    rates: tuple[float, ...]
    init: str | bool | None
    divisor: int = 1


METHODS = {
    "mica": Method("MiCA", (5e-4, 1e-3, 2e-3, 4e-3), "mica"),
    "lora": Method("LoRA", (2.5e-4, 5e-4, 1e-3, 2e-3), init=True, divisor=2),
    "full": Method("full fine-tuning", (5e-5, 1e-4, 2e-4, 4e-4), init=None),
}


def options(method: str, args: Namespace, **more) -> Namespace:
    """The options of `mica adapt` for a training by ``method``: ``args``, with the rank of the method.

    ``init`` is beside them.
    """
    rank = max(1, args.rank // METHODS[method].divisor)
    alpha = max(1, round(args.alpha * rank / args.rank))  # the same scaling
    own = {"rank": rank, "alpha": alpha, "init": METHODS[method].init}
    return Namespace(**vars(args) | own | more)
