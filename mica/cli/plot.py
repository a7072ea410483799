"""The picture of ``mica inspect --plot``: whole spectra, with the part marked that MiCA adapts."""

import math
import textwrap

import torch
from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from mica.cli.kinds import by_kind

_MARK = "#D55E00"  # vermilion: distinct from all of viridis for all common kinds of colour blindness
STYLE = {  # of all pictures
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), "#333333"),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), "#D9D9D9"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **{"font.size": 9, "axes.titlesize": 10, "figure.titlesize": 12, "axes.titlelocation": "left"},
    **{"xtick.labelsize": 8, "ytick.labelsize": 8, "grid.linewidth": 0.5},
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "ytick.minor.size"), 0),
}
_DEPTHS = ListedColormap(colormaps["viridis"].resampled(256)(torch.linspace(0, 0.9, 256).numpy()))


def _depth(name: str) -> int | None:
    """The first number in a module's name: its block."""
    for part in name.split("."):
        if part.isdigit():
            return int(part)
    return None


def _plot_spectrum(axes, values: torch.Tensor, rank: int, colour) -> None:
    """One line for all singular values, (n,) descending, and a thicker one for the adapted ones."""
    floor = torch.finfo(torch.float64).eps * values[0]
    if floor > 0:
        heights = values.clamp_min(floor)
    else:  # no logarithm
        heights = torch.full_like(values, torch.nan)
    indices = torch.arange(len(values), 0, -1)
    axes.plot(indices, heights, color=colour, linewidth=0.6, alpha=0.8, gid="spectrum")
    axes.plot(indices[-rank:], heights[-rank:], color=colour, linewidth=1.5, alpha=0.9, gid="adapted")


@rc_context(STYLE)
def figure(spectra: dict[str, torch.Tensor], rank: int, model: str) -> Figure:
    """One panel per kind of layer (see `by_kind`), one line per layer, coloured by the number of its block.

    ``spectra``: module name -> all its singular values, (min(out, in),), descending. They are drawn over
    their index counted from the smallest, 1, on a logarithmic axis that runs to it from the left: MiCA's
    ``rank`` values of a few thousand would be a hair's breadth on a linear one. That part is shaded
    and its lines are thicker. Values below ε₆₄ times the largest are drawn there: they are rounding noise.

    Axes of panels are labelled "panel", lines have the gid "spectrum" or "adapted", the shading "adapted".
    """
    kinds = by_kind(list(spectra))
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    drawing = Figure(figsize=(1.6 + 2.9 * columns, 1.5 + 2.5 * rows), dpi=150, layout="constrained")
    grid = drawing.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    depths = [_depth(name) for name in spectra if _depth(name) is not None]
    scale = Normalize(0, max([1, *depths]))

    for axes, (kind, names) in zip(grid, kinds.items(), strict=False):
        axes.set(label="panel", title=kind, xscale="log", yscale="log")
        axes.axvspan(1, rank, color=_MARK, alpha=0.15, linewidth=0, gid="adapted")
        axes.axvline(rank, color=_MARK, linewidth=0.8)
        for name in names:
            depth = _depth(name)
            shade = 0.4
            if depth is not None:
                shade = scale(depth)
            colour = _DEPTHS(shade)
            _plot_spectrum(axes, spectra[name], rank, colour)
        longest = max(len(spectra[name]) for name in names)
        axes.set_xlim(max(longest, 2), 1)
        axes.set_xticks([longest, *(10**power for power in range(5) if 10**power < longest / 2)])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda index, _: f"{index:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    for axes in grid[len(kinds) :]:
        axes.set_axis_off()
    for axes in grid[::columns]:
        axes.set_ylabel("singular value")
    for axes in grid[len(kinds) - columns : len(kinds)]:  # the lowest panel of each column
        axes.set_xlabel("index, from the smallest (log)")

    title = f"{model}: singular values of the layers that MiCA adapts, r = {rank}"
    drawing.suptitle(textwrap.fill(title, 16 + 24 * columns))
    one = Line2D([], [], color=_DEPTHS(0.4), linewidth=0.8, label="one layer")
    adapted = Patch(facecolor=_MARK, alpha=0.15, edgecolor="none", label=f"adapted: the {rank} smallest")
    drawing.legend(handles=[one, adapted], loc="outside lower center", ncols=2)
    if depths:
        ticks = MaxNLocator(integer=True)
        colours = ScalarMappable(scale, _DEPTHS)
        bar = drawing.colorbar(colours, ax=grid, aspect=40, fraction=0.03, pad=0.01, ticks=ticks)
        bar.set_label("block, first to last")
        bar.outline.set_visible(False)
    return drawing
