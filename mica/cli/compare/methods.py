"""What ``mica compare`` compares: MiCA, LoRA, and full fine-tuning."""

from argparse import Namespace
from typing import NamedTuple


class Method(NamedTuple):
    """A method that is compared.

    ``title``: its name on the page. ``rates``: the learning rates that are tried; they are those of the
    study, and enclose the best one there. ``init``: PEFT's ``init_lora_weights``, or None if there is no
    adapter and all weights are trained. ``divisor``: the rank of MiCA divided by it is the rank of this
    method's adapter. LoRA trains A and B, so with half the rank it has about as many trained parameters.
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
    """The options of `mica adapt` for a training by ``method``: ``args``, with its own rank and alpha.

    ``more`` replaces others of them. The result has also ``init``, that of the method.
    """
    rank = max(1, args.rank // METHODS[method].divisor)
    alpha = max(1, round(args.alpha * rank / args.rank))  # the same scaling
    own = {"rank": rank, "alpha": alpha, "init": METHODS[method].init}
    return Namespace(**vars(args) | own | more)
