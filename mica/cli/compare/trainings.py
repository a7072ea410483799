"""What all trainings of a comparison have in common, and how one of them is made."""

import gc
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import Subset

from mica.cli import loading
from mica.cli.adapt import adapter, corpus, processes
from mica.cli.adapt.packing import document_of, suit_packing
from mica.cli.compare import methods, outcomes, schedule, settings
from mica.cli.compare.models import built
from mica.cli.compare.schedule import BASE, Planned, Question
from mica.cli.compare.training import is_finite, losses, train
from mica.cli.targets import has_experts
from mica.errors import UsageError

OUT_OF_MEMORY = "out of memory"
_EPOCHS = 4  # of a training at most: a text that is read more often is memorised
_TESTED = 4  # a quarter of the held-out blocks is for the choice of rates, the others for the report


class _OutOfTimeError(Exception):
    """The budget is used up."""


class Trainings:
    """``settings``: of the comparison; ``args``: of `mica adapt`, as far as all trainings share them.

    ``base``: the model before all; ``data``: the texts; ``sets``: what is measured; ``question``: what is to
    be compared; ``notes``: for the user, or None.
    """

    def __init__(self, found: dict[str, object], output: Path, device: torch.device | None = None):
        """Read model and texts.

        ``device``: of the model where other processes train it; by default this process's, which then does.

        Raises UsageError for what is wrong with model, options or texts.
        """
        resolved = settings.of_mica_adapt(found, output)
        self.settings = found
        self.args = resolved.args
        source = loading.find_source(self.args.model, self.args.trust_remote_code)
        loading.check_backend(self.args.rank)
        processes.start()
        corpus.check(self.args)
        tokenizer = loading.load_tokenizer(source)
        self.data = corpus.gather(self.args, tokenizer)
        self.base = loading.load_model(source, self.args.dtype, device or PartialState().device)
        self.notes = []
        if device is None:  # else it is trained elsewhere
            self.notes.append(loading.suit_processor(self.base, self.args.dtype))
        if set(self.args.text) & set(self.args.retain):
            self.notes.append("--retain names a text of --text: forgetting is measured on what is learned")
        self.base.requires_grad_(False)
        largest = self.data.largest_token_id
        loading.check_limits(source, self.base, self.args.sequence_length, largest)
        packing = suit_packing(resolved, self.base)
        self.notes.append(packing)
        if packing is not None:
            self.data = corpus.gather(self.args, tokenizer)
        if not has_experts(self.base):
            self.args.experts = None
        adapter.check(self.base, self.args)
        self.sets = self._sets()
        self._short_sets = dict(islice(self.sets.items(), 2))
        self.question = self._question()

    def _sets(self) -> dict:
        """What whole trainings are measured on, by name; short ones on the first two."""
        held_out = self.data.held_out
        if len(held_out) < 3:
            what = f"{len(held_out)} blocks of {self.args.sequence_length} tokens are held out, 3 needed"
            raise UsageError(f"--text: {what}: a longer text")
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
            short_blocks=sum(map(len, self._short_sets.values())),
            whole_blocks=sum(map(len, self.sets.values())),
        )

    def documents(self) -> dict[str, list[str]]:
        """The document of each block of each set, by its digest."""
        return {name: [f"{digest:x}" for digest in _documents(blocks)] for name, blocks in self.sets.items()}

    def make_each(self, todo: list[Planned], latest: float) -> Iterator[tuple[Planned, dict | None]]:
        """Each of ``todo`` with its result, one after the other."""
        for planned in todo:
            yield planned, self.make(planned, latest)

    def make(self, planned: Planned, latest: float) -> dict | None:
        """The result of a training, or of the measurement before all of them.

        None if it had to be given up at ``latest``, Unix time. Those of the first phase, which show how long
        the others take, are always finished.
        """
        begin = time.perf_counter()
        if planned.method == BASE:
            return planned._asdict() | self._measure_base()

        def watch() -> None:
            if planned.phase > schedule.TRIAL and time.time() > latest:
                raise _OutOfTimeError

        own = {"learning_rate": planned.rate, "steps": planned.steps, "seed": planned.seed}
        args = methods.options(planned.method, self.args, **own)
        measured = {schedule.TRIAL: {}, schedule.SHORT: self._short_sets}.get(planned.phase, self.sets)
        try:
            with built(planned.method, self.base, args) as model:
                start = time.perf_counter() - begin
                done = train(model, self.data, args, measured, watch)
        except _OutOfTimeError:
            return None
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return planned._asdict() | {"points": [], "failed": OUT_OF_MEMORY}
        finally:
            gc.collect()  # PEFT's models and the Trainer hold themselves in circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return planned._asdict() | done | {"start_seconds": start}

    def _measure_base(self) -> dict:
        begin = time.perf_counter()
        measured = losses(self.base, self.sets)
        if not is_finite(measured):
            raise UsageError(f"--model {self.args.model}: its loss on these texts is not finite")
        seconds = (time.perf_counter() - begin) / sum(map(len, measured.values()))
        return measured | {"failed": None, "block_seconds": seconds, "documents": self.documents()}


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
