"""A YAML file of options: a mapping of names to values or lists of values, each as it is written.

YAML 1.1, which PyYAML reads, takes 010 for 8, 1:30 for 90, ``no`` for false and 2026-01-01 for a date, and of
two equal keys the last. Here a value is the text itself, and the option's parser decides, as on the command
line; what options have no use for (nested values, tags, equal keys) is refused. So a file cannot be
deep enough, or refer to itself often enough, to exhaust anything.
"""

import yaml

from mica.errors import UsageError

_NULLS = ("", "~", "null", "Null", "NULL")  # where it is not in quotes
_UNTAGGED = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


def parse(text: str) -> dict[str, str | list[str] | None]:
    """The entries of ``text``, in order. None where there is no value or null.

    Raises UsageError where the text is not YAML, not a mapping, has a key twice, or a value that is neither
    a scalar nor a list of scalars.
    """
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"is not YAML: {error}") from error
    except RecursionError as error:
        raise UsageError("must be a mapping of options to values, but is nested too deeply") from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError("must be a mapping of options to values, like 'rank: 16'")
    entries: dict[str, str | list[str] | None] = {}
    for key_node, value_node in root.value:
        key = _scalar("a key", key_node)
        if key in entries:
            raise UsageError(f"{key} is set twice, the second time in line {key_node.start_mark.line + 1}")
        entries[key] = _value(key, value_node)
    return entries


def _value(key: str, node: yaml.Node) -> str | list[str] | None:
    if _is_null(node):
        return None
    if not isinstance(node, yaml.SequenceNode):
        return _scalar(key, node)
    values = []
    for one in node.value:
        if _is_null(one):
            raise UsageError(f"{key} has an empty value in line {one.start_mark.line + 1}")
        values.append(_scalar(f"every value of {key}", one))
    return values


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULLS


def _scalar(what: str, node: yaml.Node) -> str:
    line = node.start_mark.line + 1
    if node.tag not in _UNTAGGED:
        raise UsageError(f"{what} must not have a tag, but has {node.tag} in line {line}")
    if isinstance(node, yaml.ScalarNode):
        return _whole_characters(node.value)
    found = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    raise UsageError(f"{what} must be one value, but is {found} in line {line}")


def _whole_characters(text: str) -> str:
    """``text`` with JSON's two escapes of one character joined, which YAML reads as two."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:  # half a character: a byte of a file's name that is not UTF-8
        return text
