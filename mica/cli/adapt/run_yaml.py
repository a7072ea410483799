"""Options in YAML files: ``--config`` and run.yaml, which are read alike.

A value is the text itself, which the option's parser takes as on the command line: in YAML 1.1, which PyYAML
reads, 010 is 8, 1:30 is 90 and ``no`` is false.
"""

import argparse
from pathlib import Path

from mica import __version__
from mica.cli.adapt.folder import HEADER
from mica.cli.adapt.options import OPTIONS, Values, declare
from mica.cli.arguments import similar
from mica.cli.output import one_line
from mica.errors import UsageError

_NULLS = ("", "~", "null")
_BOOLEANS = {"true": True, "false": False}


def read(path: Path, option: str = "--config") -> Values:
    """Option -> value from a YAML file like "rank: 16", checked as on the command line.

    ``option`` is the one that led to the file, for the messages.

    Raises UsageError for a file that cannot be read, is not YAML or not a mapping, for unknown keys and for
    values that the command line would refuse.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    declare(parser)
    try:
        arguments = []
        for key, value in _mapping(path.read_text(encoding="utf-8")).items():
            arguments += _entry(str(key).replace("-", "_"), value)
        return vars(parser.parse_args(arguments))
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be read: {one_line(error)}") from error
    except (ValueError, UsageError, argparse.ArgumentError) as error:
        raise UsageError(f"{option} {path}: {one_line(error)}") from error


def _mapping(text: str) -> dict[object, object]:
    """A mapping in YAML: keys and values are strings, or lists and mappings of them."""
    import yaml

    try:
        found = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise UsageError("must be a mapping of options to values, like 'rank: 16'")
    return found


def _entry(name: str, value: object) -> list[str]:
    """An entry as on the command line, a list as the option given again and again."""
    option = OPTIONS.get(name)
    if option is None:
        raise UsageError(f"there is no option '{name}'{similar(name, OPTIONS)}")
    if option.by_run:
        raise UsageError(f"{option.flag} belongs on the command line")
    if value in _NULLS:
        return []

    values = value if option.many and isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in values):
        raise UsageError(f"{name} must be one value{' or a list of them' * option.many}, not {values[0]}")
    if not option.is_switch:
        return [f"{option.flag}={each}" for each in values]  # in one token: it may start with a dash
    if value.lower() not in _BOOLEANS:
        raise UsageError(f"{name} must be true or false, not {value}")
    if _BOOLEANS[value.lower()]:
        return [option.flag]
    return [option.flag.replace("--", "--no-", 1)]


def as_yaml(values: Values) -> str:
    """The text of run.yaml: ``--config`` of that file repeats the run from anywhere.

    ``values``: as `config.values` has them.
    """
    import yaml

    head = f"{HEADER} {__version__}. Again into another folder: mica adapt --config FILE --output DIR\n"
    # Not allow_unicode: by it PyYAML writes some line breaks in a name as they are, and reads spaces.
    return head + yaml.safe_dump(values, sort_keys=False, width=float("inf"))
