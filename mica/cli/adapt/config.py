"""From command line, YAML file and recipe to the settings of a run, and back to a YAML file."""

import argparse
import difflib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from mica import __version__
from mica.cli.adapt.options import GROUPS, OPTIONS, declare
from mica.cli.adapt.recipes import RECIPES
from mica.cli.output import write_file
from mica.errors import UsageError

FILE = "run.yaml"  # in the output folder: the settings of its run
_PROCESSES = "processes"  # in it, though no option: how many the run had


class Settings(NamedTuple):
    """``args``: a value for every option; ``origins``: option -> "command line", "recipe paper", ..."""

    args: argparse.Namespace
    origins: dict[str, str]


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def _parse(tokens: list[str]) -> dict[str, object]:
    parser = _Parser(add_help=False, allow_abbrev=False)
    declare(parser)
    return vars(parser.parse_args(tokens))


def read(path: Path, option: str = "--config") -> dict[str, object]:
    """Option -> value from a YAML file like "rank: 16", checked as on the command line.

    ``option`` is the one that led to the file, for the messages.

    Raises UsageError for a file that cannot be read, is not YAML or not a mapping, for unknown keys and for
    values that the command line would refuse.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{option} {path}: is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{option} {path}: must be a mapping of options to values, like 'rank: 16'")
    tokens = [token for key, value in content.items() for token in _tokens(f"{option} {path}", key, value)]
    try:
        return _parse(tokens)
    except UsageError as error:
        raise UsageError(f"{option} {path}: {error}") from error


def _tokens(where: str, key: object, value: object) -> list[str]:
    """One entry of a YAML file as on the command line."""
    name = str(key).replace("-", "_")
    if name == _PROCESSES:
        return []
    option = OPTIONS.get(name)
    if option is None:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UsageError(f"{where}: there is no option '{key}'{hint}")
    if option.by_run:
        raise UsageError(f"{where}: {option.flag} belongs on the command line")
    if value is None:
        return []
    if option.parse is bool:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: {key} must be true or false, not '{value}'")
        return [option.flag if value else option.flag.replace("--", "--no-", 1)]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, (dict, list, bool)) for one in values) or (len(values) != 1 and not option.many):
        raise UsageError(f"{where}: {key} must be {'a list' if option.many else 'one value'}, not {value}")
    if not option.many:
        return [f"{option.flag}={values[0]}"]  # with the value in one token: it may start with a dash
    return [option.flag, *map(str, values)]


def resolve(
    given: argparse.Namespace, read_adapter: Callable[[Path], dict[str, object]] | None = None
) -> Settings:
    """A value for every option: command line over YAML over recipe over default.

    ``given``: what the command line had (see `options.declare`). With ``--resume`` the run.yaml of the output
    folder is read, if there is one. ``read_adapter``: what the folder of ``--adapter`` sets, option -> value.

    Raises UsageError for what `read` refuses, for a missing required option, for ``--steps`` with
    ``--epochs``, and for values other than those of the adapter or, under ``--resume``, of the run.
    """
    line = {name: value for name, value in vars(given).items() if name in OPTIONS}
    layers = [("command line", line)]
    if "config" in line:
        layers.append((line["config"].name, read(line["config"])))
    for origin, values in layers:
        if all(key in values for key in _EITHER):
            raise UsageError(f"--steps and --epochs: give one of them ({origin} has both)")

    running, recorded = {}, {}
    output = _first("output", layers)
    if line.get("resume") and output is not None and (output / FILE).is_file():
        running, recorded = read(output / FILE, "--resume"), _recorded_origins(output / FILE)
        running.pop("output", None)  # the folder may have been moved
        running.setdefault("experts", None)  # not written for a model without them
        recorded.setdefault("experts", "default")
    adapter = _first("adapter", layers)
    if running:
        layers.append((FILE, running))  # with what the adapter said then; its folder need not exist any more
    elif adapter is not None and read_adapter is not None:
        its_own = read_adapter(adapter)
        fixed = {
            key: value for key, value in its_own.items() if key != "dropout"
        }  # that is not in its weights
        for _, layer in layers:
            _refuse_others(layer, fixed, "--adapter")
        layers.append(("adapter", its_own))
    name = _first("recipe", layers) or OPTIONS["recipe"].default
    recipe = RECIPES[name]
    layers.append((f"recipe {name}", recipe.values))
    layers.append(("default", {option.name: option.default for option in OPTIONS.values()}))

    values, origins = _overlay(layers)
    if values["alpha"] is None:
        values["alpha"], origins["alpha"] = recipe.alpha_per_rank * values["rank"], f"recipe {name}"
    values["report_to"] = values["report_to"] or []
    if running:
        fixed = {
            option.name: running.get(option.name) for option in OPTIONS.values() if not option.may_change
        }
        _refuse_others(
            {key: value for key, value in values.items() if not OPTIONS[key].by_run},
            fixed,
            f"--resume: {output / FILE}",
        )
        origins = {
            key: recorded.get(key, origin) if origin == FILE else origin for key, origin in origins.items()
        }
    _check(values)
    return Settings(argparse.Namespace(**values), {key: origins[key] for key in OPTIONS if key in origins})


_EITHER = ("steps", "epochs")  # the first layer with one of them decides


def _first(name: str, layers: list[tuple[str, dict]]) -> object:
    return next((values[name] for _, values in layers if name in values), None)


def _overlay(layers: list[tuple[str, dict]]) -> tuple[dict[str, object], dict[str, str]]:
    """Values and origins; earlier layers win."""
    values, origins = {}, {}
    for origin, layer in layers:
        decided = any(values.get(key) is not None for key in _EITHER)
        for key, value in layer.items():
            if key not in values and not (decided and key in _EITHER):
                values[key], origins[key] = value, origin
    for key in _EITHER:
        values.setdefault(key, None)
    return values, origins


def _check(values: dict[str, object]) -> None:
    missing = [option.flag for option in OPTIONS.values() if option.required and values[option.name] is None]
    if missing:
        output, found = values["output"], ""
        if values["resume"] and output is not None and not (output / FILE).is_file():
            if not output.is_dir() or not any(output.iterdir()):
                found = "it is empty" if output.is_dir() else "no such folder"
                raise UsageError(f"--resume: nothing to go on from in {output}: {found}")
            found = f" ({output} has no {FILE})"
        raise UsageError(f"the following arguments are required: {', '.join(missing)}{found}")
    weights = values["text_weights"]
    if weights is not None and len(weights) != len(values["text"]):
        raise UsageError(
            f"--text-weights: {len(weights)} numbers for {len(values['text'])} sources of --text"
        )
    if values["resume"] and values["overwrite"]:
        raise UsageError("--resume and --overwrite: give one of them")


def _recorded_origins(path: Path) -> dict[str, str]:
    """Option -> origin, from the comments that `write` puts behind the values."""
    entries = (line.rpartition("  # ") for line in path.read_text(encoding="utf-8").splitlines())
    return {entry.partition(":")[0]: origin for entry, _, origin in entries if entry}


def _refuse_others(values: dict, fixed: dict, where: str) -> None:
    for key, value in values.items():
        if key in fixed and _plain(fixed[key]) != _plain(value):
            has = f"has {_shown(fixed[key])}" if fixed[key] is not None else "does not have it"
            raise UsageError(f"{OPTIONS[key].flag} {_shown(value)}: {where} {has}; leave the option out")


def _plain(value: object) -> object:
    """Without the difference between a relative and an absolute path."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return absolute(value) if isinstance(value, (str, Path)) else value


