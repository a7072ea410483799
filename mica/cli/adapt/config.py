"""From command line, YAML file and recipe to the settings of a run, and back to a YAML file."""

import argparse
import difflib
import json
import os
from collections import ChainMap
from pathlib import Path
from typing import NamedTuple

from mica import __version__
from mica.cli import record
from mica.cli.adapt.folder import MERGED, check
from mica.cli.adapt.folder import SETTINGS as FILE
from mica.cli.adapt.options import OPTIONS, RECIPES, TABLE, declare
from mica.cli.arguments import with_suggestion
from mica.cli.output import expanded, one_line, shown
from mica.errors import UsageError

_PROCESSES = "processes"  # in it, though no option: how many the run had
# A switch in YAML: as in YAML 1.2, and the words of YAML 1.1 that many are used to
_SWITCHED = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
FARTHEST = 10**6  # of two weights, one over the other: more is a slip, and overflows
_EITHER = {"steps", "epochs"}  # the first layer with one of them decides
_PATHS = {"model", "adapter", "text", "held_out_text", "retain", "output"}
_BY_CONTENT = {"model", "text", "held_out_text", "retain"}  # may be moved: the run compares what is in them
# `--resume` allows another value, as training is the same
_MAY_CHANGE = {
    *("trust_remote_code", "workers", "gradient_checkpointing", "eval_steps", "log_steps", "report_to"),
    *("output", "save_steps", "merge", "push_to_hub", "keep_best", "patience", "max_retain_rise"),
}
_NEEDS = {
    "patience": ["eval_steps"],
    "max_retain_rise": ["eval_steps", "retain"],
    "keep_best": ["eval_steps"],
}
_SHARED = {"batch_size", "gradient_accumulation_steps"}  # so does it these: `global_batch` checks them
_FIXED = [name for name, option in OPTIONS.items() if not option.by_run and name not in _MAY_CHANGE]


class Settings(NamedTuple):
    """``args``: a value for every option; ``origins``: option -> "command line", "recipe paper", ...

    ``recorded``: the text of the run.yaml that was read for ``--resume``; None without it.
    """

    args: argparse.Namespace
    origins: dict[str, str]
    recorded: str | None = None


