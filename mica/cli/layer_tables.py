"""The tables that ``mica inspect`` prints: a line for each kind of layer, or for each layer."""

from mica.cli.kinds import Kind
from mica.cli.output import size_text

_NAMED = 3  # layers that a line names at most
_WIDTH = 9  # of a column of singular values


# ---------------------------------------------------------------------------------------------------
# a line for each layer
# ---------------------------------------------------------------------------------------------------


def layers_header(rank: int, width: int) -> str:
    columns = f"{'gap':>7}  {'energy':>8}  {'method':6}  {'proven, excess':15}  {'s':>6}"
    return f"{'layer':{width}}  {'out x in':>18}  {'dtype':8}  {_sigmas(rank)}  {columns}"


def layer_line(row, width: int) -> str:
    """One row of the table, without a line end."""
    start = f"{row.name:{width}}  {_shape(row):>18}  {row.dtype or '-':8}  "
    if row.reason:
        return f"{start}cannot be adapted: {row.reason}"

    values = (row.sigma_max, row.sigma_above, row.sigma_largest, row.sigma_smallest)
    sigmas = "  ".join(f"{number(value, '.4g'):>{_WIDTH}}" for value in values)
    numbers = f"{sigmas}  {number(row.gap, '.4g'):>7}  {_percent(row.energy_share):>8}"
    certificate = "not proven"
    if row.proven:
        certificate = f"proven, {row.energy_excess:.1e}"
    line = f"{start}{numbers}  {row.method:6}  {certificate:15}  {row.seconds:6.2f}"
    if row.quantised:
        line += f"  {row.quantised}, dequantised"
    if row.expert is not None:
        line += f"  of expert {row.expert}"
    return line


# ---------------------------------------------------------------------------------------------------
# a line for each kind
# ---------------------------------------------------------------------------------------------------


def kinds_table(kinds: list[Kind], rank: int) -> str:
    """The medians of each kind, with its worst gap, energy and excess; then which layers are not proven."""
    width = max(len("kind"), *(len(kind.name) for kind in kinds))
    shapes = max(len("out x in"), *(len(_shape(kind.rows[0])) for kind in kinds))
    lines = [_kinds_header(rank, width, shapes)]
    lines += [_kind_line(kind, width, shapes) for kind in kinds]
    unproven = [row for kind in kinds for row in kind.rows if not row.reason and not row.proven]
    if unproven:
        lines.append(f"not proven: {_names(unproven)}")
    return "\n".join(lines)


def _kinds_header(rank: int, width: int, shapes: int) -> str:
    columns = (
        f"{'gap':>7}  {'min gap':>7}  {'energy':>7}  {'max energy':>10}  {'proven':>9}  {'max excess':>10}"
    )
    return f"{'kind':{width}}  {'layers':>6}  {'out x in':>{shapes}}  {'dtype':8}  {_sigmas(rank)}  {columns}"


def _kind_line(kind: Kind, width: int, shapes: int) -> str:
    first = kind.rows[0]
    count = len(kind.rows)
    start = f"{kind.name:{width}}  {count:6}  {_shape(first):>{shapes}}  {first.dtype or '-':8}  "
    if first.reason:
        return f"{start}cannot be adapted: {first.reason} ({_names(kind.rows)})"

    medians = map(kind.median, ("sigma_max", "sigma_above", "sigma_largest", "sigma_smallest"))
    sigmas = "  ".join(f"{number(value, '.4g'):>{_WIDTH}}" for value in medians)
    gaps = f"{number(kind.median('gap'), '.4g'):>7}  {number(kind.smallest('gap'), '.4g'):>7}"
    energy = f"{_percent(kind.median('energy_share')):>7}  {_percent(kind.largest('energy_share')):>10}"
    proven = f"{len(kind.proven)} of {count}"
    excess = max((row.energy_excess for row in kind.proven), default=None)
    line = f"{start}{sigmas}  {gaps}  {energy}  {proven:>9}  {number(excess, '.1e'):>10}"
    if first.quantised:
        line += f"  {first.quantised}, dequantised"
    return line


def _names(rows: list) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(row.name for row in rows[:_NAMED])
    more = len(rows) - _NAMED
    if more > 0:
        text += f" and {more} more"
    return text


# ---------------------------------------------------------------------------------------------------
# cells
# ---------------------------------------------------------------------------------------------------


def number(value: float | None, spec: str) -> str:
    """``value``, or a dash for None."""
    if value is None:
        return "-"
    return format(value, spec)


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.2g}%"


def _shape(row) -> str:
    if not row.shape:
        return "-"
    return size_text(row.shape)


def _sigmas(rank: int) -> str:
    return "  ".join(f"{f'sigma_{which}':>{_WIDTH}}" for which in ("max", rank + 1, rank, 1))
