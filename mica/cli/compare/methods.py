"""What ``mica compare`` compares: the methods of `mica adapt`, and full fine-tuning."""

from argparse import Namespace
from typing import NamedTuple

FULL = "full"


class Method(NamedTuple):
    """A method that is compared.

    ``title``: its name on the page. ``rates``: the learning rates that are tried; they are those of the
    study, and enclose the best one there (DoRA, which it did not have, gets LoRA's). ``divisor``: the rank of
    MiCA divided by it is the rank of this method's adapter. LoRA trains A and B, so with half the rank it has
    about as many trained parameters.
    """

    title: str
    rates: tuple[float, ...]
    divisor: int = 1


_OF_LORA = (2.5e-4, 5e-4, 1e-3, 2e-3)
METHODS = {
    "mica": Method("MiCA", (5e-4, 1e-3, 2e-3, 4e-3)),
    "lora": Method("LoRA", _OF_LORA, divisor=2),
    "dora": Method("DoRA", _OF_LORA, divisor=2),
    FULL: Method("full fine-tuning", (5e-5, 1e-4, 2e-4, 4e-4)),
}
DEFAULT = ("mica", "lora", FULL)


def options(method: str, args: Namespace, **more) -> Namespace:
    """The options of `mica adapt` for a training by ``method``: ``args``, with its own rank and alpha.

    ``more`` replaces others of them.
    """
    rank = max(1, args.rank // METHODS[method].divisor)
    alpha = max(1, round(args.alpha * rank / args.rank))  # the same scaling
    return Namespace(**vars(args) | {"method": method, "rank": rank, "alpha": alpha} | more)
