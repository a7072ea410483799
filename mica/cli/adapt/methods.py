"""What `mica adapt` trains: MiCA, LoRA or DoRA. Needs no torch, as the command line is made from it."""

from typing import NamedTuple


class Method(NamedTuple):
    """A kind of adapter.

    ``title``: its name in texts. ``paper``: its address. ``config``: what `peft.LoraConfig` takes for it.
    ``says``: what it does, in Markdown, where ``{rank}`` stands for the rank.
    """

    title: str
    paper: str
    config: dict[str, object]
    says: str


METHODS = {
    "mica": Method(
        "MiCA",
        "https://arxiv.org/abs/2604.01694",
        {"init_lora_weights": "mica"},
        "MiCA adds `s·B·A` to an adapted weight `W`: `B` holds the {rank} left singular vectors of `W` with "
        "the smallest singular values and stays frozen, `A` starts at zero and is trained.",
    ),
    "lora": Method(
        "LoRA",
        "https://arxiv.org/abs/2106.09685",
        {"init_lora_weights": True},
        "LoRA adds `s·B·A` of rank {rank} to an adapted weight: `A` starts at random, `B` at zero, and both "
        "are trained.",
    ),
    "dora": Method(
        "DoRA",
        "https://arxiv.org/abs/2402.09353",
        {"init_lora_weights": True, "use_dora": True},
        "DoRA adds `s·B·A` of rank {rank} to an adapted weight `W`, and gives each row of the sum a trained "
        "length, which starts as that of the row of `W`. `A`, `B` and the lengths are trained.",
    ),
}
