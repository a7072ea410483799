"""The settings of a comparison, and its folder, which is that of one comparison for good."""

import json
from argparse import Namespace
from pathlib import Path

from mica.cli.adapt import config
from mica.cli.adapt.options import Values
from mica.cli.compare.methods import DEFAULT, METHODS
from mica.cli.compare.options import BLOCKS, OPTIONS, SHARED
from mica.cli.folder import check_begun, check_new
from mica.cli.output import check_folder, write_json
from mica.cli.record import Record
from mica.errors import UsageError

FILE = "settings.json"
RUNS = "runs"
PAGE = "README.md"
DEFAULTS = {name: row.default for name, row in OPTIONS.items() if name not in ("output", "resume")}


def given(namespace: Namespace) -> Values:
    """What the command line says of the comparison, as JSON has it; paths are absolute."""
    found = {name: given for name, given in vars(namespace).items() if name in DEFAULTS}
    for name in found.keys() & {"model", "text", "retain"}:
        found[name] = config.plain(found[name])
    return found


def of_mica_adapt(settings: Values, output: Path) -> config.Settings:
    """The settings of a run of `mica adapt` with the shared options; ``output`` is left out of its texts.

    Raises UsageError as `config.resolve`.
    """
    shared = {name: settings[name] for name in SHARED}
    return config.resolve(Namespace(**shared, eval_blocks=BLOCKS, output=output))


def rates(settings: Values) -> dict[str, list[float]]:
    """Method -> learning rates, ascending. Raises UsageError for rates of a method that is not compared."""
    names = settings["methods"] or DEFAULT
    found = {name: set() for name in names}
    for name, some in settings["rates"] or []:
        if name not in names:
            raise UsageError(f"--rates {name}: it is not compared: name it in --methods")
        found[name].update(some)
    return {name: sorted(some or METHODS[name].rates) for name, some in found.items()}


def check_output(output: Path) -> None:
    """Raise UsageError if a comparison must not or cannot begin in ``output``; makes nothing."""
    check_folder("--output", output)
    check_new("--output", output, "choose another folder, or go on with the comparison there by --resume")


def resumed(output: Path, given: Values) -> Values:
    """The settings of the comparison in ``output``, with the given ones.

    Raises UsageError if there is no comparison, or these must not change.
    """
    path = output / FILE
    check_begun(output, FILE)
    stored = json.loads(path.read_bytes()) if Record(output).has(path) else {}
    if stored.keys() != DEFAULTS.keys():
        raise UsageError(
            f"--resume: {path}: "
            "this version of mica compare has not written it: put that back, or name another folder"
        )
    for name, new in given.items():
        if new != stored[name] and not OPTIONS[name].may_change:
            raise UsageError(f"{OPTIONS[name].flag}: not as in the comparison in {output}; omit this option")
    return stored | given


def write(output: Path, settings: Values) -> None:
    """Make ``output`` the folder of the comparison with these settings."""
    write_json("--output", output / FILE, settings)
