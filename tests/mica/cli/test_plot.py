"""The figure of ``mica inspect --plot``."""

import torch

from mica.cli.plot import figure


def test_figure_marks_the_adapted_part():
    names = [f"h.{block}.{kind}" for block in range(3) for kind in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")]
    values = {name: torch.logspace(0, -3, 16, dtype=torch.float64) for name in ["wte", *names]}
    values["wte"][-1] = 0.0
    drawn = figure(values, 4, "tiny")
    panels = [axes for axes in drawn.axes if axes.get_label() == "panel"]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == ["wte", "attn.c_proj", "mlp.c_proj", "c_fc"]
    for axes, count in zip(panels, (1, 3, 3, 3), strict=True):
        whole, adapted = (
            [line for line in axes.lines if line.get_gid() == gid] for gid in ("spectrum", "adapted")
        )
        assert (len(whole), len(adapted)) == (count, count)
        for line, part in zip(whole, adapted, strict=True):
            assert list(line.get_xdata()) == [*range(16, 0, -1)]
            assert list(part.get_xdata()) == [4, 3, 2, 1]
            assert list(part.get_ydata()) == list(line.get_ydata())[-4:]
            assert part.get_linewidth() > line.get_linewidth()
            assert min(line.get_ydata()) > 0
        (shading,) = [patch for patch in axes.patches if patch.get_gid() == "adapted"]
        assert (shading.get_x(), shading.get_width()) == (1, 3)
        assert axes.get_yscale() == "log"
        assert axes.get_xlim() == (16, 1)
    assert "tiny" in drawn.get_suptitle()
    texts = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert texts == ["adapted: the 4 smallest", "one layer"]
