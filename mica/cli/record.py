"""What a command has written to its output folder: a record in it, and all that may be removed there.

- ``mica-run.json`` names the files and folders of the output folder that the command has made. A name is
  added, and has reached the disk, before the thing itself is made, and only where nothing of that name is.
- What it does not name is somebody else's: it is never removed or replaced. Neither is a folder that it names
  but which holds files that the command has not put there.
- `replace` puts one run in the place of another. All that the old record names is moved aside; then the new
  record is renamed over the old one, and only that ends the old run: before it, `recover` moves all of it
  back, after it `recover` removes what was moved aside.

Names of this module's own files begin with `OWN`. Whoever writes holds the folder's `lock`.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mica.cli.output import (
    OLD,
    PARTIAL,
    RECORD,
    beside,
    explained,
    files_in,
    flush,
    one_line,
    remove,
    restore,
    shown,
    write_file,
)
from mica.errors import UsageError

FILE = RECORD
OWN = ".mica-run."
LOCK = f"{OWN}lock"
MARKER = "complete.json"  # in a checkpoint: see `mica.cli.adapt.checkpoints`
ADAPT = "mica adapt"
TRANSFER = "mica transfer"
COMPARE = "mica compare"
_ASIDE = f"{OWN}replaced-"
_NEW = f"{OWN}json"
_FORMAT = 1


@dataclass
class Record:
    """``files``: name in the folder -> None, or for a folder that is whole the names of all files below it.

    ``command``: which wrote it. ``run``: another one for each run. ``begun``: False while nothing but
    temporary files have been written. ``replaced``: runs that this one has replaced, of which something is
    still there. ``ready``: names of what is whole, and has yet to be renamed from its temporary form.
    ``origins``: option -> where its value in run.yaml comes from.
    """

    command: str = ADAPT
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    begun: bool = True
    replaced: list[str] = field(default_factory=list)
    ready: list[str] = field(default_factory=list)
    files: dict[str, list[str] | None] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def read(output: Path) -> Record | None:
    """The record in ``output``; None if there is none. A checkpoint that the run has marked is named in it.

    Raises UsageError if it cannot be read, or is not what `write` writes.
    """
    path = output / FILE
    try:
        found = _parsed(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        what = f"{FILE}, which says what a run has written there, cannot be read ({one_line(error)})"
        raise UsageError(f"--output {output}: {what}: choose another folder") from error
    for name in os.listdir(output):
        if name in found.files:
            continue
        names = _marked_by(output / name, found.run)
        if names is not None:
            found.files[name] = names  # put back from a copy
    return found


def _parsed(text: str) -> Record:
    content = json.loads(text)
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise ValueError("of another version")
    found = Record(**content)
    for name, names in found.files.items():
        if name in ("", ".", "..", FILE) or not {"/", os.sep, "\0"}.isdisjoint(name):
            raise ValueError("it names what no run writes")
        if names is not None and not (isinstance(names, list) and _are_strings(names)):
            raise ValueError("not a list of names")
    if not _are_strings((found.run, found.command, *found.replaced, *found.ready)):
        raise ValueError("not a name")
    if not _are_strings(found.origins.values()):
        raise ValueError("not an origin")
    return found


def _are_strings(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _marked_by(folder: Path, run: str) -> list[str] | None:
    """All files of a checkpoint that ``run`` has marked as complete; None if ``folder`` is none."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["run"] == run:
            return [*marker["files"], MARKER]
    return None


def write(output: Path, record: Record) -> None:
    """Write the record to ``output``, in one step; make the folder. Raises UsageError if that fails."""
    text = json.dumps({"format": _FORMAT, **asdict(record)}, indent=1) + "\n"  # ASCII, whatever the names
    path = output / FILE
    new = output / _NEW
    with explained(f"--output {output}: {FILE} cannot be written", OSError):
        output.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        flush(new)
        os.replace(new, path)
        flush(output)


def claim(output: Path, *names: str, begun: bool = True) -> None:
    """Add ``names`` to the record, before anything of these names is made; make one if there is none.

    Raises UsageError if one of them is there, and not by the record.
    """
    found = read(output) or Record(begun=begun)
    new = [name for name in names if name not in found.files]
    if new:
        refuse_taken(output, found, new)
        found.files |= dict.fromkeys(new)
        write(output, found)


