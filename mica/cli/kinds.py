"""The kinds of a model's layers, q_proj, k_proj, ..., and the table of ``mica inspect``: a line for each."""

import re
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from mica.cli.output import aligned, size_text

# What must be equal for layers to share a line, besides the kind
_IN_COMMON = ("shape", "dtype", "quantised", "reason")
_NAMED = 3  # layers that a line names at most


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


def kinds_table(kinds: list[Kind], rank: int) -> str:
    """The medians of each kind, with its worst gap, energy and excess.

    Below it stand which layers are not proven, and which cannot be adapted.
    """
    sigmas = [f"sigma_{which}" for which in (rank + 1, rank, 1)]
    header = ["kind", "layers", "out x in", "dtype", *sigmas, "gap", "min gap", "energy", "max energy"]
    suitable = [kind for kind in kinds if not kind.rows[0].reason]
    lines = aligned([[*header, "proven", "max excess"], *map(_cells, suitable)])

    unproven = [row for kind in suitable for row in kind.rows if not row.proven]
    if unproven:
        lines.append(f"not proven: {_names(unproven)}")
    for kind in kinds:
        reason = kind.rows[0].reason
        if reason:
            lines.append(f"cannot be adapted: {reason} ({_names(kind.rows)})")
    return "\n".join(lines)


def _cells(kind: Kind) -> list[str]:
    first = kind.rows[0]
    dtype = f"{first.quantised}, dequantised" if first.quantised else first.dtype
    values = kind.values
    at_the_cut = ("sigma_above", "sigma_largest", "sigma_smallest", "gap")
    proven = [row.energy_excess for row in kind.rows if row.proven]
    return [
        kind.name,
        str(len(kind.rows)),
        size_text(first.shape),
        dtype,
        *(_number(median, values(name), ".4g") for name in at_the_cut),
        _number(min, values("gap"), ".4g"),
        _number(median, values("energy_share"), ".2g"),
        _number(max, values("energy_share"), ".2g"),
        f"{len(proven)} of {len(kind.rows)}",
        _number(max, proven, ".1e"),
    ]


def _number(which: Callable, values: list[float], spec: str) -> str:
    """``which`` of the values, like their median; a dash where there are none."""
    if not values:
        return "-"
    return format(which(values), spec)


def _names(rows: list) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(row.name for row in rows[:_NAMED])
    more = len(rows) - _NAMED
    if more > 0:
        text += f" and {more} more"
    return text
