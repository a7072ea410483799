"""The order of ``mica compare``: settings, data and base, trainings, and the page."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from mica.cli import loading
from mica.cli.compare import outcomes, page, report, schedule, settings, workers
from mica.cli.compare.schedule import BASE, Comparison, Planned, Results
from mica.cli.compare.trainings import OUT_OF_MEMORY, Trainings
from mica.cli.folder import exclusive, undo_on_error
from mica.cli.output import write_json
from mica.cli.record import Record
from mica.errors import UsageError

_UNDER_WAY = {
    schedule.TRIAL: "the model, and the first steps of each method",
    schedule.SHORT: "short trainings",
    schedule.WHOLE: "whole trainings",
    schedule.SEEDS: "further seeds",
}
_LATEST = 1.05  # of the budget: what is under way is left then, on a machine that has become slower


def compare(given: argparse.Namespace, began: float) -> int:
    """Compare; returns the exit status. ``began``: on the monotonic clock.

    Raises UsageError for bad input.
    """
    resume = getattr(given, "resume", False)
    settings.check_required(given, resume)
    output = given.output
    loading.quieten_libraries()
    ours = settings.given(given)
    if not resume:
        settings.rates(ours)
        settings.of_mica_adapt(ours, output)
    with exclusive(output):
        if resume:
            ours = settings.resumed(output, ours)
        else:
            settings.check_output(output)
        try:
            return _compare(ours, output, resume, began)
        except KeyboardInterrupt:
            if (output / settings.FILE).exists():
                _note(f"stopped; mica compare --output {output} --resume goes on")
                return 130
            raise


def _note(text: str) -> None:
    print(f"mica compare: {text}", file=sys.stderr, flush=True)


def _compare(ours: dict[str, object], output: Path, resume: bool, began: float) -> int:
    """The comparison, once the folder is its own, and the page."""
    gpus = torch.cuda.device_count()  # 0 on a CPU
    jobs = max(1, gpus)
    with ExitStack() as stack:
        with ExitStack() as checks:  # what they refuse leaves nothing
            if not resume:
                checks.enter_context(undo_on_error(output))
            device = torch.device("cpu") if gpus > 1 else None  # the workers have the GPUs then
            trainings = Trainings(ours, output, device)
            runs = output / settings.RUNS
            results = _earlier(trainings, runs)
            settings.write(output, ours)
            for note in filter(None, trainings.notes):
                _note(f"note: {note}")
            facts = report.facts(trainings) | {"jobs": jobs}
            print("{tokens:,} tokens, {blocks:,} training blocks of {sequence_length}".format(**facts))

            comparison = Comparison(trainings.question, results)
            zero = time.time() - (comparison.spent() + time.monotonic() - began)
            latest = zero + _LATEST * trainings.question.budget
            make = partial(trainings.make_each, latest=latest)
            if gpus > 1:
                pool = stack.enter_context(workers.pool(gpus, ours, output))
                make = partial(workers.make, pool, latest=latest)
            progress = _Progress(comparison, runs, zero, jobs)
            progress.do(make, last=schedule.TRIAL)
            comparison.planned()  # raises if the budget is too small for anything
        progress.do(make)

    if not any(result["phase"] >= schedule.WHOLE for result in results.values()):
        raise UsageError(_no_whole(comparison, output))
    found_out = report.report(comparison, ours, facts)
    page.write(output, found_out)
    print("\n".join(page.sentences(found_out, output)))
    print(f"\nThe page: {output / settings.PAGE}")
    return 0


class _Progress(NamedTuple):
    """What is left to do of a comparison, whose results are files in ``runs``, too.

    ``zero``: when the clock of all starts of the comparison was at 0, Unix time. ``jobs``: trainings at once.
    """

    comparison: Comparison
    runs: Path
    zero: float
    jobs: int

    def do(self, make: Callable[[list[Planned]], Iterator], last: int = schedule.SEEDS) -> None:
        """Do what is planned, up to the phase ``last``, until nothing is left or the budget is used up.

        ``make`` gives each of some trainings with its result, or None if that had to be given up, in the
        order of their ends.
        """
        while True:
            todo = [each for each in self.comparison.planned() if each.phase <= last]
            if not todo:
                return
            _note(f"{_UNDER_WAY[todo[0].phase]}: {len(todo)} to do")
            for planned, result in make(todo):
                if result is None:
                    return
                self._add(planned, result)

    def _add(self, planned: Planned, result: dict) -> None:
        clock = time.time() - self.zero
        result |= {"jobs": self.jobs, "ended": round(clock, 2)}
        write_json("--output", self.runs / f"{planned.key}.json", result, Record(self.runs.parent))
        self.comparison.results[planned.key] = result
        if planned.method != BASE:
            used = f"{clock / 60:.1f} of {self.comparison.question.budget / 60:g} minutes"
            _note(f"{_line(self.comparison, result)}; {used}")


def _earlier(trainings: Trainings, runs: Path) -> Results:
    """The results that are there, without those that failed for lack of memory: they are tried again.

    Raises UsageError for a file that no comparison of these texts has written.
    """
    documents = trainings.documents()
    results = {}
    for path in sorted(runs.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            key = Planned(*(result[name] for name in Planned._fields)).key
            is_ours = key == path.stem and result.get("documents", documents) == documents
        except (KeyError, TypeError, ValueError):
            is_ours = False
        if not is_ours:
            what = "is no result of this comparison, or of another version of mica"
            raise UsageError(f"--resume: {path} {what}: remove it, and its training is done again")
        if result["failed"] != OUT_OF_MEMORY:
            results[path.stem] = result
    return results


def _no_whole(comparison: Comparison, output: Path) -> str:
    """What to say where there is nothing to report."""
    failed = [result["failed"] for result in comparison.results.values() if result["failed"]]
    if failed and not comparison.planned():
        return f"no method came to the end of a training: {failed[0]}"
    minutes = comparison.question.budget / 60
    more = f"mica compare --output {output} --resume --budget {2 * minutes:g}"
    return f"--budget {minutes:g}: it ended before a whole training: {more} goes on"


def _line(comparison: Comparison, run: dict) -> str:
    """What a training has done, in a line."""
    head = f"{run['method']}, learning rate {run['rate']:g}, {run['steps']} steps, seed {run['seed']}"
    if run["failed"]:
        return f"{head}: {run['failed']}"
    if run["phase"] == schedule.TRIAL:
        return f"{run['method']}: a step takes {run['step_seconds']:.2g} s"
    end = outcomes.outcome(comparison.base, run)
    return f"{head}: learned {end.validation:.3f}, forgot {end.forgotten.mean():.3f} nats per token"