def read(path: Path, option: str = "--config") -> dict[str, object]:
    """Option -> value from a YAML file like "rank: 16", checked as on the command line.

    ``option`` is the one that led to the file, for the messages.

    Raises UsageError for a file that cannot be read, is not YAML or not a mapping, for unknown keys and for
    values that the command line would refuse.
    """
    from mica.cli.adapt import flat_yaml  # which needs PyYAML

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    declare(parser)
    try:
        tokens = []
        names = set()
        for key, value in flat_yaml.parse(path.read_text(encoding="utf-8")).items():
            name = key.replace("-", "_")
            if name in names:
                raise UsageError(f"{name} is there twice, with - and with _")
            names.add(name)
            tokens += _tokens(key, value)
        return vars(parser.parse_args(tokens))
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be read: {one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {path}: is not YAML: {one_line(error)}") from error
    except (UsageError, argparse.ArgumentError) as error:
        raise UsageError(f"{option} {path}: {with_suggestion(one_line(error))}") from error


def _tokens(key: str, value: str | list[str] | None) -> list[str]:
    """One entry of a YAML file as on the command line, a list as the option given again and again."""
    name = key.replace("-", "_")
    if name == _PROCESSES:
        return []
    option = OPTIONS.get(name)
    if option is None:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        raise UsageError(f"there is no option '{key}'" + "".join(f", did you mean {one}?" for one in near))
    if option.by_run:
        raise UsageError(f"{option.flag} belongs on the command line")
    if value is None:
        return []
    if isinstance(value, list):
        if not option.many:
            raise UsageError(f"{key} must be one value, and is a list")
        return [f"{option.flag}={one}" for one in value] or [option.flag]
    if option.parse is bool:
        if value.lower() not in _SWITCHED:
            raise UsageError(f"{key} must be true or false, not {value}")
        return [option.flag if _SWITCHED[value.lower()] else option.flag.replace("--", "--no-", 1)]
    return [f"{option.flag}={value}"]  # with the value in one token: it may start with a dash


def resolve(given: argparse.Namespace) -> Settings:
    """A value for every option: command line over YAML over recipe over default.

    ``given``: what the command line had (see `options.declare`). With ``--resume`` the run.yaml of the output
    folder is read, if there is one, else the folder of ``--adapter``.

    Raises UsageError for what `read` refuses, for a missing required option, for options that
    exclude each other, and for values other than those of the adapter or, under ``--resume``, of the run.
    """
    line = {name: value for name, value in vars(given).items() if name in OPTIONS}
    layers = [("command line", line)]
    if "config" in line:
        layers.append((line["config"].name, read(line["config"])))
    for origin, layer in layers:
        if layer.keys() >= _EITHER:
            raise UsageError(f"--steps and --epochs: give one of them ({origin} has both)")
    if line.keys() >= {"held_out", "held_out_text"}:
        raise UsageError("--held-out and --held-out-text: give one of them")

    found = ChainMap(*(layer for _, layer in layers))
    text = recorded_text(found["output"]) if line.get("resume") and "output" in found else None
    folder, adapter, recorded = found.get("output"), found.get("adapter"), None
    if line.get("resume") and folder is not None and (folder / FILE).is_file():
        # With what the adapter said then: its folder need not exist any more. No experts, no such entry.
        recorded = {"experts": None} | read(folder / FILE, "--resume")
        layers.append((FILE, recorded))
    elif adapter is not None:
        from mica.cli.adapt import adapter as adapters  # which needs torch

        its_own = adapters.settings(adapters.read_adapter_config(adapter), adapter)
        layers.append(("adapter", its_own))
        fixed = its_own.keys() - {"dropout"}  # that is not in its weights
        _refuse_others({name: found[name] for name in found if name in fixed}, its_own, "--adapter")
    recipe = ChainMap(*(layer for _, layer in layers)).get("recipe", OPTIONS["recipe"].default)
    layers.append((f"recipe {recipe}", RECIPES[recipe]))

    values = {name: option.default for name, option in OPTIONS.items()}
    origins = dict.fromkeys(OPTIONS, "default")
    for origin, layer in reversed(layers):
        if _EITHER & layer.keys():
            values |= dict.fromkeys(_EITHER)
        values |= layer
        origins |= dict.fromkeys(layer, origin)
        if layer is recorded:
            origins |= {"experts": "default"} | _recorded_origins(folder)
    if "warmup_ratio" in line and values["scheduler"] == "constant":
        raise UsageError("--warmup-ratio: the scheduler constant has none; constant_with_warmup has")
    if values["alpha"] is None:
        values["alpha"], origins["alpha"] = values["alpha_per_rank"] * values["rank"], f"recipe {recipe}"
    if values["train_embeddings"] and values["embedding_learning_rate"] is None:
        values["embedding_learning_rate"] = values["learning_rate"] / 10  # as in the field's recipes
        origins["embedding_learning_rate"] = "a tenth of learning_rate"
    values["report_to"] = values["report_to"] or []
    if values["keep_best"] is None and (values["patience"] or values["max_retain_rise"]):
        values["keep_best"] = True  # who stops because it gets worse does not want the worse
    if recorded is not None:
        free = _SHARED if any(folder.glob("checkpoint-*")) else set()  # else the run starts anew
        own = {name: values[name] for name in _FIXED if values[name] is not None and name not in free}
        _refuse_others(own, dict.fromkeys(_FIXED) | recorded, f"--resume: {folder / FILE}")
    _check(values)
    args = argparse.Namespace(**{name: values[name] for name in OPTIONS})
    shown_origins = {name: origins[name] for name in OPTIONS if name not in _EITHER or values[name]}
    return Settings(args, shown_origins, text)


def recorded_text(output: Path) -> str | None:
    """What is in the run.yaml of ``output``; None if there is none that can be read as text."""
    try:
        return (output / FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def folders(args: argparse.Namespace) -> list[str]:
    """The folders that a run with these options writes in its output folder, but checkpoints."""
    return [MERGED] * bool(args.merge) + ["runs"] * ("tensorboard" in args.report_to)


def check_output(settings: Settings) -> None:
    """`folder.check` for a run with these settings."""
    args = settings.args
    check(
        args.output,
        resume=args.resume,
        overwrite=args.overwrite,
        inputs=inputs(args),
        more=folders(args),
    )


def _recorded_origins(folder: Path) -> dict[str, str]:
    """Option -> where its value came from when the run began."""
    found = record.read(folder)
    return found.origins if found is not None else {}


def _check(values: dict[str, object]) -> None:
    missing = [option.flag for option in OPTIONS.values() if option.required and values[option.name] is None]
    resumed = values["output"] if values["resume"] else None
    if missing and resumed is not None and not (resumed.is_dir() and any(resumed.iterdir())):
        found = "it is empty" if resumed.is_dir() else "no such folder"
        raise UsageError(f"--resume: nothing to continue in {resumed}: {found}")
    if missing:
        found = f" ({resumed} has no {FILE})" if resumed is not None else ""
        raise UsageError(f"the following arguments are required: {', '.join(missing)}{found}")
    given, needed = len(values["text_weights"] or values["text"]), len(values["text"])
    if given != needed:
        raise UsageError(f"--text-weights: {given} numbers for {needed} sources of --text")
    weights = values["text_weights"] or [1.0]
    if max(weights) / min(weights) > FARTHEST:
        given = " ".join(f"{weight:g}" for weight in weights)
        raise UsageError(f"--text-weights {given}: one must be at most {FARTHEST:,} times another")
    for name, needed in _NEEDS.items():
        if values[name] and (missing := [OPTIONS[one].flag for one in needed if not values[one]]):
            raise UsageError(f"{OPTIONS[name].flag}: needs {' and '.join(missing)}")
    if values["embedding_learning_rate"] is not None and not values["train_embeddings"]:
        raise UsageError("--embedding-learning-rate: needs --train-embeddings")
    if values["resume"] and values["overwrite"]:
        raise UsageError("--resume and --overwrite: give one of them")


def _refuse_others(values: dict, fixed: dict, where: str) -> None:
    for name, value in values.items():
        if _plain(fixed[name]) != _plain(value):
            has = f"has {_shown(fixed[name])}" if fixed[name] is not None else "does not have it"
            raise UsageError(f"{OPTIONS[name].flag} {_shown(value)}: {where} {has}; omit this option")


def inputs(args: argparse.Namespace) -> dict[str, list[str]]:
    """Option -> what it names, of those that name files or folders to be read."""
    read = _PATHS - {"output"} | {"config"}
    given = {name: getattr(args, name) for name in OPTIONS if name in read}
    lists = {name: value if isinstance(value, list) else [value] for name, value in given.items() if value}
    return {OPTIONS[name].flag: [*map(str, values)] for name, values in lists.items()}


def _plain(value: object) -> object:
    """``value`` as YAML has it: a path is absolute."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return absolute(value) if isinstance(value, (str, Path)) else value


def absolute(value: str | Path) -> str:
    """The absolute path where there is such a file or folder; else ``value`` itself, a name on the Hub."""
    path = expanded(value)
    return str(path.resolve()) if os.path.exists(path) else str(value)  # not Path's, which raises: too long


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def recorded_processes(path: Path) -> int | None:
    """How many processes the run had whose run.yaml ``path`` is; None where it does not say. See `read`."""
    from mica.cli.adapt import flat_yaml

    number = flat_yaml.parse(path.read_text(encoding="utf-8")).get(_PROCESSES)
    return int(number) if isinstance(number, str) and number.isdecimal() else None


def as_yaml(settings: Settings, processes: int = 1, note: str = "") -> str:
    """The text of run.yaml: ``--config`` of that file repeats the run from anywhere.

    ``note``: about the number of ``processes``.
    """
    given = values(settings)
    lines = [f"# mica adapt {__version__}. Again into another folder: mica adapt --config FILE --output DIR"]
    for row in TABLE:
        if isinstance(row, str):
            lines.append(f"\n# {row}")
        elif row.name in given:
            # JSON is YAML; a float without a dot (1e-05) is a string there, which the option's parser takes
            value = _as_yaml(given[row.name])
            lines.append(f"{row.name}: {value}  # {shown(settings.origins[row.name])}")
    return "\n".join([*lines, f"\n{_PROCESSES}: {processes}  # the launcher{note}\n"])


def _as_yaml(value: object) -> str:
    """``value`` as JSON that YAML reads as the same: characters that no YAML file may have are escaped.

    Among them are those by which Python holds a file's name that is not UTF-8. JSON has no escapes of more
    than four digits, and YAML does not join two of them to one character.
    """
    text = json.dumps(value, ensure_ascii=False)
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    code = ord(one)
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"


def fixed(args: argparse.Namespace) -> dict[str, object]:
    """Option -> value, as JSON has it, of those that must be the same in a run and after ``--resume``.

    Without those of which the contents are compared.
    """
    given = {name: getattr(args, name) for name in _FIXED if name not in _BY_CONTENT}
    return given | {"adapter": args.adapter and absolute(args.adapter)}


def values(settings: Settings) -> dict[str, object]:
    """Option -> value as JSON and YAML have it: without those of one start and those that are not set."""
    given = {name: getattr(settings.args, name) for name, option in OPTIONS.items() if not option.by_run}
    return {
        name: _plain(value) if name in _PATHS else value
        for name, value in given.items()
        if value is not None and value != []
    }


def describe(settings: Settings) -> str:
    """Every value of a run with where it comes from, a paragraph per origin."""
    lines: dict[str, str] = {}
    for name, value in values(settings).items():
        origin = settings.origins[name]
        source = f" ({RECIPES[settings.args.recipe]['source']})" if origin.startswith("recipe") else ""
        begun = f"{lines[origin]}, " if origin in lines else f"{origin}{source}: "
        lines[origin] = f"{begun}{name} {_shown(value)}"
    return "\n".join(lines.values())
