"""The order of ``mica compare``: settings, data and base, trainings, and the page."""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

from mica.cli import loading
from mica.cli.adapt.options import Values, check_required
from mica.cli.compare import page, schedule, settings
from mica.cli.compare.options import OPTIONS
from mica.cli.compare.outcomes import outcome
from mica.cli.compare.schedule import BASE, Comparison, Planned, Results
from mica.cli.compare.trainings import OUT_OF_MEMORY, Trainings
from mica.cli.folder import exclusive, undo_on_error
from mica.cli.output import explained, tell, write_json, write_unless_edited
from mica.cli.record import Record
from mica.errors import UsageError


def compare(given: argparse.Namespace, began: float) -> int:
    """Compare; returns the exit status. ``began``: on the monotonic clock.

    Raises UsageError for bad input.
    """
    resume = getattr(given, "resume", False)
    needed = [OPTIONS["output"]] if resume else OPTIONS.values()  # its folder has the others
    check_required(needed, vars(given))
    output = given.output
    loading.quieten_libraries()
    said = settings.given(given)
    ours = settings.DEFAULTS | said
    if not resume:
        settings.rates(ours)
        settings.of_mica_adapt(ours, output)
    with exclusive(output):
        if resume:
            ours = settings.resumed(output, said)
        else:
            settings.check_output(output)
        try:
            return _compare(ours, output, resume, began)
        except KeyboardInterrupt:
            if any((output / settings.RUNS).glob("*.json")):
                _note(f"stopped; mica compare --output {output} --resume goes on")
                return 130
            raise


def _note(text: str) -> None:
    tell(f"mica compare: {text}")


def _compare(ours: Values, output: Path, resume: bool, began: float) -> int:
    """The comparison, once the folder is its own, and the page."""
    _note("reading model and texts ...")
    with nullcontext() if resume else undo_on_error(output):  # what is refused at once leaves nothing
        trainings = Trainings(ours, output)
        comparison = trainings.comparison(ours, _earlier(output, trainings.content))
        settings.write(output, ours)
        zero = time.time() - (comparison.spent() + time.monotonic() - began)
        if BASE not in comparison.results:
            _do(Planned(schedule.TRIAL, BASE), comparison, trainings, output, zero)
    while planned := comparison.next():
        _do(planned, comparison, trainings, output, zero)

    left = comparison.left()
    missing = ""
    if left:
        missing = (
            f"the budget is used up; trainings of this kind left: {len(left)}; "
            f"mica compare --output {output} --resume --budget {comparison.minutes_for(left)} does them"
        )
    if not comparison.whole():
        failed = next(iter(comparison.failed().values()), "")
        raise UsageError(missing or f"no method came to the end of a training: {failed}")
    file = output / settings.PAGE
    write_unless_edited("--output", file, page.markdown(comparison, trainings.facts()))
    print(page.table(comparison), *page.spread(comparison), f"The page: {file}", sep="\n\n")
    if missing:
        _note(missing)
    return 0


def _do(planned: Planned, comparison: Comparison, trainings: Trainings, output: Path, zero: float) -> None:
    """Do a training and write its result to a file, too; say so before and after.

    ``zero``: when the clock of all starts of the comparison was at 0, Unix time.
    """
    duration = f", about {comparison.seconds(planned):.0f} s" if planned.phase > schedule.TRIAL else ""
    _note(f"{_name(planned)} ({len(comparison.left())} of this kind left{duration}) ...")
    result = trainings.make(planned)
    clock = time.time() - zero
    result["ended"] = round(clock, 2)
    write_json("--output", output / settings.RUNS / f"{planned.key}.json", result, Record(output))
    comparison.results[planned.key] = result
    _note(
        f"{_name(planned)}: {_said(comparison, result)}; "
        f"{clock / 60:.1f} of {comparison.budget / 60:g} minutes"
    )


def _earlier(output: Path, content: dict[str, str]) -> Results:
    """The results that are there, without those that failed for lack of memory: they are tried again.

    Raises UsageError for a file that no comparison has written, or of another ``content``.
    """
    results = {}
    for path in sorted((output / settings.RUNS).glob("*.json")):
        advice = f"--resume: {path}: remove it, and its training is done again"
        with explained(advice, (LookupError, TypeError, ValueError)):
            result = json.loads(path.read_bytes())
            if Planned(*(result[name] for name in Planned._fields)).key != path.stem:
                raise ValueError("it is no result of this comparison")
            changed = [name for name, digest in content.items() if result["content"][name] != digest]
        if changed:
            raise UsageError(
                f"--{changed[0]}: its content is not what {path} was measured with: begin another comparison"
            )
        if result["failed"] != OUT_OF_MEMORY:
            results[path.stem] = result
    return results


def _name(planned: Planned) -> str:
    if planned.method == BASE:
        return "the model before all trainings"
    if planned.phase == schedule.TRIAL:
        return f"first steps of {planned.method}"
    return f"{planned.method}, learning rate {planned.rate:g}, {planned.steps} steps, seed {planned.seed}"


def _said(comparison: Comparison, run: dict) -> str:
    """What was measured, in a few words."""
    if run["failed"]:
        return run["failed"]
    if run["phase"] == schedule.TRIAL:
        return f"took {run['seconds']:.1f} s"
    end = outcome(comparison.base, run)
    return f"learned {end.validation:.3f}, forgot {end.means[1]:.3f} nats per token"
