"""What all trainings of a comparison have in common, and how one of them is made."""

import gc
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Subset

from mica.cli import loading
from mica.cli.adapt import adapter, corpus, processes
from mica.cli.adapt.packing import document_of, suit_packing
from mica.cli.compare import methods, schedule, settings
from mica.cli.compare.models import built
from mica.cli.compare.schedule import BASE, Comparison, Planned, Results
from mica.cli.compare.training import measure, train
from mica.cli.output import dtype_name
from mica.cli.targets import has_experts
from mica.errors import UsageError
from mica.subspace.content_hash import content_hash

OUT_OF_MEMORY = "out of memory"
_EPOCHS = 4  # of a training at most: a text that is read more often is memorised
_TESTED = 4  # a quarter of the held-out blocks is for the choice of rates, the others for the test


class Trainings:
    """``args``: of `mica adapt`, as far as all trainings share them.

    ``base``: the model before all; ``data``: the texts; ``sets``: what is measured, by name, ``blocks`` in
    all; ``content``: a hash of what each option names; ``notes``: for the user.
    """

    def __init__(self, found: dict[str, object], output: Path):
        """Read model and texts. Raises UsageError for what is wrong with them or with options."""
        resolved = settings.of_mica_adapt(found, output)
        self.args = resolved.args
        source = loading.find_source(self.args.model, self.args.trust_remote_code)
        loading.check_backend(self.args.rank)
        processes.start()
        tokenizer = loading.load_tokenizer(source)
        self.data = corpus.gather(self.args, tokenizer)
        self.base = loading.load_model(source, self.args.dtype, PartialState().device)
        notes = [loading.suit_processor(self.base, self.args.dtype)]
        if set(self.args.text) & set(self.args.retain):
            notes.append("--retain names a text of --text: forgetting is measured on what is learned")
        self.base.requires_grad_(False)
        largest = self.data.largest_token_id
        loading.check_limits(source, self.base, self.args.sequence_length, largest)
        packing = suit_packing(resolved, self.base)
        notes.append(packing)
        if packing is not None:
            self.data = corpus.gather(self.args, tokenizer)
        self.notes = list(filter(None, notes))
        if not has_experts(self.base):
            self.args.experts = None
        adapter.check(self.base, self.args)
        self.sets = self._sets()
        self.blocks = sum(map(len, self.sets.values()))
        self.content = {
            "model": _hash_of_weights(self.base),
            "text": self.data.fingerprint,
            "retain": self.data.retain_fingerprint,
        }

    def _sets(self) -> dict:
        held_out = self.data.held_out
        if len(held_out) < 3:
            what = f"{len(held_out)} blocks of {self.args.sequence_length} tokens are held out, 3 needed"
            raise UsageError(f"--text: {what}: a longer text")
        choosing = _for_choosing(_documents(held_out))
        return {
            "validation": Subset(held_out, choosing),
            "test": Subset(held_out, [number for number in range(len(held_out)) if number not in choosing]),
            "retained": self.data.retain,
        }

    def comparison(self, found: dict[str, object], results: Results) -> Comparison:
        """The comparison with the settings ``found``."""
        return Comparison(
            rates=settings.rates(found),
            seeds=found["seeds"],
            budget=60 * found["budget"],
            length=found["steps"],
            longest=_EPOCHS * self.data.amount(self.args).epoch_steps,
            blocks=self.blocks,
            results=results,
        )

    def facts(self) -> dict[str, Any]:
        """What the page says of the trainings: the options of `mica adapt`, and what model and texts have."""
        return vars(self.args) | {
            "dtype": dtype_name(self.base.dtype),
            "blocks": len(self.data.train),
            **{name: len(blocks) for name, blocks in self.sets.items()},
        }

    def make(self, planned: Planned) -> dict:
        """The result of a training, or of the measurement before all of them."""
        began = time.perf_counter()
        try:
            if planned.method == BASE:
                done = self._of_base()
            else:
                with self.trained(planned) as (_, done):
                    pass
        except (MemoryError, RuntimeError) as error:
            if planned.method == BASE or not _is_out_of_memory(error):
                raise
            done = {"losses": {}, "failed": OUT_OF_MEMORY}
        finally:
            gc.collect()  # PEFT's models and the Trainer hold themselves in circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return planned._asdict() | done | {"seconds": time.perf_counter() - began, "content": self.content}

    @contextmanager
    def trained(self, planned: Planned) -> Iterator[tuple[nn.Module, dict]]:
        """The model after a training, until the context is left, and what was measured of it."""
        began = time.perf_counter()
        own = {"learning_rate": planned.rate, "steps": planned.steps, "seed": planned.seed}
        args = methods.options(planned.method, self.args, **own)
        measured = {} if planned.phase == schedule.TRIAL else self.sets
        with built(self.base, args) as model:
            start_seconds = time.perf_counter() - began
            done = train(model, self.data, args)
            yield model, done | measure(model, measured) | {"start_seconds": start_seconds}

    def _of_base(self) -> dict:
        began = time.perf_counter()
        measured = measure(self.base, self.sets)
        if measured["failed"]:
            raise UsageError(f"--model {self.args.model}: its loss on these texts is not finite")
        seconds = (time.perf_counter() - began) / self.blocks
        documents = {name: _documents(blocks) for name, blocks in self.sets.items()}
        return measured | {"block_seconds": seconds, "documents": documents}


def _hash_of_weights(model: nn.Module) -> str:
    """Of all weights, at the speed of memory: 11 GB/s by one thread."""
    total = hashlib.blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        rows = torch.atleast_2d(weight).flatten(0, -2)
        total.update(f"{name} {content_hash(rows)}".encode())
    return total.hexdigest()


def _documents(blocks) -> list[int]:
    return [document_of(blocks, number) for number in range(len(blocks))]


def _for_choosing(documents: list[int]) -> list[int]:
    """The blocks by which rates are chosen, of the blocks of these ``documents``: about a quarter.

    Whole documents, in the order of their digests, so that none has a part in both choice and test; where
    they are too few or too long for that, every fourth block.
    """
    distinct = sorted(set(documents))
    some = distinct[: len(distinct) // _TESTED]
    chosen = [number for number, document in enumerate(documents) if document in some]
    if 0 < len(chosen) <= len(documents) // 2:
        return chosen
    return [*range(0, len(documents), _TESTED)]


def _is_out_of_memory(error: Exception) -> bool:
    is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_known or "can't allocate memory" in str(error)  # the CPU's allocator has no class for it
