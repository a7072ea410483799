"""The order of ``mica compare``: settings, data and base, trainings by all processes, and the page."""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import Subset
from tqdm import tqdm

from mica.cli import loading
from mica.cli.adapt import adapter, corpus, processes
from mica.cli.adapt.packing import document_of, suit_packing
from mica.cli.compare import methods, outcomes, page, report, schedule, settings, store, workers
from mica.cli.compare.models import built
from mica.cli.compare.schedule import BASE, Planned, Question
from mica.cli.compare.training import first_not_finite, losses, train
from mica.cli.output import explained
from mica.cli.targets import has_experts
from mica.errors import UsageError

_EPOCHS = 4  # of a training at most: a text that is read more often is memorised
_TESTED = 4  # a quarter of the held-out blocks is for the choice of rates, the others for the report
_LATEST = 1.05  # of the budget: what is under way is left then, on a machine that has become slower
_OUT_OF_MEMORY = "out of memory"


class _OutOfTimeError(Exception):
    """The budget is used up."""


def compare(given: argparse.Namespace, place: workers.Place, began: float) -> int:
    """Compare, or help the main process to; returns the exit status. ``began``: on the monotonic clock.

    Raises UsageError for bad input.
    """
    output = getattr(given, "output", None)
    if output is None:
        raise UsageError("the following arguments are required: --output")
    loading.quieten_libraries()
    if place.number:
        return _help(output, place)

    resume = getattr(given, "resume", False)
    overwrite = getattr(given, "overwrite", False)
    if resume and overwrite:
        raise UsageError("--resume and --overwrite: use only one")
    ours = settings.given(given)
    if not resume:
        settings.check_required(ours)
        settings.rates(ours)
        settings.of_mica_adapt(ours, output)
    jobs = getattr(given, "jobs", None)
    if jobs is not None and place.total > 1:
        raise UsageError(f"--jobs {jobs}: {place.total} processes were started, which is that number")
    with settings.held(output, ours, resume, overwrite) as found:
        trainings = _Trainings(found, output)
        settings.begin(output, found, resume)
        try:
            return _lead(trainings, output, jobs, place, began)
        except KeyboardInterrupt:
            _note(f"stopped; mica compare --output {output} --resume goes on")
            return 130


def _note(text: str) -> None:
    print(f"mica compare: {text}", file=sys.stderr, flush=True)


class _Trainings:
    """What all trainings of a comparison have in common, and how one of them is made.

    Raises UsageError, when it is made, for what is wrong with model, options or texts.
    """

    def __init__(self, found: dict[str, object], output: Path):
        resolved = settings.of_mica_adapt(found, output)
        self.settings = found
        self.args = resolved.args
        self.source = loading.find_source(self.args.model, self.args.trust_remote_code)
        loading.check_backend(self.args.rank)
        processes.start()
        corpus.check(self.args)
        tokenizer = loading.load_tokenizer(self.source)
        self.data = corpus.gather(self.args, tokenizer)
        self.base = loading.load_model(self.source, self.args.dtype, PartialState().device)
        self.notes = [note for note in [loading.suit_processor(self.base, self.args.dtype)] if note]
        if set(self.args.text) & set(self.args.retain):
            self.notes.append("--retain names a text of --text: forgetting is measured on what is learned")
        self.base.requires_grad_(False)
        largest = self.data.largest_token_id
        loading.check_limits(self.source, self.base, self.args.sequence_length, largest)
        note = suit_packing(resolved, self.base)
        if note is not None:
            self.notes.append(note)
            self.data = corpus.gather(self.args, tokenizer)
        if not has_experts(self.base):
            self.args.experts = None
        adapter.check(self.base, self.args)
        self.sets = self._sets()
        self.question = self._question()

    def _sets(self) -> dict:
        """What whole trainings are measured on, by name; short ones on the first two."""
        held_out = self.data.held_out
        if len(held_out) < 3:
            what = f"{len(held_out)} blocks of {self.args.sequence_length} tokens are held out, 3 needed"
            raise UsageError(f"--text: {what}: a longer text, or a larger --held-out")
        choosing = _for_choosing(_documents(held_out))
        retained = range(len(self.data.retain))
        first, rest = outcomes.RETAINED
        return {
            "validation": Subset(held_out, choosing),
            first: Subset(self.data.retain, retained[::2]),
            "test": Subset(held_out, [number for number in range(len(held_out)) if number not in choosing]),
            rest: Subset(self.data.retain, retained[1::2]),
        }

    def _question(self) -> Question:
        amount = self.data.amount(self.args)
        return Question(
            rates=settings.rates(self.settings),
            seeds=settings.value(self.settings, "seeds"),
            budget=60 * settings.value(self.settings, "budget"),
            steps=settings.value(self.settings, "steps"),
            longest=_EPOCHS * amount.epoch_steps,
            short_blocks=sum(map(len, self._measured(schedule.SHORT).values())),
            whole_blocks=sum(map(len, self.sets.values())),
        )

    def _measured(self, phase: int) -> dict:
        """The sets that a training of ``phase`` is measured on."""
        if phase == schedule.TRIAL:
            return {}
        if phase == schedule.SHORT:
            return dict(list(self.sets.items())[:2])
        return self.sets

    def documents(self) -> dict[str, list[str]]:
        """Of each set the document of each block, by its digest."""
        return {name: [f"{one:x}" for one in _documents(blocks)] for name, blocks in self.sets.items()}

    def make(self, one: Planned, watch: Callable[[], None]) -> dict:
        """The result of ``one`` training, or of the measurement before all of them."""
        begin = time.perf_counter()
        if one.method == BASE:
            measured = losses(self.base, self.sets)
            name = first_not_finite(measured)
            if name is not None:
                raise UsageError(f"--model {self.args.model}: its loss on the {name} text is not finite")
            seconds = (time.perf_counter() - begin) / sum(map(len, measured.values()))
            return measured | {"failed": None, "block_seconds": seconds, "documents": self.documents()}
        args = methods.options(one.method, self.args, learning_rate=one.rate, steps=one.steps, seed=one.seed)
        try:
            with built(one.method, self.base, args) as model:
                start = time.perf_counter() - begin
                done = train(model, self.data, args, self._measured(one.phase), watch)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return {"points": [], "failed": _OUT_OF_MEMORY}
        finally:
            gc.collect()  # PEFT's models and the Trainer hold themselves in circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return done | {"start_seconds": start}


