"""The kernels' cases, as tables: what `make emulate` runs, and what it runs with ``--all``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mica.kernels.common import padded_rank
from mica.kernels.configs import Config
from tests.emulator import kernel_checks, planned
from tests.emulator.judging import BF16, F16, F32, LAYOUTS
from tests.support.expert_cases import ROUTES
from tests.support.static_cases import TARGETS as EVERY_TARGET

TARGETS = ("sm_80", "sm_90")
DTYPES = {  # of x, of lora_A, of the product
    "bf16": (BF16, F32, BF16),
    "fp16": (F16, F32, F16),
    "fp32": (F32, F32, F32),
    "bf16 in fp32": (BF16, F32, F32),
    "bf16, 16-bit A": (BF16, BF16, BF16),
}
MAIN = ("bf16", "fp32")  # the others are the same code but for conversions
# kernel -> its check and what it always gets
KERNELS: dict[str, tuple[Callable[..., float], dict]] = {
    "down_projection": (kernel_checks.down, {}),
    "up_projection": (kernel_checks.up, {}),
    "grad_a": (kernel_checks.grad_a, {}),
    "down of experts": (kernel_checks.down, {"route": "rows of none"}),
    "up of experts": (kernel_checks.up, {"route": "rows of none", "bias": True}),
    "grad_a of experts": (kernel_checks.grad_a, {"route": "tiles"}),
    "fused_linear": (kernel_checks.fused, {}),
    "grad_magnitude": (kernel_checks.grad_magnitude, {}),
}
DENSE, EXPERTS = (
    ("down_projection", "up_projection", "grad_a"),
    ("down of experts", "up of experts", "grad_a of experts"),
)
RANKS = (16, 24, 64, 128, 256)  # one of each row of the tables of configurations


@dataclass
class Case:
    kernel: str
    dtypes: str
    options: dict
    is_quick: bool
    is_foreign: bool = False  # a configuration of another target: it may ask for too much shared memory

    @property
    def label(self) -> str:
        shown = [f"{name}={value}" for name, value in self.options.items()]
        return f"{self.kernel} {self.dtypes}: {' '.join(shown)}"

    def run(self) -> float:
        """The largest error in units of what is allowed."""
        check, always = KERNELS[self.kernel]
        return check(DTYPES[self.dtypes], **(always | self.options))


def cases(target: str) -> Iterator[Case]:
    """All of them for one target."""
    yield from _layouts()
    yield from _routes()
    yield from _splits()
    yield from _of_lora_b()
    yield from _x_first()
    yield from _of_magnitudes()
    yield from _configurations(target)


def _layouts() -> Iterator[Case]:
    """Sizes that fill no tile and such that do; strides and addresses that are aligned or not; dropout."""
    for name in DTYPES:
        is_main = name in MAIN
        for layout in LAYOUTS if is_main or name == "fp16" else ("contiguous", "odd", "shifted"):
            is_quick = name == "bf16" or (is_main and layout == "shifted")
            for tokens, width, rank in ((33, 65, 5), (70, 128, 24)):
                for dropout in (0.0, 0.4):
                    quick = is_quick and (width == 65) == bool(dropout)
                    own = {
                        "tokens": tokens,
                        "width": width,
                        "rank": rank,
                        "layout": layout,
                        "dropout": dropout,
                    }
                    for kernel in DENSE:
                        side = {"side": "A"} if kernel == "up_projection" else {}
                        yield Case(kernel, name, own | side, quick)
                    if name in MAIN or name == "fp16":
                        own |= {"side": "backward" if dropout else "forward"}
                        yield Case(
                            "fused_linear", name, own | {"out_features": 96 if rank == 24 else 37}, quick
                        )
            own = {"tokens": 33, "width": 72, "rank": 20, "layout": layout}
            yield Case("up_projection", name, own | {"out": True}, is_quick)
            yield Case("down_projection", name, own | {"side": "B"}, is_quick)


def _routes() -> Iterator[Case]:
    """Experts with and without rows; how their factors lie."""
    for name in DTYPES:
        for route in ROUTES:
            wide = route in ("tiles", "rows of none", "first and last idle")
            layouts = ("contiguous", "odd", "shifted", "columns") if wide else ("contiguous",)
            for layout in layouts:
                own = {"route": route, "width": 65, "rank": 20, "layout": layout}
                shown = layout == "contiguous" or route == "rows of none"
                for kernel in EXPERTS:
                    yield Case(kernel, name, own, name == "bf16" and shown)


def _splits() -> Iterator[Case]:
    """Sums that several programs share."""
    for name in DTYPES:
        for long in (1024, 1500):
            quick = name in MAIN and long == 1500
            for dropout in (0.0, 0.4):
                own = {"rank": 6, "dropout": dropout}
                yield Case("down_projection", name, own | {"tokens": 40, "width": long}, quick)
                yield Case("grad_a", name, own | {"tokens": long, "width": 40}, quick)
            own = {"route": "first and last idle", "width": long, "rank": 6}
            yield Case("down of experts", name, own, quick)
        yield Case(
            "grad_a", name, {"tokens": 700, "width": 72, "rank": 12, "out_dtype": BF16}, name == "bf16"
        )


def _of_lora_b() -> Iterator[Case]:
    """The gradient of lora_B, of experts, too: `grad_a` with its operands exchanged."""
    for name in DTYPES:
        for rank, tokens, width in ((5, 70, 65), (16, 700, 48), (33, 40, 130)):
            own = {"side": "B", "rank": rank, "width": width}
            yield Case("grad_a", name, own | {"tokens": tokens}, name == "bf16")
            yield Case("grad_a of experts", name, own, name == "bf16" and rank == 5)


def _of_magnitudes() -> Iterator[Case]:
    """DoRA's backward, whose factor is in fp32: tiles that are full, and such that are not."""
    for name in ("bf16", "fp16", "fp32", "bf16 in fp32"):
        for layout in ("contiguous", "shifted"):
            for tokens, width in ((33, 65), (70, 144), (64, 256)):
                own = {"tokens": tokens, "width": width, "layout": layout}
                yield Case("grad_magnitude", name, own, name == "bf16")


