"""Results of a comparison without a training: planted gains, noise of blocks and seeds, and a clock."""

import heapq
import math

import numpy as np

from mica.cli.compare.report import report
from mica.cli.compare.schedule import BASE, SEEDS, SHORT, TRIAL, WHOLE, Comparison, Planned, Question

SIZES = {"validation": 6, "retained": 5, "test": 18, "retained, the rest": 5}
LOSS = 3.0  # of every block before the training


def question(rates=(1e-3, 2e-3, 4e-3, 8e-3), names=("mica", "lora", "random", "full"), **more) -> Question:
    values = {"seeds": 3, "budget": 1800.0, "steps": None, "longest": 10_000}
    blocks = {"short_blocks": SIZES["validation"] + SIZES["retained"], "whole_blocks": sum(SIZES.values())}
    return Question(rates={name: [*rates] for name in names}, **values | blocks | more)


def base(**more) -> dict:
    """What is measured before all trainings."""
    facts = Planned(TRIAL, BASE)._asdict()
    facts |= {"failed": None, "jobs": 2, "block_seconds": 0.5, "ended": 30.0}
    return facts | {name: [LOSS] * number for name, number in SIZES.items()} | more


class World:
    """What trainings by a method would give.

    ``learns``, ``forgets``: (method, rate, steps done) -> nats. ``between_blocks``: standard deviation of
    what a training learns of a block around that of all trainings; ``between_seeds``: of its mean;
    ``by_order``: of what a seed changes for all methods alike.
    """

    def __init__(self, learns, forgets, between_blocks=0.0, between_seeds=0.0, draw=0, by_order=0.0):
        self.learns = learns
        self.forgets = forgets
        self.between_blocks = between_blocks
        self.between_seeds = between_seeds
        self.draw = draw
        self.by_order = by_order
        generator = np.random.default_rng(draw)
        self.of_block = {name: generator.normal(0, 0.3, number) for name, number in SIZES.items()}

    def points(self, one: Planned) -> list[dict]:
        text = f"{self.draw}{one.method}{one.rate}{one.steps}{one.seed}"
        generator = np.random.default_rng([*text.encode()])
        shift = generator.normal(0, self.between_seeds) if self.between_seeds else 0.0
        order = np.random.default_rng([self.draw, one.seed])
        shift += order.normal(0, self.by_order) if self.by_order else 0.0
        own = {name: generator.normal(0, 1, number) * self.between_blocks for name, number in SIZES.items()}
        if one.phase == TRIAL:
            return []
        names = [*SIZES][:2] if one.phase == SHORT else [*SIZES]
        losses = {}
        for name in names:
            change = self.forgets(one.method, one.rate, one.steps)
            if not name.startswith("retained"):
                gain = self.learns(one.method, one.rate, one.steps)
                change = -gain * (1 + self.of_block[name]) - shift - own[name]
            losses[name] = (LOSS + change * np.ones(SIZES[name])).tolist()
        return [{"step": one.steps, **losses}]

    def result(self, one: Planned, **more) -> dict:
        costs = {"start_seconds": 2.0, "step_seconds": 2.0, "block_seconds": 0.5, "jobs": 2, "ended": 0.0}
        sizes = {"trained_parameters": 100, "bytes": 1000}
        return one._asdict() | costs | sizes | {"points": self.points(one), "failed": None} | more


def alike(method, rate, step) -> float:
    """All methods learn as much, and more with more steps."""
    return 0.5 * (1 - math.exp(-step / 30))


def proportional(method, rate, step) -> float:
    """As much forgotten as steps were done."""
    return 0.01 * step


def whole(world: World, name: str, seeds: int, rate=1e-3, steps=60) -> list[dict]:
    """Whole trainings of a method at one rate, with so many seeds."""
    found = []
    for seed in range(seeds):
        found.append(world.result(Planned(SEEDS if seed else WHOLE, name, rate, steps, seed)))
    return found


def simulate(asked: Question, world: World, seconds, jobs=2, results=None, stop_after=math.inf) -> dict:
    """All results of a comparison in which a training takes ``seconds(planned)``: (start, step, block).

    ``jobs`` are done at once, by who is free first; a phase ends before the next begins.
    """
    results = {} if results is None else results
    comparison = Comparison(asked, results)
    clock = max([one["ended"] for one in results.values()], default=20.0)
    while True:
        todo = comparison.planned()
        if not todo or len(results) >= stop_after:
            return results
        free = [clock] * jobs
        for one in todo:
            start, step, block = seconds(one)
            blocks = asked.whole_blocks
            if one.method != BASE and one.phase <= SHORT:
                blocks = asked.short_blocks * (one.phase - TRIAL)
            end = heapq.heappop(free) + start + one.steps * step + blocks * block
            heapq.heappush(free, end)
            times = {"start_seconds": start, "step_seconds": step, "block_seconds": block, "ended": end}
            if one.method == BASE:
                results[one.key] = base(jobs=jobs, block_seconds=block, ended=end)
            else:
                results[one.key] = world.result(one, jobs=jobs, **times)
        clock = max(free)


FACTS = {
    "parameters": 135_000_000,
    "dtype": "float32",
    "device": "CPU",
    "jobs": 2,
    "threads": 1,
    "tokens": 100_000,
    "blocks": 800,
    "sequence_length": 128,
    "validation": 6,
    "test": 18,
    "retained": 10,
    "documents": {"test": 18, "retained": 10},
}
SETTINGS = {"model": "some/model", "text": ["a/text.jsonl"], "retain": ["kept.txt"], "sequence_length": 128}
NAMES = ("mica", "lora", "random", "full")
BYTES = {"mica": 3 * 2**30, "random": 3 * 2**30, "lora": 4 * 2**30, "full": 16 * 2**30}


class Sized(World):
    """The world, with the memory that methods need."""

    def result(self, one, **more):
        return super().result(one, **more) | {"bytes": BYTES[one.method], "trained_parameters": 9_600_000}


def found(learns=alike, forgets=proportional, noise=(0.02, 0.005), settings=SETTINGS, documents=18, **more):
    """The report of a comparison in such a world. ``documents``: that the blocks of the test are from."""
    asked = question(**more)
    results = simulate(asked, Sized(learns, forgets, *noise), lambda one: (2.0, 1.0, 0.1))
    named = {name: [*range(number)] for name, number in SIZES.items()}
    named["test"] = [number % documents for number in named["test"]]
    results[BASE]["documents"] = named
    return report(
        Comparison(asked, results), settings, FACTS | {"documents": {"test": documents, "retained": 10}}
    )


def gaining(name, by=0.3):
    def learns(method, rate, step):
        return alike(method, rate, step) * (1 + by * (method == name))

    return learns
