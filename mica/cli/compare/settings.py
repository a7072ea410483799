"""The settings of a comparison, and its folder, which is that of one comparison for good."""

import argparse
import json
from pathlib import Path

from mica.cli.adapt import config
from mica.cli.compare.methods import METHODS, RANDOM
from mica.cli.compare.options import BLOCKS, OPTIONS, SHARED
from mica.cli.folder import entries
from mica.cli.output import check_folder, write_json
from mica.cli.record import Record
from mica.errors import UsageError

FILE = "settings.json"
RUNS = "runs"
REPORT = "compare.json"
PAGE = "README.md"
PICTURE = "compare.png"


def given(namespace: argparse.Namespace) -> dict[str, object]:
    """What the command line says of the comparison, as JSON has it; paths are absolute."""
    names = OPTIONS.keys() - {"output", "resume"}
    found = {name: value for name, value in vars(namespace).items() if name in names}
    for name in found.keys() & {"text", "retain"}:
        found[name] = [config.absolute(path) for path in found[name]]
    if "model" in found:
        found["model"] = config.absolute(found["model"])
    return found


def of_mica_adapt(settings: dict[str, object], output: Path) -> config.Settings:
    """The settings of a run of `mica adapt` with the shared options; ``output`` is left out of its texts.

    Raises UsageError as `config.resolve`.
    """
    return config.resolve(argparse.Namespace(**shared(settings), output=output))


def shared(settings: dict[str, object]) -> dict[str, object]:
    """The options of `mica adapt` that are given, and those that have another default here."""
    values = {"rank": OPTIONS["rank"].default, "eval_blocks": BLOCKS}
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


def check_output(output: Path) -> None:
    """Raise UsageError if a comparison must not or cannot begin in ``output``; makes nothing.

    A first command that was killed before its first result may be given again.
    """
    check_folder("--output", output)
    names = entries(output)
    has_results = any((output / RUNS).glob("*.json"))
    if names and (has_results or not {FILE} <= {*names} <= {FILE, RUNS}):
        what = "is not empty: choose another folder"
        if FILE in names:
            what += ", or use --resume to go on with the comparison there"
        raise UsageError(f"--output {output}: {what}")


def stored(output: Path) -> dict[str, object]:
    """The settings of the comparison in ``output``. Raises UsageError if there are none."""
    path = output / FILE
    if not path.is_file():
        raise UsageError(f"--resume: nothing to continue in {output}: it has no {FILE}")
    if not Record(output).has(path):
        what = "is not what mica compare has written: put that back, or name another folder"
        raise UsageError(f"--resume: {path} {what}")
    return json.loads(path.read_text(encoding="utf-8"))


def resumed(output: Path, settings: dict[str, object]) -> dict[str, object]:
    """The settings in ``output``; of the given ones only those that may change can differ."""
    found = stored(output)
    for name, new in settings.items():
        is_same = json.loads(json.dumps(value(found, name))) == json.loads(json.dumps(new))
        if not is_same and not OPTIONS[name].may_change:
            raise UsageError(f"{OPTIONS[name].flag}: not as in the comparison in {output}; omit this option")
    return found | {name: new for name, new in settings.items() if OPTIONS[name].may_change}


def write(output: Path, settings: dict[str, object]) -> None:
    """Make ``output`` the folder of the comparison with these settings."""
    write_json("--output", output / FILE, settings)


def check_required(namespace: argparse.Namespace, resume: bool) -> None:
    """Raise UsageError if an option is missing: under --resume only that of the folder is required."""
    required = [row for row in OPTIONS.values() if row.required and (not resume or row.name == "output")]
    missing = [row.flag for row in required if not hasattr(namespace, row.name)]
    if missing:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}")
