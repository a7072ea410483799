"""The kinds of a model's layers: q_proj, k_proj, ...; and what `mica inspect` tells of a whole kind."""

import re
from collections import Counter
from typing import NamedTuple

# What must be equal for layers to share a line, besides the kind
_IN_COMMON = ("shape", "dtype", "quantised", "reason")


def by_kind(names: list[str]) -> dict[str, list[str]]:
    """Names of modules by kind: the last component, or the last two where one has several parents.

    Numbers do not count, so that the experts of a block are one kind. "h.0.attn.c_proj" and
    "h.0.mlp.c_proj" are the kinds "attn.c_proj" and "mlp.c_proj".
    """
    endings = {}  # name -> its last two components without numbers
    for name in names:
        words = re.sub(r"(?<![^.])\d+(\.|$)", "", name).strip(".") or name
        endings[name] = ".".join(words.split(".")[-2:])

    parents = Counter(ending.rpartition(".")[2] for ending in set(endings.values()))
    kinds: dict[str, list[str]] = {}
    for name, kind in endings.items():
        last = kind.rpartition(".")[2]
        if parents[last] == 1:
            kind = last
        kinds.setdefault(kind, []).append(name)
    return kinds


class Kind(NamedTuple):
    """Layers of one kind and one shape: ``rows`` are their `mica.cli.spectra.Row`, in the model's order."""

    name: str
    rows: list

    def values(self, field: str) -> list[float]:
        """A number of the rows, of those that have it."""
        found = [getattr(row, field) for row in self.rows]
        return [value for value in found if value is not None]


def grouped(rows: list) -> list[Kind]:
    """``rows`` by kind. Layers of another shape or dtype, and those that cannot be adapted, are apart."""
    by_name = {row.name: row for row in rows}
    groups: dict[tuple, list] = {}
    for kind, members in by_kind(list(by_name)).items():
        for row in map(by_name.get, members):
            in_common = [getattr(row, field) for field in _IN_COMMON]
            groups.setdefault((kind, *in_common), []).append(row)
    return [Kind(kind, rows) for (kind, *_), rows in groups.items()]
