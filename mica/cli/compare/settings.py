"""The settings of a comparison, and its folder, which is that of one comparison for good.

What it has written is in the folder's record, as with every command (see `mica.cli.record`).
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mica.cli import record
from mica.cli.adapt import config, folder
from mica.cli.compare.methods import METHODS, RANDOM
from mica.cli.compare.options import OPTIONS, SHARED
from mica.cli.output import check_folder, explained, write_json
from mica.errors import UsageError

FILE = "settings.json"
RUNS = "runs"
REPORT = "compare.json"
PAGE = "README.md"
PICTURE = "compare.png"
SCRIPTS = {method: f"train_{method}.py" for method in METHODS}
_WRITTEN = (FILE, RUNS, REPORT, PAGE, PICTURE, *SCRIPTS.values())


def given(namespace: argparse.Namespace) -> dict[str, object]:
    """What the command line says of the comparison, as JSON has it; paths are absolute."""
    found = {}
    for name, value in vars(namespace).items():
        if name not in OPTIONS or OPTIONS[name].by_run or name == "output":
            continue
        if OPTIONS[name].is_path:
            value = [config.absolute(one) for one in value] if OPTIONS[name].many else config.absolute(value)
        found[name] = value
    return found


def of_mica_adapt(settings: dict[str, object], output: Path) -> config.Settings:
    """The settings of a run of `mica adapt` with the shared options; ``output`` is left out of its texts.

    Raises UsageError as `config.resolve`.
    """
    return config.resolve(argparse.Namespace(**shared(settings), output=output))


def shared(settings: dict[str, object]) -> dict[str, object]:
    """The options of `mica adapt` that are given, and those that have another default here."""
    values = {name: OPTIONS[name].default for name in ("rank", "eval_blocks")}
    return values | {name: settings[name] for name in SHARED if name in settings}


def value(settings: dict[str, object], name: str):
    """The value of an option of the comparison: as given, else its default."""
    return settings.get(name, OPTIONS[name].default)


def rates(settings: dict[str, object]) -> dict[str, list[float]]:
    """Method -> learning rates, ascending. Raises UsageError for rates of a method that is not compared."""
    names = value(settings, "methods") or [name for name in METHODS if name != RANDOM]
    found = {name: set() for name in names}
    for name, some in value(settings, "rates") or []:
        if name not in names:
            raise UsageError(f"--rates {name}: it is not compared: name it in --methods")
        found[name].update(some)
    return {name: sorted(some or METHODS[name].rates) for name, some in found.items()}


def stored(output: Path) -> dict[str, object]:
    """The settings of the comparison in ``output``. Raises UsageError if there are none."""
    try:
        found = json.loads((output / FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--resume: nothing to continue in {output}: it has no {FILE}") from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() <= OPTIONS.keys():
        raise UsageError(f"--resume: {output / FILE}: mica compare has not written it: name another folder")
    return found


@contextmanager
def held(output: Path, settings: dict[str, object], resume: bool, overwrite: bool) -> Iterator[dict]:
    """Hold ``output`` for one comparison; gives its settings, those of the folder with ``resume``.

    Nothing is changed before `begin`. Raises UsageError if another process writes there, if it holds anything
    else than a comparison, one without ``resume`` or ``overwrite``, or with ``resume`` one of other settings.
    """
    check_folder("--output", output, str(settings.get("model", "")))
    with folder.held(output):
        yield _checked(output, settings, resume, overwrite)


def _checked(output: Path, settings: dict[str, object], resume: bool, overwrite: bool) -> dict[str, object]:
    found = record.read(output)
    if found is not None and found.command != record.COMPARE:
        raise UsageError(f"--output {output}: {found.command} has written it: choose another folder")
    if resume:
        return _resumed(output, settings)
    if found is not None and not overwrite:
        what = "is not empty: use --resume to continue, --overwrite to replace it, or another folder"
        raise UsageError(f"--output {output}: {what}")
    if record.others(output, found):
        what = f"holds {record.others(output, found)[0]}, which is not of a comparison: choose another folder"
        raise UsageError(f"--output {output}: {what}")

    if found is not None:
        _refuse_own_input(output, settings, found)
    return settings


def begin(output: Path, settings: dict[str, object], resume: bool) -> None:
    """Begin the comparison that `held` gave, or with ``resume`` go on with it.

    To be called once model and texts have been found usable: a comparison that ``output`` holds is removed.
    """
    if not resume:
        record.replace(output, record.Record(command=record.COMPARE), ())
    record.claim(output, *_WRITTEN)
    with explained(f"--output {output}: cannot be written", OSError):
        (output / RUNS).mkdir(exist_ok=True)
    write_json("--output", output / FILE, settings)


def withdraw(output: Path) -> None:
    """Remove the comparison that was begun in ``output``: it was refused before any training was worth it."""
    record.replace(output, record.Record(command=record.COMPARE, begun=False), ())


def _refuse_own_input(output: Path, settings: dict[str, object], found: record.Record) -> None:
    """Raise UsageError if the new comparison reads what the one in ``output`` has written."""
    inputs = config.inputs(of_mica_adapt(settings, output).args)
    lost = record.removed_input(inputs, output, record.present(output, found))
    if lost:
        raise UsageError(f"{lost[0]} {lost[1]}: is in --output {output}, which --overwrite would remove")


def _resumed(output: Path, settings: dict[str, object]) -> dict[str, object]:
    """The settings in ``output``; of the given ones only those that may change can differ."""
    found = stored(output)
    for name, new in settings.items():
        is_same = json.loads(json.dumps(value(found, name))) == json.loads(json.dumps(new))
        if not is_same and not OPTIONS[name].may_change:
            raise UsageError(f"{OPTIONS[name].flag}: not as in the comparison in {output}; omit this option")
    return found | {name: new for name, new in settings.items() if OPTIONS[name].may_change}


def check_required(settings: dict[str, object]) -> None:
    """Raise UsageError if an option is missing."""
    missing = [row.flag for row in OPTIONS.values() if row.required and row.name not in (*settings, "output")]
    if missing:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}")
