"""The path table as text: rows that differ only in the numbers of their names are one line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_HEADER = ("layer", "base", "adapter", "path", "reason")


def text(rows) -> str:
    """Of `mica.fast.paths.Row`\\ s: aligned lines in the order of the layers, and the totals."""
    if not rows:
        return "no adapted layers"
    equal: dict[tuple, list[str]] = {}
    for row in rows:
        numberless = re.sub(r"\d+", "#", row.name)
        equal.setdefault((numberless, row.layer, row.adapter, row.path, _remark(row)), []).append(row.name)
    lines = [_HEADER]
    for (_, *rest), names in equal.items():
        for pattern, count in patterns(names):
            lines.append((pattern + (f"  ×{count}" if count > 1 else ""), *rest))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    printed = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in lines
    ]
    return "\n".join([*printed, _totals(rows)])


def _remark(row) -> str:
    said = {None: "", 0: "not called in the last forward", 1: ""}
    calls = said.get(row.calls, f"called {row.calls} times in the last forward")
    return "; ".join(filter(None, (row.reason, calls)))


def _totals(rows) -> str:
    paths = Counter(row.path for row in rows)
    parts = [", ".join(f"{count} {path}" for path, count in paths.items())]
    uncalled = sum(row.calls == 0 for row in rows)
    if uncalled:
        parts.append(f"{uncalled} not called in the last forward")
    return f"{len(rows)} layer{'s' if len(rows) > 1 else ''}: {'; '.join(parts)}"


def patterns(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names that differ only in numbers -> patterns that stand for these and no others, and for how many.

    "h.0.fc", "h.1.fc", "h.3.fc" -> [("h.{0-1,3}.fc", 3)]. Two numbers become one pattern only where every
    combination is there.
    """
    split = {tuple(re.split(r"(\d+)", name)): 1 for name in names}
    width = len(next(iter(split)))
    for column in range(width - 2, 0, -2):  # numbers have the odd places
        merged: dict[tuple, dict[str, int]] = {}
        for parts, count in split.items():
            merged.setdefault((parts[:column], count, parts[column + 1 :]), {})[parts[column]] = count
        split = {
            (*before, _spans(found), *after): sum(found.values())
            for (before, _, after), found in merged.items()
        }
    return [("".join(parts), count) for parts, count in split.items()]


def _spans(found: Iterable[str]) -> str:
    """Different numbers in words: "{0-29}", "{0,2-3}"; one alone as it is."""
    numbers = sorted(found, key=lambda number: (int(number), number))
    if len(numbers) == 1:
        return numbers[0]
    spans = []
    for number in numbers:
        is_next = spans and str(int(spans[-1][1]) + 1) == number and str(int(spans[-1][1])) == spans[-1][1]
        if is_next:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "{" + ",".join(low if low == high else f"{low}-{high}" for low, high in spans) + "}"