def _x_first() -> Iterator[Case]:
    """What makes `grad_a` multiply x first on sm_90: rows that 16 numbers divide, and its wide tile.

    Columns that fill no tile, g padded to 16 and to 32 columns, split sums, experts with and without rows.
    """
    wide = Config(64, 0, 128, 4, 4)
    for name in ("bf16", "fp16"):
        for rank, tokens, width, layout in ((5, 70, 144, "wide"), (20, 1000, 128, "contiguous")):
            own = {"rank": rank, "tokens": tokens, "width": width, "layout": layout, "config": wide}
            yield Case("grad_a", name, own, name == "bf16" or rank == 5)
        own = {"rank": 24, "route": "first and last idle", "width": 144, "config": wide}
        yield Case("grad_a of experts", name, own, name == "bf16")


def _configurations(target: str) -> Iterator[Case]:
    """Every configuration of every target, at a rank of each row of the tables."""
    sizes = {"width": 128, "tokens": 70}
    own = {
        "down_projection": sizes | {"width": 256},
        "grad_a": sizes | {"tokens": 150},
        "down of experts": {"width": 160},
        "up of experts": {"width": 128},
        "grad_a of experts": {"width": 144},
        "fused_linear": sizes | {"width": 192, "out_features": 136},
    }
    others = {  # other sizes, layout, side and dropout
        "down_projection": {"width": 257, "layout": "odd", "side": "B"},
        "up_projection": {"width": 136, "layout": "wide", "side": "A", "dropout": 0.3},
        "grad_a": {"width": 136, "tokens": 1100, "layout": "wide", "dropout": 0.3},
        "fused_linear": {"layout": "wide", "side": "backward", "dropout": 0.3},
    }
    for name, dtypes in DTYPES.items():
        for rank in RANKS if name in MAIN else (16, 128):
            for kernel in (*DENSE, *EXPERTS, "fused_linear"):
                is_fused = kernel == "fused_linear"
                if is_fused and dtypes[0] is not dtypes[2]:
                    continue
                is_shown = rank == 16 or (name in MAIN and (name == "bf16" or rank == 256 or not is_fused))
                found: dict = {}
                arguments = padded_rank(rank), dtypes[2].itemsize
                for other in (target, *EVERY_TARGET):
                    for config, is_default in planned.configurations(kernel, other, *arguments).items():
                        found.setdefault(config, (is_default, other != target))
                for config, (is_default, is_foreign) in found.items():
                    quick = is_default and is_shown and not is_foreign
                    options = {"rank": rank, "config": config, **own.get(kernel, sizes)}
                    yield Case(kernel, name, options, quick, is_foreign)
                    if kernel in others:
                        yield Case(kernel, name, options | others[kernel], False, is_foreign)
