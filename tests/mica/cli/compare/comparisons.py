"""Results of a comparison without a training: planted gains, noise of seeds, and a clock."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mica.cli.compare.schedule import BASE, TRIAL, Comparison, Planned

SIZES = {"validation": 6, "test": 18, "retained": 10}
LOSS = 3.0  # of every block before the training
NAMES = ("mica", "lora", "full")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def comparison(results=None, rates=RATES, names=NAMES, **more) -> Comparison:
    """One that has begun, or begins; ``more``: other fields."""
    values = {"seeds": 3, "budget": 1800.0, "length": None, "longest": 10_000, "blocks": sum(SIZES.values())}
    values |= {"rates": {name: [*rates] for name in names}, "results": {} if results is None else results}
    return Comparison(**values | more)


def learning(method, rate, steps) -> float:
    """The best rate is the second; LoRA and MiCA are ahead."""
    peak = math.exp(-abs(math.log2(rate / 2e-3)))
    return {"mica": 0.5, "lora": 0.55}.get(method, 0.3) * peak * (1 - math.exp(-steps / 30))


def forgetting(method, rate, steps) -> float:
    """As much as steps were done."""
    return 0.01 * steps


class World(NamedTuple):
    """What trainings would give.

    ``learns``, ``forgets``: (method, rate, steps) -> nats. ``between_seeds``: standard deviation of what is
    learned. ``fails``: how keys of trainings that fail begin.
    """

    learns: Callable = learning
    forgets: Callable = forgetting
    between_seeds: float = 0.01
    fails: tuple[str, ...] = ()

    def result(self, planned: Planned, **more) -> dict:
        """Of a training, or of `BASE`."""
        found = planned._asdict() | {"failed": None, "ended": 0.0, "seconds": 1.0} | more
        losses = {name: [LOSS] * number for name, number in SIZES.items()}
        if planned.method == BASE:
            documents = {name: [number // 2 for number in range(size)] for name, size in SIZES.items()}
            return {"losses": losses, "documents": documents, "block_seconds": 0.5} | found
        if planned.key.startswith(self.fails):
            return found | {"losses": {}, "failed": "out of memory"}
        at = planned.method, planned.rate, planned.steps
        noise = np.random.default_rng([*f"{at}{planned.seed}".encode()]).normal(0, self.between_seeds)
        learned = self.learns(*at) + noise
        losses = {name: [LOSS - learned] * SIZES[name] for name in ("validation", "test")}
        losses["retained"] = [LOSS + self.forgets(*at)] * SIZES["retained"]
        costs = {"start_seconds": 2.0, "step_seconds": 1.0, "trained_parameters": 9_600_000}
        return costs | {"losses": {} if planned.phase == TRIAL else losses} | found


WORLD = World()


def simulate(asked: Comparison, seconds=lambda planned: (2.0, 1.0, 0.1), world=WORLD) -> dict:
    """All results of a comparison in which a training takes ``seconds(planned)``: (start, step, block)."""
    while planned := asked.next():
        start, step, block = seconds(planned)
        took = start + planned.steps * step
        if planned.method == BASE or planned.phase > TRIAL:
            took += asked.blocks * block
        times = {"start_seconds": start, "step_seconds": step, "block_seconds": block, "seconds": took}
        ended = (asked.spent() or 20.0) + took
        asked.results[planned.key] = world.result(planned, **times, ended=ended)
    return asked.results
