"""The settings of a run: from command line, YAML file, adapter or earlier run, and recipe."""

import os
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from mica.cli.adapt import run_yaml
from mica.cli.adapt.folder import SETTINGS as FILE
from mica.cli.adapt.options import OPTIONS, Values, check_required, recipe
from mica.cli.folder import check_begun
from mica.cli.output import expanded, tell_once
from mica.errors import UsageError

STARTING = "mica adapt: loading libraries, model and texts ..."  # before the first slow import
_LENGTHS = {"steps", "epochs"}  # the first layer with one of them decides
_PATHS = {name for name, option in OPTIONS.items() if option.is_path}
_OF_THE_RUN = [name for name, option in OPTIONS.items() if not option.by_run]
_BY_CONTENT = {"model", "text", "held_out_text", "retain"}  # may be moved: the run compares what is in them
_MUST_STAY = [name for name in _OF_THE_RUN if not OPTIONS[name].may_change and name not in _BY_CONTENT]


class Settings(NamedTuple):
    """The settings of a run.

    ``args``: a value for every option. ``given``: names of those that stand on the command line or in
    ``--config``.
    """

    args: Namespace
    given: frozenset[str]


def resolve(namespace: Namespace) -> Settings:
    """Find a value for every option: of the command line, else of YAML, of the recipe, or the default.

    ``namespace``: what was given on the command line (see `options.declare`). With ``--resume`` the run.yaml
    of the output folder is read, else the folder of ``--adapter``.

    Raises UsageError for what `run_yaml.read` refuses, for a missing required option, for options that
    exclude each other, and for values other than those of the adapter. Those of a run that is resumed are
    compared with its checkpoint: see `checkpoints.check`.
    """
    line = {name: value for name, value in vars(namespace).items() if name in OPTIONS}
    file = run_yaml.read(line["config"]) if "config" in line else {}
    _refuse_exclusive(line, file)

    wanted = file | line
    output = wanted.get("output")
    earlier = {}
    if line.get("resume"):
        if output is None:
            raise UsageError("--resume: needs --output, the folder of the run")
        earlier = _recorded(output)
    elif wanted.get("adapter") is not None:
        earlier = _of_adapter(wanted)
    named = _merged(earlier, file, line)
    values = _merged(recipe(named["recipe"], named["method"]), earlier, file, line)
    _derive(values)
    _check(values, line)
    if values["keep_best"] is None and values["patience"]:
        values["keep_best"] = True  # who stops because it gets worse does not want the worse
    args = Namespace(**{name: values[name] for name in OPTIONS})
    return Settings(args, frozenset(wanted))


def _refuse_exclusive(line: Values, file: Values) -> None:
    """Raise UsageError for options of which the user may give one only."""
    if line.keys() >= _LENGTHS or file.keys() >= _LENGTHS:
        raise UsageError("--steps and --epochs: use only one")
    if line.keys() >= {"held_out", "held_out_text"}:
        raise UsageError("--held-out and --held-out-text: use only one")


def _merged(*layers: Values) -> Values:
    """A value for every option, and what else a recipe has: of the last layer that has it, or its default."""
    values = {name: option.default for name, option in OPTIONS.items()}
    for layer in layers:
        if not _LENGTHS.isdisjoint(layer):
            values |= dict.fromkeys(_LENGTHS)
        values |= layer
    return values


def _recorded(output: Path) -> Values:
    """The settings of the run in ``output``, by its run.yaml.

    What an adapter said when the run began is among them: its folder need not exist any more.
    """
    check_begun(output, FILE)
    # A run without experts has no such entry, and the recipe must not add one.
    return {"experts": None} | run_yaml.read(output / FILE, "--resume")


def _of_adapter(wanted: Values) -> Values:
    """What ``--adapter`` fixes. Raises UsageError if other values are ``wanted``."""
    tell_once(STARTING)
    from mica.cli.adapt import saved_adapter  # which needs torch

    own = saved_adapter.read(wanted["adapter"]).settings()
    for name in own.keys() & wanted.keys() - {"dropout"}:  # which is not in the weights
        if wanted[name] != own[name]:
            what = "--adapter does not have it" if own[name] is None else f"--adapter has {own[name]}"
            raise UsageError(f"{OPTIONS[name].flag} {wanted[name]}: {what}; omit this option")
    return own


def _derive(values: Values) -> None:
    """Set what follows from other options where it was not given."""
    if values["alpha"] is None:
        values["alpha"] = values["alpha_per_rank"] * values["rank"]
    if values["train_embeddings"] and values["embedding_learning_rate"] is None:
        values["embedding_learning_rate"] = values["learning_rate"] / 10  # as in the field's recipes


def _check(values: Values, line: Values) -> None:
    """Raise UsageError for a missing option, and for options that do not go together.

    ``line``: what the command line had.
    """
    check_required(OPTIONS.values(), values)
    if values["memory"] and values["gradient_checkpointing"]:
        raise UsageError("--memory and --gradient-checkpointing: use only one; the latter checkpoints all")
    if "warmup_ratio" in line and values["scheduler"] == "constant":
        raise UsageError(
            "--warmup-ratio: scheduler 'constant' has no warmup; use 'constant_with_warmup' instead"
        )
    for name, option in OPTIONS.items():
        missing = [OPTIONS[other].flag for other in option.needs if not values[other]]
        if values[name] and missing:
            raise UsageError(f"{option.flag}: needs {' and '.join(missing)}")


def absolute(value: str | Path) -> str:
    """The absolute path where there is such a file or folder; else ``value`` itself, a name on the Hub."""
    path = expanded(value)
    if not os.path.exists(path):  # not Path's, which raises for a name that is too long
        return str(value)
    return str(path.resolve())


def fixed(args: Namespace) -> Values:
    """Option -> value, as JSON has it, of those that must be the same in a run and after ``--resume``.

    Without those of which the contents are compared.
    """
    given = {name: getattr(args, name) for name in _MUST_STAY}
    if args.adapter is not None:
        given["adapter"] = absolute(args.adapter)
    return given


def values(settings: Settings) -> Values:
    """Option -> value as JSON and YAML have it: without those of one start and those that are not set."""
    found = {}
    for name in _OF_THE_RUN:
        value = getattr(settings.args, name)
        if value is None:
            continue
        if name in _PATHS:
            value = plain(value)
        found[name] = value
    return found


def plain(value: object) -> object:
    """A path, or several, as YAML has them: absolute."""
    if isinstance(value, list):
        return [absolute(each) for each in value]
    return absolute(value)
