"""Results of a comparison without a training: planted gains, noise of blocks and seeds, and a clock."""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mica.cli.compare.report import report
from mica.cli.compare.schedule import BASE, SEEDS, SHORT, TRIAL, WHOLE, Comparison, Planned, Question

SIZES = {"validation": 6, "retained": 5, "test": 18, "retained, the rest": 5}
LOSS = 3.0  # of every block before the training
NAMES = ("mica", "lora", "random", "full")


def documents(test=18, retained=10) -> dict:
    """The document of each block, which are from so many of either text."""
    numbers = [number % retained for number in range(10)]
    return {
        "test": [number % test for number in range(SIZES["test"])],
        "retained": numbers[:5],
        "retained, the rest": numbers[5:],
    }


def question(rates=(1e-3, 2e-3, 4e-3, 8e-3), names=NAMES, **more) -> Question:
    values = {"seeds": 3, "budget": 1800.0, "steps": None, "longest": 10_000}
    blocks = {"short_blocks": SIZES["validation"] + SIZES["retained"], "whole_blocks": sum(SIZES.values())}
    return Question(rates={name: [*rates] for name in names}, **values | blocks | more)


def base(**more) -> dict:
    """What is measured before all trainings."""
    facts = Planned(TRIAL, BASE)._asdict() | {"documents": documents()}
    facts |= {"failed": None, "jobs": 2, "block_seconds": 0.5, "ended": 30.0}
    return facts | {name: [LOSS] * number for name, number in SIZES.items()} | more


@dataclass
class World:
    """What trainings by a method would give.

    ``learns``, ``forgets``: (method, rate, steps done) -> nats. ``between_blocks``: standard deviation of
    what a training learns of a block around that of all trainings; ``between_seeds``: of its mean;
    ``by_order``: of what a seed changes for all methods alike. ``fails``: how keys of trainings that fail
    begin.
    """

    learns: Callable
    forgets: Callable
    between_blocks: float = 0.0
    between_seeds: float = 0.0
    draw: int = 0
    by_order: float = 0.0
    fails: tuple[str, ...] = ()

    def __post_init__(self):
        generator = np.random.default_rng(self.draw)
        self.of_block = {name: generator.normal(0, 0.3, number) for name, number in SIZES.items()}

    def points(self, planned: Planned) -> list[dict]:
        names = {TRIAL: [], SHORT: [*SIZES][:2]}.get(planned.phase, [*SIZES])
        at = planned.method, planned.rate, planned.steps
        generator = np.random.default_rng([*f"{self.draw}{at}{planned.seed}".encode()])
        shift = generator.normal(0, self.between_seeds)
        shift += np.random.default_rng([self.draw, planned.seed]).normal(0, self.by_order)
        losses = {}
        for name in names:
            change = np.full(SIZES[name], self.forgets(*at))
            if not name.startswith("retained"):
                own = generator.normal(0, self.between_blocks, SIZES[name])
                change = -self.learns(*at) * (1 + self.of_block[name]) - shift - own
            losses[name] = (LOSS + change).tolist()
        return [{"step": planned.steps, **losses}] if names else []

    def result(self, planned: Planned, **more) -> dict:
        costs = {"start_seconds": 2.0, "step_seconds": 2.0, "block_seconds": 0.5, "jobs": 2, "ended": 0.0}
        facts = {"trained_parameters": 9_600_000, "bytes": 3 * 2**30, "failed": None}
        found = planned._asdict() | costs | facts | {"points": self.points(planned)} | more
        if planned.key.startswith(self.fails):
            found |= {"points": [], "failed": "out of memory"}
        return found


def alike(method, rate, step) -> float:
    """All methods learn as much, and more with more steps."""
    return 0.5 * (1 - math.exp(-step / 30))


def proportional(method, rate, step) -> float:
    """As much forgotten as steps were done."""
    return 0.01 * step


def gaining(name, by=0.3):
    """A method learns more by this factor."""
    return lambda method, rate, step: alike(method, rate, step) * (1 + by * (method == name))


def whole(world: World, name: str, seeds: int, rate=1e-3, steps=60) -> list[dict]:
    """Whole trainings of a method at one rate, with so many seeds."""
    phases = [WHOLE, *[SEEDS] * (seeds - 1)]
    return [world.result(Planned(phase, name, rate, steps, seed)) for seed, phase in enumerate(phases)]


def simulate(asked: Question, world: World, seconds, jobs=2, results=None, stop_after=math.inf) -> dict:
    """All results of a comparison in which a training takes ``seconds(planned)``: (start, step, block).

    ``jobs`` are done at once, by who is free first; a phase ends before the next begins.
    """
    results = {} if results is None else results
    comparison = Comparison(asked, results)
    clock = comparison.spent() or 20.0
    while True:
        todo = comparison.planned()
        if not todo or len(results) >= stop_after:
            return results
        free = [clock] * jobs
        for planned in todo:
            start, step, block = seconds(planned)
            blocks = asked.whole_blocks
            if planned.method != BASE and planned.phase <= SHORT:
                blocks = asked.short_blocks * (planned.phase - TRIAL)
            end = heapq.heappop(free) + start + planned.steps * step + blocks * block
            heapq.heappush(free, end)
            times = {"jobs": jobs, "block_seconds": block, "ended": end}
            if planned.method == BASE:
                results[planned.key] = base(**times)
            else:
                results[planned.key] = world.result(planned, start_seconds=start, step_seconds=step, **times)
        clock = max(free)


SETTINGS = {"model": "some/model", "text": ["a/text.jsonl"], "retain": ["kept.txt"], "sequence_length": 128}
FACTS = {"parameters": 135_000_000, "dtype": "float32", "device": "CPU", "jobs": 2, "tokens": 100_000}
FACTS |= {"blocks": 800, "sequence_length": 128, "validation": 6, "test": 18, "retained": 10}


def found(
    learns=alike, forgets=proportional, noise=(0.02, 0.005), settings=SETTINGS, counts=(18, 10), **more
):
    """The report of a comparison in such a world. ``counts``: of documents of held-out and retained text."""
    asked = question(**more)
    results = simulate(asked, World(learns, forgets, *noise), lambda planned: (2.0, 1.0, 0.1))
    results[BASE]["documents"] = documents(*counts)
    facts = FACTS | {"documents": dict(zip(("test", "retained"), counts, strict=True))}
    return report(Comparison(asked, results), settings, facts)
