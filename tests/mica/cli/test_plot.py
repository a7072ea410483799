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
        points = [(line.get_gid(), *map(list, line.get_data())) for line in axes.lines if line.get_gid()]
        assert len(points) == 2 * count
        for (_, whole, heights), (_, adapted, lowest) in zip(points[::2], points[1::2], strict=True):
            assert (whole, adapted) == ([*range(16, 0, -1)], [4, 3, 2, 1])
            assert lowest == heights[-4:]
            assert min(heights) > 0
        (shading,) = [patch for patch in axes.patches if patch.get_gid() == "adapted"]
        assert (shading.get_x(), shading.get_width()) == (1, 3)
        assert (axes.get_yscale(), axes.get_xlim()) == ("log", (16, 1))
    title = "tiny: singular values of each layer; shaded: the 4 smallest, which MiCA adapts"
    assert drawn.get_suptitle() == title
