"""The figure of ``mica inspect --plot``."""

import torch

from mica.cli.plot import figure


def test_figure_marks_the_adapted_part():
    names = [f"h.{block}.{kind}" for block in range(3) for kind in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")]
    values = {name: torch.logspace(0, -3, 16, dtype=torch.float64) for name in ["wte", *names]}
    values["wte"][-1] = 0.0
    drawn = figure(values, 4, "tiny")
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["wte", "attn.c_proj", "mlp.c_proj", "c_fc"]
    for axes, count in zip(drawn.axes, (1, 3, 3, 3), strict=True):
        spectra, adapted = axes.lines[::2], axes.lines[1::2]
        assert len(spectra) == len(adapted) == count
        for whole, lowest in zip(spectra, adapted, strict=True):
            assert [*whole.get_xdata()] == [*range(16, 0, -1)]
            assert lowest.get_xydata().tolist() == whole.get_xydata().tolist()[-4:]
            assert min(whole.get_ydata()) > 0
        (shading,) = axes.patches
        assert (shading.get_x(), shading.get_width()) == (1, 3)
        assert (axes.get_yscale(), axes.get_xlim()) == ("log", (16, 1))
    title = "tiny: singular values of each layer; shaded: the 4 smallest, which MiCA adapts"
    assert drawn.get_suptitle() == title
