"""The kinds of a model's layers: q_proj, k_proj, ...; and what `mica inspect` tells of a whole kind."""

import re
import statistics
from dataclasses import dataclass

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

    variants: dict[str, set[str]] = {}  # last component -> the endings that it has
    for ending in endings.values():
        last = ending.rpartition(".")[2]
        variants.setdefault(last, set()).add(ending)

    kinds: dict[str, list[str]] = {}
    for name, ending in endings.items():
        last = ending.rpartition(".")[2]
        kind = ending
        if len(variants[last]) == 1:
            kind = last
        kinds.setdefault(kind, []).append(name)
    return kinds


@dataclass(frozen=True)
class Kind:
    """Layers of one kind and one shape: ``rows`` are their `mica.cli.spectra.Row`, in the model's order."""

    name: str
    rows: list

    def median(self, field: str) -> float | None:
        """Of a number of the rows; None if no row has it."""
        values = self._values(field)
        if not values:
            return None
        return statistics.median(values)

    def smallest(self, field: str) -> float | None:
        return min(self._values(field), default=None)

    def largest(self, field: str) -> float | None:
        return max(self._values(field), default=None)

    @property
    def proven(self) -> list:
        return [row for row in self.rows if row.proven]

    def _values(self, field: str) -> list[float]:
        values = [getattr(row, field) for row in self.rows]
        return [value for value in values if value is not None]


def grouped(rows: list) -> list[Kind]:
    """``rows`` by kind. Layers of another shape or dtype, and those that cannot be adapted, are apart."""
    by_name = {row.name: row for row in rows}
    kinds = []
    for name, members in by_kind(list(by_name)).items():
        groups: dict[tuple, list] = {}
        for member in members:
            row = by_name[member]
            groups.setdefault(tuple(getattr(row, field) for field in _IN_COMMON), []).append(row)
        kinds += [Kind(name, group) for group in groups.values()]
    return kinds
