"""What a training has learned and forgotten, and what was learned at equal forgetting.

*Forgotten* is the rise of the mean loss on the retained text, *learned* the fall of the loss on held-out
text, in nats per token, since before the training. Held-out blocks are divided: by those of "validation"
rates, stops and limits are chosen, those of "test" are reported.
"""

import math
from collections.abc import Iterable
from statistics import mean, median_low
from typing import Any, NamedTuple

Result = dict[str, Any]  # of a training: see `mica.cli.compare.training.train`
# The retained blocks, in two sets: short trainings are measured on the first, and on no block of the test.
RETAINED = ("retained", "retained, the rest")


class Point(NamedTuple):
    """A model in the course of a training. ``test``: learned, for each block of the test, if measured.

    ``share``: of its update that is left, see `at`.
    """

    step: int
    forgotten: float
    validation: float
    test: tuple[float, ...]
    share: float = 1.0

    def scaled(self, share: float) -> "Point":
        """The point that is ``share`` of the way to this one from the model before the training."""
        test = tuple(share * one for one in self.test)
        return Point(self.step, share * self.forgotten, share * self.validation, test, share)


def course(base: Result, run: Result) -> list[Point]:
    """The points of a training in order, first the model before it."""
    points = []
    for one in run["points"]:
        learned = [before - after for before, after in zip(base["test"], one.get("test", []), strict=False)]
        names = [name for name in RETAINED if name in one]
        forgotten = _mean_of(one, names) - _mean_of(base, names)
        validation = mean(base["validation"]) - mean(one["validation"])
        points.append(Point(one["step"], forgotten, validation, tuple(learned)))
    start = Point(0, 0.0, 0.0, (0.0,) * len(points[0].test)) if points else Point(0, 0.0, 0.0, ())
    return [start, *points]


def _mean_of(losses: Result, names: list[str]) -> float:
    return mean(loss for name in names for loss in losses[name])


def at(points: list[Point], limit: float) -> Point:
    """The best point within ``limit``, by validation.

    A point that has forgotten more counts as if its update had been scaled back, on the line to the model
    before the training. An adapter can be (by its scaling), and then it loses less of what was learned than
    that line. A rule with a jump, like "before the limit is passed", makes noise of forgetting decide.
    """
    found = []
    for point in points:
        if point.forgotten > limit:
            point = point.scaled(limit / point.forgotten)
        found.append(point)
    return max(found, key=lambda point: point.validation)


class Choice(NamedTuple):
    """The training of a method that has learned most within a limit, with all its seeds.

    ``seeds``: of each seed its point; it was chosen by that of 0. ``courses``: of each seed all points.
    """

    rate: float
    steps: int
    seeds: dict[int, Point]
    courses: dict[int, list[Point]]

    @property
    def first(self) -> Point:
        return self.seeds[0]

    @property
    def forgotten(self) -> float:
        """The mean over all seeds."""
        return mean(point.forgotten for point in self.seeds.values())

    def at_stop(self, number: int) -> "Choice":
        """The same training, taken after its stop of that number; 0 is before it."""
        seeds = {seed: points[number] for seed, points in self.courses.items()}
        return self._replace(seeds=seeds)


def choose(base: Result, runs: Iterable[Result], limit: float) -> Choice | None:
    """The choice among ``runs`` of one method, by their first seed; None if none has learned anything."""
    runs = [run for run in runs if run["points"]]
    firsts = [run for run in runs if run["seed"] == 0]
    scored = [(at(course(base, run), limit).validation, run) for run in firsts]
    score, best = max(scored, key=lambda pair: pair[0], default=(0.0, None))
    if score <= 0:
        return None
    same = [run for run in runs if (run["rate"], run["steps"]) == (best["rate"], best["steps"])]
    courses = {run["seed"]: course(base, run) for run in sorted(same, key=lambda run: run["seed"])}
    seeds = {seed: at(points, limit) for seed, points in courses.items()}
    return Choice(best["rate"], best["steps"], seeds, courses)


def common_limit(base: Result, runs: dict[str, list[Result]]) -> float:
    """The forgetting at which methods are compared: what the middle one of them forgets to learn most.

    Of an even number, the lower of the two in the middle. At least 0: some texts help each other.
    """
    chosen = [choose(base, of_method, math.inf) for of_method in runs.values()]
    forgotten = [one.first.forgotten for one in chosen if one is not None]
    if not forgotten:
        return 0.0
    return max(0.0, median_low(forgotten))