def refuse_taken(output: Path, record: Record | None, names: Iterable[str]) -> None:
    """Raise UsageError if one of ``names`` is there, and not by ``record``."""
    for name in names:
        if record is not None and name in record.files:
            continue
        for path in _places(output / name):
            if os.path.lexists(path):
                what = f"would be replaced, but {FILE} does not say that a run wrote it"
                raise UsageError(f"--output {output}: {shown(path.name)} {what}: move it away")


def _places(path: Path) -> list[Path]:
    """What goes with a name in the record: itself, and its temporary forms."""
    return [path, beside(path, PARTIAL), beside(path, OLD)]


def scratch(output: Path, name: str) -> Path:
    """The temporary form of ``name`` in ``output``, until it is renamed."""
    return beside(output / name, PARTIAL)


def completed(output: Path, name: str, folder: Path | None = None) -> None:
    """Say in the record which files are in the folder ``name``, now that it is whole.

    ``folder``: where it is until it is renamed.
    """
    found = read(output) or Record()
    found.files[name] = _names(folder or output / name)
    write(output, found)


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in files_in(folder)]


def forget(output: Path, *names: str) -> None:
    """Take ``names`` out of the record: they have been removed."""
    found = read(output)
    if found is None or found.files.keys().isdisjoint(names):
        return
    for name in names:
        found.files.pop(name, None)
    write(output, found)


def claimed(output: Path, name: str, fill: Callable[[Path], None]) -> None:
    """`write_file` of ``output/name``, which is claimed first."""
    claim(output, name)
    write_file("--output", output / name, fill, PARTIAL)


def others(output: Path, record: Record | None) -> list[str]:
    """The names in ``output`` of what is neither ``record``'s nor this module's own; sorted."""
    if not output.is_dir():
        return []
    own = set()
    if record is not None:
        own.add(FILE)
        for name in record.files:
            own |= {path.name for path in _places(output / name)}
    return sorted(name for name in os.listdir(output) if name not in own and not name.startswith(OWN))


def present(output: Path, record: Record) -> list[Path]:
    """What there is of all that ``record`` names."""
    found = []
    for name in record.files:
        found += [path for path in _places(output / name) if os.path.lexists(path)]
    return found


def stranger(output: Path, record: Record, names: Iterable[str]) -> Path | None:
    """A file in one of the folders ``names`` of ``record`` that was not there when it was whole."""
    for name in names:
        listed = record.files.get(name)
        folder = output / name
        if listed is None or folder.is_symlink() or not folder.is_dir():
            continue
        strange = sorted(set(_names(folder)) - set(listed))
        if strange:
            return folder / strange[0]
    return None


def removed_input(
    inputs: dict[str, list[str]], output: Path, removed: Iterable[Path]
) -> tuple[str, str] | None:
    """The first option of ``inputs``, and its name, of which anything is ``removed``; None if there is none.

    ``inputs``: option -> names, of files and folders among them. Links are followed: of the names, of the
    files in a folder, and of ``removed``. A folder that is read must not be ``output`` either, where things
    are removed.
    """
    gone = {Path(os.path.realpath(path)) for path in removed}
    if not gone:
        return None
    whole = Path(os.path.realpath(output))
    for option, names in inputs.items():
        for name in names:
            for place in read_from(name):
                if place == whole or not gone.isdisjoint((place, *place.parents)):
                    return option, name
    return None


def sign(folder: Path) -> None:
    """Name all that is in ``folder``, whose record is there already, in that record."""
    found = read(folder)
    for path in folder.iterdir():
        if path.name == FILE:
            continue
        found.files[path.name] = None
        if path.is_dir():
            found.files[path.name] = _names(path)
    write(folder, found)