def absolute(value: str | Path) -> str:
    """The absolute path where there is such a file or folder; else ``value`` itself, a name on the Hub."""
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else str(value)


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def recorded_processes(path: Path) -> int | None:
    """How many processes the run had whose run.yaml ``path`` is; None where it does not say. See `read`."""
    import yaml

    number = yaml.safe_load(path.read_text(encoding="utf-8")).get(_PROCESSES)
    return number if isinstance(number, int) else None


def write(settings: Settings, folder: Path, processes: int = 1) -> None:
    """Write the settings to ``folder``/run.yaml: ``--config`` of that file repeats the run from anywhere."""
    text = "".join(f"{line}\n" for line in _yaml(settings, processes))
    write_file("--output", folder / FILE, lambda scratch: scratch.write_text(text, encoding="utf-8"))


_PATHS = ("model", "adapter", "text", "held_out_text", "retain", "output")
_BY_CONTENT = ("model", "text", "held_out_text", "retain")  # may be moved: the run compares what is in them


def fixed(args: argparse.Namespace) -> dict[str, object]:
    """Option -> value, as JSON has it, of those that must be the same in a run and after ``--resume``.

    Without those of which the contents are compared.
    """
    given = {
        option.name: getattr(args, option.name)
        for option in OPTIONS.values()
        if not (option.by_run or option.may_change or option.name in _BY_CONTENT)
    }
    return given | {"adapter": args.adapter and absolute(args.adapter)}


def values(settings: Settings) -> dict[str, object]:
    """Option -> value as JSON and YAML have it: without those of one start and those that are not set."""
    result = {}
    for option in OPTIONS.values():
        value = getattr(settings.args, option.name)
        if option.by_run or value is None or value == []:
            continue
        if option.name in _PATHS:
            value = [absolute(one) for one in value] if option.many else absolute(value)
        result[option.name] = value
    return result


def _yaml(settings: Settings, processes: int) -> Iterable[str]:
    given = values(settings)
    yield f"# mica adapt {__version__}. Again into another folder: mica adapt --config FILE --output DIR"
    for title, options in GROUPS.items():
        yield f"\n# {title}"
        for name in (option.name for option in options if option.name in given):
            # JSON is YAML; a float without a dot (1e-05) is a string there, which the option's parser takes
            yield f"{name}: {json.dumps(given[name], ensure_ascii=False)}  # {settings.origins[name]}"
    yield f"\n{_PROCESSES}: {processes}  # the launcher"


def describe(settings: Settings) -> str:
    """Every value of a run with where it comes from, a paragraph per origin."""
    by_origin: dict[str, list[str]] = {}
    for name, value in values(settings).items():
        by_origin.setdefault(settings.origins[name], []).append(f"{name} {_shown(value)}")
    source = RECIPES[settings.args.recipe].source
    return "\n".join(
        f"{origin}{f' ({source})' if origin.startswith('recipe') else ''}: {', '.join(parts)}"
        for origin, parts in by_origin.items()
    )
