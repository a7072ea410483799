"""The course of a run as ``curve.png``, drawn at its end."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state
from matplotlib.ticker import MaxNLocator

from mica.cli.output import one_line, shown, tell, write_file
from mica.cli.plot import STYLE

# Key in the log_history, label, and colours that differ for all common kinds of colour blindness, and in grey
_LOSS = ("loss", "training loss", "#0072B2")
_PERPLEXITIES = (
    ("eval_held_out_perplexity", "held out", "#D55E00"),
    ("eval_retain_perplexity", "to be retained", "#009E73"),
)


def draw(history: list[dict], output: Path) -> None:
    """Write ``output``/curve.png; ``history`` is the Trainer's ``state.log_history``.

    If anything fails, that is a warning on stderr and no error: the training is worth more than its picture.
    """
    try:
        with rc_context(STYLE):
            drawing = figure(history, shown(output.resolve().name))
            write_file("--output", output / "curve.png", lambda path: drawing.savefig(path, format="png"))
    except Exception as error:
        tell(f"mica adapt: warning: no curve: {one_line(error)}")


def figure(history: list[dict], name: str) -> Figure:
    """Training loss above, perplexities below, over the optimiser steps.

    Perplexity is measured before the first step and at the end. Lines have the gid of what they show.
    """
    drawing = Figure(figsize=(7, 6), dpi=150, layout="constrained")
    loss, perplexity = drawing.subplots(2, 1, sharex=True)
    loss.set_ylabel("training loss (nats per token)")
    perplexity.set_ylabel("perplexity")
    perplexity.set_xlabel("optimiser step")
    perplexity.xaxis.set_major_locator(MaxNLocator(integer=True))

    for panel, kinds in ((loss, [_LOSS]), (perplexity, _PERPLEXITIES)):
        for key, label, colour in kinds:
            measured = [(entry["step"], entry[key]) for entry in history if key in entry]
            if measured:
                panel.plot(*zip(*measured, strict=True), label=label, color=colour, marker="o", gid=key)
    perplexity.legend()
    drawing.suptitle(name, parse_math=False)
    return drawing