def _documents(blocks) -> list[int]:
    return [document_of(blocks, number) for number in range(len(blocks))]


def _for_choosing(documents: list[int]) -> list[int]:
    """The blocks by which rates are chosen, of the blocks of these ``documents``: about a quarter.

    Whole documents, in the order of their digests, so that none has a part in both choice and test; where
    they are too few for that, every fourth block.
    """
    wanted = len(documents) // _TESTED
    chosen: list[int] = []
    for document in sorted(set(documents)):
        blocks = [number for number, other in enumerate(documents) if other == document]
        if len(chosen) + len(blocks) <= wanted:
            chosen += blocks
    return sorted(chosen) or [*range(0, len(documents), _TESTED)]


def _is_out_of_memory(error: Exception) -> bool:
    is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_known or "can't allocate memory" in str(error)  # the CPU's allocator has no class for it


def _work(
    trainings: _Trainings,
    output: Path,
    session: workers.Session,
    number: int,
    watch: Callable[[], None],
    seen: Callable[[dict], None],
    started: Callable[[Planned], None] = lambda one: None,
) -> dict:
    """Take part in the trainings until there are none left, as process ``number``; returns all results.

    ``watch`` is called after each step, ``seen`` with all results before each next training, ``started`` with
    that.
    """
    latest = _LATEST * trainings.question.budget

    def is_too_late(phase: int) -> bool:
        """The first phase, which shows how long the others take, is always finished."""
        return phase > schedule.TRIAL and session.clock() > latest

    def make(one: Planned) -> dict:
        def watch_all() -> None:
            watch()
            if is_too_late(one.phase):
                raise _OutOfTimeError

        started(one)
        facts = one._asdict() | {"jobs": session.jobs, "worker": number}
        return facts | trainings.make(one, watch_all) | {"ended": round(session.clock(), 2)}

    def planned(results: dict) -> list[Planned]:
        todo = schedule.planned(trainings.question, results)
        return [one for one in todo if not is_too_late(one.phase)]

    try:
        return store.work(output / settings.RUNS, planned, make, seen)
    except _OutOfTimeError:
        return store.read(output / settings.RUNS)


def _help(output: Path, place: workers.Place) -> int:
    """Take part in a comparison that process 0 leads; returns the exit status."""
    watch = workers.watch_of(place.parent)
    session = workers.wait_until_open(output / settings.RUNS, watch)
    try:
        trainings = _Trainings(settings.stored(output), output)
        _work(trainings, output, session, place.number, watch, lambda results: watch())
    except UsageError:  # which the main process meets too, and says
        return 2
    return 0


