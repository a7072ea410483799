"""curve.png of a run, from the Trainer's history."""

from mica.cli.adapt.curve import draw, figure
from mica.cli.record import NAME

HISTORY = [
    {"step": 0, "eval_held_out_loss": 3.0, "eval_held_out_perplexity": 20.0},
    {"step": 10, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": 0.5},
    {"step": 20, "loss": 2.5, "learning_rate": 5e-4, "grad_norm": 0.4},
    {"step": 20, "eval_held_out_loss": 2.7, "eval_held_out_perplexity": 15.0},
]


def test_picture_shows_what_was_measured(tmp_path):
    lines = []
    for axes in figure(HISTORY, "run").axes:
        lines += [(line.get_gid(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert lines == [("loss", [10, 20], [3.0, 2.5]), ("eval_held_out_perplexity", [0, 20], [20.0, 15.0])]
    draw(HISTORY, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"curve.png", NAME}
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_failure_is_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    draw(HISTORY, tmp_path)
    assert capsys.readouterr().err == "mica adapt: warning: no curve: division by zero\n"
    assert not list(tmp_path.iterdir())
