"""The picture of ``mica inspect --plot``: whole spectra, with the part marked that MiCA adapts."""

import math
import textwrap

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state

from mica.cli.kinds import by_kind

_LINE, _MARK = "#0072B2", "#D55E00"  # distinct for all common kinds of colour blindness
STYLE = {  # of all pictures
    "font.size": 9,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#D9D9D9",
    "legend.frameon": False,
}


@rc_context(STYLE)
def figure(spectra: dict[str, torch.Tensor], rank: int, model: str) -> Figure:
    """One panel per kind of layer (see `by_kind`), one line per layer.

    ``spectra``: module name -> all its singular values, (min(out, in),), descending. They are drawn over
    their index counted from the smallest, 1, on a logarithmic axis that runs to it from the left: MiCA's
    ``rank`` values of a few thousand would be a hair's breadth on a linear one. That part is shaded
    and its lines are thicker. Values below ε₆₄ times the largest are drawn there: they are rounding noise.
    """
    kinds = by_kind(list(spectra))
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    drawing = Figure(figsize=(2.5 + 2.9 * columns, 1.5 + 2.5 * rows), dpi=150, layout="constrained")
    grid = drawing.subplots(rows, columns, sharey=True, squeeze=False).flatten()

    look = {"color": _LINE, "alpha": 0.6}
    for axes, (kind, names) in zip(grid, kinds.items(), strict=False):
        axes.set(title=kind, xscale="log", yscale="log")
        axes.axvspan(1, rank, color=_MARK, alpha=0.15, linewidth=0)
        for name in names:
            heights = spectra[name].clamp_min(torch.finfo(torch.float64).eps * spectra[name][0])
            indices = torch.arange(len(heights), 0, -1)
            axes.plot(indices, heights, linewidth=0.6, **look)
            axes.plot(indices[-rank:], heights[-rank:], linewidth=1.5, **look)
        axes.set_xlim(max(2, *(len(spectra[name]) for name in names)), 1)
    for axes in grid[len(kinds) :]:
        axes.set_axis_off()
    drawing.supxlabel("index, from the smallest (log)", fontsize=9)
    drawing.supylabel("singular value", fontsize=9)
    title = f"{model}: singular values of each layer; shaded: the {rank} smallest, which MiCA adapts"
    drawing.suptitle(textwrap.fill(title, 16 + 24 * columns))
    return drawing
