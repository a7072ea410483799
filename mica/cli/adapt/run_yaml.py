"""Options in YAML files: ``--config`` and run.yaml, which are read alike, and the text of a new run.yaml."""

import argparse
import difflib
import json
from pathlib import Path

from mica import __version__
from mica.cli.adapt.folder import HEADER
from mica.cli.adapt.options import OPTIONS, TABLE, declare
from mica.cli.arguments import with_suggestion
from mica.cli.output import one_line, shown
from mica.errors import UsageError

_PROCESSES = "processes"  # an entry of run.yaml that is no option: how many processes the run had
# The booleans of YAML 1.2, and the words of YAML 1.1 that many are used to
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


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
        entries = flat_yaml.parse(path.read_text(encoding="utf-8"))
        return vars(parser.parse_args(_arguments(entries)))
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be read: {one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {path}: is not YAML: {one_line(error)}") from error
    except (UsageError, argparse.ArgumentError) as error:
        raise UsageError(f"{option} {path}: {with_suggestion(one_line(error))}") from error


def _arguments(entries: dict[str, str | list[str] | None]) -> list[str]:
    """The entries of a YAML file as arguments of the command line."""
    arguments = []
    names = set()
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name in names:
            raise UsageError(f"{name} is set twice, once with - and once with _")
        names.add(name)
        arguments += _entry(key, name, value)
    return arguments


def _entry(key: str, name: str, value: str | list[str] | None) -> list[str]:
    """One entry as on the command line, a list as the option given again and again."""
    if name == _PROCESSES:
        return []
    option = OPTIONS.get(name)
    if option is None:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        suggestion = f", did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no option '{key}'{suggestion}")
    if option.by_run:
        raise UsageError(f"{option.flag} belongs on the command line")

    if value is None:
        return []
    if isinstance(value, list):
        if not option.many:
            raise UsageError(f"{key} must be one value, not a list")
        return [f"{option.flag}={one}" for one in value] or [option.flag]
    if not option.is_switch:
        return [f"{option.flag}={value}"]  # with the value in one token: it may start with a dash
    if value.lower() not in _BOOLEANS:
        raise UsageError(f"{key} must be true or false, not {value}")
    if _BOOLEANS[value.lower()]:
        return [option.flag]
    return [option.flag.replace("--", "--no-", 1)]


def recorded_processes(path: Path) -> int | None:
    """How many processes the run had whose run.yaml ``path`` is; None where it does not say. See `read`."""
    from mica.cli.adapt import flat_yaml

    number = flat_yaml.parse(path.read_text(encoding="utf-8")).get(_PROCESSES)
    if not isinstance(number, str) or not number.isdecimal():
        return None
    return int(number)


def as_yaml(values: dict[str, object], origins: dict[str, str], processes: int = 1) -> str:
    """The text of run.yaml: ``--config`` of that file repeats the run from anywhere.

    ``values``: as `config.values` has them. The comments, among them ``origins``, are for readers: no program
    reads them.
    """
    lines = [f"{HEADER} {__version__}. Again into another folder: mica adapt --config FILE --output DIR"]
    for row in TABLE:
        if isinstance(row, str):
            lines.append(f"\n# {row}")
        elif row.name in values:
            # JSON is YAML; a float without a dot (1e-05) is a string there, which the option's parser takes
            lines.append(f"{row.name}: {_as_yaml(values[row.name])}  # {shown(origins[row.name])}")
    lines.append(f"\n{_PROCESSES}: {processes}  # the launcher\n")
    return "\n".join(lines)


def _as_yaml(value: object) -> str:
    """``value`` as JSON that YAML reads as the same: characters that no YAML file may have are escaped.

    Among them are those by which Python holds a file's name that is not UTF-8. JSON has no escapes of more
    than four digits, and YAML does not join two of them to one character.
    """
    text = json.dumps(value, ensure_ascii=False)
    return "".join(_escaped(one) for one in text)


def _escaped(one: str) -> str:
    """One character, as it is if it can be printed."""
    if one.isprintable():
        return one
    code = ord(one)
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\u{code:04x}"
