"""The output folder: what may be in it before a run, and what a new run removes from it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mica.cli.output import check_folder, explained
from mica.errors import UsageError

# What `mica adapt` and the tokenizers write. Anything else in the folder is not ours and stays.
RESULT = (
    *("adapter_*", "README.md", "summary.json", "run.yaml", "curve.*", "tokenizer*", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates*"),
)
PRODUCTS = (*RESULT, "checkpoint-*", "base", "merged", "runs")
CONVERTED = "Converted by mica adapt from a GGUF file."  # in base/README.md: ours, to be replaced
_LOCK = ".lock"
_LEFT = (_LOCK, ".run.yaml.*", ".base.partial")  # by a killed run


def check(output: Path, *, resume: bool, overwrite: bool, inputs: dict[str, list[str]]) -> None:
    """Raise UsageError if a run must not or cannot write to ``output``; makes and removes nothing.

    ``inputs``: option -> what it names, files and folders among them, which nothing may remove.
    """
    check_folder("--output", output, *inputs["--model"])
    found = [*output.iterdir()] if output.is_dir() and not (resume or overwrite) else []
    # A GGUF file is converted to base/ before the adapter is made, which may fail
    if any(not any(map(path.match, _LEFT)) and not _is_converted(path) for path in found):
        what = "is not empty: use --resume to continue that run, --overwrite to replace it"
        raise UsageError(f"--output {output}: {what}, or another folder")
    removed = {path.resolve() for path in _products(output)} if overwrite else set()
    for option, name in ((option, name) for option, names in inputs.items() for name in names):
        place = Path(os.path.realpath(os.path.expanduser(name)))
        if not removed.isdisjoint((place, *place.parents)):
            raise UsageError(f"{option} {name}: --overwrite would remove it from --output {output}")


def _is_converted(path: Path) -> bool:
    card = path / "README.md"
    return path.name == "base" and card.is_file() and card.read_bytes().startswith(CONVERTED.encode())


def _products(output: Path) -> list[Path]:
    return [path for pattern in PRODUCTS for path in output.glob(pattern)]


def clear(output: Path, keep: str = "") -> None:
    """Remove what an earlier run left in ``output`` but ``keep``, so that nothing of two runs is mixed."""
    for path in (path for path in _products(output) if path.name != keep):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Make ``output`` and keep other runs out of it; the system releases the lock of a killed process.

    A torchrun that is killed with -9, for one, leaves its workers, which go on training.

    Raises UsageError if another run holds it, or it cannot be made.
    """
    import filelock

    lock = filelock.FileLock(output / _LOCK, timeout=0)
    is_new = not output.exists()
    with explained(f"--output {output}: cannot be made", OSError):  # /proc, for one, looks writable
        output.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UsageError(f"--output {output}: another run writes to it; wait for it or stop it") from error
    except (OSError, NotImplementedError):  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()
        (output / _LOCK).unlink(missing_ok=True)
        if is_new and not any(output.iterdir()):  # refused before anything was written
            output.rmdir()