def _lead(trainings: _Trainings, output: Path, jobs: int | None, place: workers.Place, began: float) -> int:
    """The comparison, by this process and its helpers, and the page. ``began``: on the monotonic clock."""
    runs = output / settings.RUNS
    earlier = _earlier(trainings, runs)
    for note in trainings.notes:
        _note(f"note: {note}")
    facts = report.facts(trainings)
    print("{tokens:,} tokens, {blocks:,} training blocks of {sequence_length}".format(**facts), flush=True)

    total = place.total
    if total == 1:
        total = jobs or workers.suitable(trainings.base)
    threads = max(1, torch.get_num_threads() // total)
    elapsed = max([one["ended"] for one in earlier.values()], default=0.0) + time.monotonic() - began
    try:
        with workers.opened(runs, elapsed, total) as session:
            if place.total > 1:
                results = _lead_work(trainings, output, session)
            else:
                torch.set_num_threads(threads)
                with workers.others(total - 1, output, threads):
                    results = _lead_work(trainings, output, session)
    except UsageError:
        if not any(one["phase"] > schedule.TRIAL for one in store.read(runs).values()):
            settings.withdraw(output)  # so that the same command, corrected, is not refused
        raise
    if not any(one["phase"] >= schedule.WHOLE for one in results.values()):
        raise UsageError(_no_whole(trainings.question, results, output))
    facts |= {"jobs": total, "threads": torch.get_num_threads()}
    found_out = report.report(trainings.question, results, trainings.settings, facts)
    page.write(output, found_out)
    print("\n".join(page.sentences(found_out, output)))
    print(f"\nThe page: {output / settings.PAGE}")
    return 0


def _earlier(trainings: _Trainings, runs: Path) -> dict:
    """The results that are there, without those that failed for lack of memory: they are tried again.

    Raises UsageError for a file that no comparison of these texts has written.
    """
    results = store.read(runs)
    for key, one in results.items():
        try:
            is_known = Planned(*(one[name] for name in Planned._fields)).key == key and "ended" in one
            if key == BASE:
                is_known = is_known and one["documents"] == trainings.documents()
        except (KeyError, TypeError, ValueError):
            is_known = False
        if not is_known:
            what = "is no result of this comparison, or of another version of mica"
            raise UsageError(f"--resume: {runs / key}.json {what}: remove it, or begin in another folder")
    with explained(f"--output {runs}: cannot be written", OSError):
        for key in [key for key, one in results.items() if one["failed"] == _OUT_OF_MEMORY]:
            (runs / f"{key}.json").unlink()
            del results[key]
    return results


def _no_whole(question: Question, results: dict, output: Path) -> str:
    """What to say where there is nothing to report."""
    failed = next((one["failed"] for one in results.values() if one["failed"]), None)
    if failed is not None and not schedule.planned(question, results):
        return f"no method came to the end of a training: {failed}"
    more = f"mica compare --output {output} --resume --budget {2 * question.budget / 60:g}"
    return f"--budget {question.budget / 60:g}: it ended before a whole training: {more} goes on"


def _lead_work(trainings: _Trainings, output: Path, session: workers.Session) -> dict:
    """`_work`, with a line for each result, by whichever process, and for what takes its time before them."""
    told: set[str] = set()

    def started(one: Planned) -> None:
        if one.method == BASE:
            _note(f"measuring the model on {trainings.question.whole_blocks} blocks")
        elif one.phase == schedule.TRIAL:
            _note(f"trying {one.steps} steps of {one.method}")

    def seen(results: dict) -> None:
        new = [key for key in results if key not in told]
        for key in sorted(new, key=lambda key: results[key]["ended"]):
            told.add(key)
            if key != BASE:
                seconds = schedule.expected(trainings.question, results) - session.clock()
                left = tqdm.format_interval(max(0.0, seconds))
                _note(f"{_line(results.get(BASE), results[key])}; {left} left")

    return _work(trainings, output, session, 0, lambda: None, seen, started)


def _line(base: dict | None, run: dict) -> str:
    """What a training has done, in a line."""
    head = f"{run['method']}, learning rate {run['rate']:g}, {run['steps']} steps, seed {run['seed']}"
    if run["failed"]:
        return f"{head}: {run['failed']}"
    if run["phase"] == schedule.TRIAL:
        return f"{run['method']}: a step takes {run['step_seconds']:.2g} s"
    end = outcomes.outcome(base, run)
    return f"{head}: learned {end.validation:.3f}, forgot {end.forgotten.mean():.3f} nats per token"
