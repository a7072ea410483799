"""Cases whose kernel, dtypes, shapes, strides, rank, dropout and configuration are drawn from a seed.

The case with one number of one seed is always the same, operands included, however many are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate

from mica.kernels.common import padded_rank
from tests.emulator import planned
from tests.emulator.cases import DTYPES, EXPERTS, KERNELS, Case
from tests.emulator.judging import BF16, F32, LAYOUTS

WIDE_RANKS = (48, 64, 100, 128, 200, 256)


def drawn(target: str, seed: int, count: int) -> Iterator[Case]:
    """The first ``count`` cases of this seed for one target."""
    for number in range(count):
        yield _case(target, f"drawn {number} of seed {seed}", random.Random(f"{target} {seed} {number}"))


def _case(target: str, name: str, random: random.Random) -> Case:
    kernel = random.choice(list(KERNELS))
    names = [
        name for name, (x, _, product) in DTYPES.items() if x is product or not kernel.startswith("fused")
    ]
    dtypes = random.choice(names)
    rank = random.choice(WIDE_RANKS) if random.random() < 0.2 else random.randint(1, 40)
    options = {
        "rank": rank,
        "width": _size(random, 200),
        "layout": random.choice(LAYOUTS),
        "config": _configuration(target, kernel, dtypes, rank, random),
    }
    if kernel in EXPERTS:
        options |= _of_experts(kernel, random)
    else:
        options |= _dense(kernel, random)
    return Case(kernel, dtypes, options, is_quick=True, name=name, seed=random.getrandbits(32))


def _size(random: random.Random, largest: int) -> int:
    """Any size, and as often one whose rows are loaded 128 bits at a time."""
    return random.choice([random.randint(1, largest), 16 * random.randint(1, largest // 16)])


def _configuration(target: str, kernel: str, dtypes: str, rank: int, random: random.Random):
    """The plan's own, or any of the target's."""
    itemsize = DTYPES[dtypes][2].itemsize
    found = planned.configurations(kernel, target, padded_rank(rank), itemsize)
    return random.choice([None, *found])


def _of_experts(kernel: str, random: random.Random) -> dict:
    counts = [
        random.choice([0, random.randint(1, 8), random.randint(1, 90)]) for _ in range(random.randint(1, 6))
    ]
    ends = tuple(accumulate(counts))
    options: dict = {"route": (max(1, ends[-1] + random.randint(0, 5)), ends)}
    if kernel == "up of experts":
        options["bias"] = random.random() < 0.5
    if kernel == "grad_a of experts":
        options["out_dtype"] = random.choice([F32, BF16])
    return options


def _dense(kernel: str, random: random.Random) -> dict:
    options: dict = {"tokens": random.randint(1, 90), "dropout": random.choice([0.0, 0.0, 0.1, 0.6])}
    if kernel == "down_projection":
        options["side"] = random.choice("AB")
        if random.random() < 0.3:  # a sum that is split
            options["width"] = random.randint(500, 1500)
    elif kernel == "up_projection":
        options |= {"side": random.choice("AB"), "out": random.random() < 0.3}
    elif kernel == "grad_a":
        options["out_dtype"] = random.choice([F32, BF16])
        if random.random() < 0.3:  # a sum that is split
            options["tokens"] = random.randint(300, 1000)
    else:
        options |= {"side": random.choice(["forward", "backward"]), "out_features": _size(random, 150)}
    return options