def read_from(name: str) -> Iterator[Path]:
    """The file or folder ``name`` without links, and the files to which links in that folder lead."""
    path = os.path.expanduser(name)
    yield Path(os.path.realpath(path))
    if os.path.isdir(path):
        for place, _, files in os.walk(path):
            for one in files:  # links to folders are not followed
                linked = os.path.join(place, one)
                if os.path.islink(linked):
                    yield Path(os.path.realpath(linked))


def why_not_removable(path: Path) -> str | None:
    """Why the system will not let this process remove ``path``; None if it seems to."""
    folders = [path.parent]
    if path.is_dir() and not path.is_symlink():
        for place, names, files in os.walk(path):
            if names or files:  # an empty one is removed by its parent's leave
                folders.append(Path(place))
        folders.append(path)
    for folder in folders:
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            return f"{folder} is not writable"
    return None


def replace(output: Path, new: Record, ready: Iterable[str]) -> None:
    """Put ``new`` in the place of the record in ``output``, and of all that it names, if there is one.

    ``ready``: names of ``new`` that have been written as their temporary forms, and become what they are.
    Until ``new`` is there nothing is lost: an error undoes it, and so does `recover` after a kill.

    Raises UsageError if something cannot be moved aside.
    """
    old = read(output)
    new.ready = [*ready]
    keep = {scratch(output, name) for name in new.ready}
    aside = None
    if old is not None and old.begun:
        aside = output / f"{_ASIDE}{old.run}"
    try:
        if aside is not None:
            new.replaced = [*old.replaced, old.run]
            _move(output, aside, [path for path in present(output, old) if path not in keep])
        write(output, new)
    except BaseException as error:
        if aside is not None:
            write(output, old)
            recover(output)
        if not isinstance(error, OSError):
            raise
        what = f"the run there cannot be replaced: {shown(str(error.filename))}: {one_line(error)}"
        raise UsageError(f"--output {output}: {what}; nothing was changed") from error
    recover(output)


def _move(source: Path, target: Path, paths: Iterable[Path]) -> None:
    """Rename ``paths`` of ``source`` into ``target``, where nothing is replaced."""
    target.mkdir(exist_ok=True)
    for path in paths:
        if not os.path.lexists(target / path.name):
            path.rename(target / path.name)
    for folder in (target, source):
        flush(folder)


def settle(output: Path, ready: Iterable[str], origins: dict[str, str]) -> None:
    """As `replace`, of ``ready`` alone, in the run that is there."""
    found = read(output) or Record()
    found.ready = [*ready]
    found.origins = origins
    write(output, found)
    recover(output)


def recover(output: Path) -> None:
    """Finish, or undo, what a killed process has left half done, and name what is there, no more.

    Raises UsageError if the record cannot be read or written, or what was moved aside cannot be moved back.
    """
    with suppress(OSError):
        (output / _NEW).unlink()  # half written
    found = read(output)
    if found is None:
        return
    before = asdict(found)
    with explained(f"--output {output}: what a run has left half done cannot be mended", OSError):
        _recover_replaced(output, found)
        for name in found.ready:
            if scratch(output, name).exists():
                os.replace(scratch(output, name), output / name)
        for name in found.files:
            restore(output / name)
            remove(scratch(output, name))
    found.ready = []
    found.replaced = [run for run in found.replaced if (output / f"{_ASIDE}{run}").exists()]
    found.files = {name: names for name, names in found.files.items() if os.path.lexists(output / name)}
    if not found.begun and not found.files:
        (output / FILE).unlink()
    elif asdict(found) != before:
        write(output, found)


def _recover_replaced(output: Path, record: Record) -> None:
    """Move back what was moved aside of ``record``'s run; remove what was of runs that it has replaced."""
    for aside in output.glob(f"{_ASIDE}*"):
        run = aside.name.removeprefix(_ASIDE)
        if run == record.run:
            _move(aside, output, list(aside.iterdir()))
            if not any(aside.iterdir()):
                aside.rmdir()
        elif run in record.replaced:
            shutil.rmtree(aside, ignore_errors=True)  # what cannot be removed is tried again


def is_half_replaced(output: Path) -> bool:
    """Whether `recover` would move back what a killed `replace` has moved aside."""
    found = read(output)
    return found is not None and (output / f"{_ASIDE}{found.run}").exists()
