"""The output folder of a run: who may write to it, and what a new run puts in the place of an earlier one.

What a run has written is in the folder's record (see `mica.cli.record`, which has the rule). `check` decides
by it, without any change: before torch is imported, and again once the folder is `held`. Nothing that is
there is touched before `begin`, when nothing can refuse the run any more.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mica.cli import lock, record
from mica.cli.output import check_folder, explained, flush, shown
from mica.errors import UsageError

SETTINGS = "run.yaml"  # the settings of the run
SUMMARY = "summary.json"  # and what was measured, once it has ended
BASE = "base"
MERGED = "merged"
CHECKPOINT = "checkpoint-"
# What every run writes. The names of tokenizer and adapter are known once they have been written elsewhere.
ALWAYS = (SETTINGS, SUMMARY, "README.md", "curve.csv", "curve.png")


def check(
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    inputs: dict[str, list[str]],
    more: Iterable[str] = (),
) -> None:
    """Raise UsageError if a run must not or cannot write to ``output``; makes and removes nothing.

    ``inputs``: option -> what it names, files and folders among them, which nothing may remove. ``more``:
    names of folders that this run writes, beside what every run does.
    """
    check_folder("--output", output, *inputs["--model"])
    found = record.read(output)
    others = record.others(output, found)
    if found is not None and found.command != record.ADAPT:
        raise UsageError(f"--output {output}: {found.command} has written it: choose another folder")
    if found is None or not found.begun:
        _check_without_run(output, others, resume=resume, overwrite=overwrite)
        return

    if not resume and not overwrite:
        what = "is not empty: use --resume to continue that run, --overwrite to replace it, or another folder"
        raise UsageError(f"--output {output}: {what}")
    _refuse_strange_checkpoints(output, others)
    record.refuse_taken(output, found, [*ALWAYS, *more])
    replaced = [name for name in more if name == MERGED]
    if overwrite:
        replaced = list(found.files)
    _refuse_strangers(output, found, replaced)
    if overwrite:
        _check_removal(output, found, inputs)


def _check_without_run(output: Path, others: list[str], *, resume: bool, overwrite: bool) -> None:
    """`check` where no run has begun. ``others``: what is there all the same."""
    unknown = f"no {record.FILE}, which says what a run has written there"
    if resume:
        why = "it is empty" if output.is_dir() else "no such folder"
        if others:
            why = f"it has {unknown}"
        raise UsageError(f"--resume: nothing to continue in {output}: {why}")
    if others:
        limit = "--overwrite removes nothing else: " if overwrite else ""
        raise UsageError(f"--output {output}: is not empty, and has {unknown}: {limit}choose another folder")


def _check_removal(output: Path, found: record.Record, inputs: dict[str, list[str]]) -> None:
    """Raise UsageError if this run reads what ``--overwrite`` would remove, or the system refuses that."""
    present = record.present(output, found)
    lost = record.removed_input(inputs, output, present)
    if lost is not None:
        option, name = lost
        raise UsageError(f"{option} {name}: --overwrite would remove it from --output {output}")
    for path in present:
        why = record.why_not_removable(path)
        if why is not None:
            raise UsageError(f"--output {output}: {path.name} cannot be replaced: {why}")


def _refuse_strangers(output: Path, found: record.Record, replaced: Iterable[str]) -> None:
    """Raise UsageError if somebody has put a file into one of the folders that would be ``replaced``."""
    strange = record.stranger(output, found, replaced)
    if strange is not None:
        name = shown(str(strange.relative_to(output)))
        what = "is in a folder that the run would replace, and no run has written it: move it away"
        raise UsageError(f"--output {output}: {name} {what}")


def _refuse_strange_checkpoints(output: Path, others: list[str]) -> None:
    for name in others:
        if name.startswith(CHECKPOINT) and name.removeprefix(CHECKPOINT).isdecimal():
            what = f"{name} does not belong to the run that has written this folder: move it away"
            raise UsageError(f"--output {output}: {what}")


def begin(
    output: Path, run_yaml: str, origins: dict[str, str], *, names: Iterable[str], resume: bool
) -> None:
    """Make ``output`` that of this run: its record, run.yaml, and base/ where one was converted.

    Without ``resume`` what an earlier run has left there goes, as `check` has allowed. ``names``: of what
    the run is going to write, known by now.

    Raises UsageError if it cannot be written, or something of these names is there that no run has written;
    then all is as it was.
    """
    found = record.read(output)
    record.refuse_taken(output, found, names)
    if found is not None and not resume:  # again: the model was read since `check`, which may take minutes
        _refuse_strangers(output, found, found.files)
    record.claim(output, SETTINGS, begun=False)
    scratch = record.scratch(output, SETTINGS)
    with explained(f"--output {output / SETTINGS}: cannot be written", OSError):
        scratch.write_text(run_yaml, encoding="utf-8")
        flush(scratch)
    ready = [name for name in (SETTINGS, BASE) if record.scratch(output, name).exists()]
    if resume:
        record.settle(output, ready, origins)
        return
    new = record.Record(origins=origins, files=dict.fromkeys(ready))
    if BASE in ready:
        new.files[BASE] = found.files[BASE]
    record.replace(output, new, ready)


def recover(output: Path) -> None:
    """Undo an --overwrite that was killed before the new run had begun, so that the one before is there.

    Raises UsageError as `held`.
    """
    if record.is_half_replaced(output):
        with held(output):
            pass


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Make ``output``, keep other runs out of it, and see to what a killed one has left half done.

    The system releases the lock of a killed process. A torchrun that is killed with -9, for one, leaves its
    workers, which go on training. Folders that were made and stay empty are removed again.

    Raises UsageError if another run holds it, or it cannot be made.
    """
    made = _missing(output)
    with explained(f"--output {output}: cannot be made", OSError):  # /proc, for one, looks writable
        output.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            with explained(f"--output {output}: cannot be locked", OSError):
                stack.enter_context(lock.held(output / record.LOCK))
            record.recover(output)
            stack.callback(_leave, output)
            yield
    except lock.HeldError as error:
        raise UsageError(f"--output {output}: another run writes to it; wait for it or stop it") from error
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _leave(output: Path) -> None:
    with suppress(UsageError):  # what is half done is for the next run
        record.recover(output)


def _missing(output: Path) -> list[Path]:
    """The folders that have to be made for ``output``, the last first."""
    return [path for path in (output, *output.parents) if not path.exists()]
