"""curve.png of a run, from the Trainer's history."""

import pytest

from mica.cli.adapt.curve import draw, figure

HISTORY = [
    {"step": 0, "eval_held_out_loss": 3.0, "eval_held_out_perplexity": 20.0, "eval_retain_perplexity": 8.0},
    {"step": 10, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": 0.5, "num_input_tokens_seen": 1000},
    {"step": 20, "loss": 2.5, "learning_rate": 5e-4, "grad_norm": 0.4, "num_input_tokens_seen": 2000},
    {"step": 20, "eval_held_out_loss": 2.7, "eval_held_out_perplexity": 15.0, "eval_retain_perplexity": 8.5},
    {"step": 20, "train_runtime": 3.0, "train_loss": 2.7, "total_flos": 1.0},
]


def lines_of(axes) -> dict:
    return {line.get_gid(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_it_is_a_picture(tmp_path):
    draw(HISTORY, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_picture_shows_what_was_measured():
    loss, perplexity = figure(HISTORY, "run").axes
    assert lines_of(loss) == {"loss": ([10, 20], [3.0, 2.5])}
    held_out = ([0, 20], [20.0, 15.0])
    retained = ([0, 20], [8.0, 8.5])
    assert lines_of(perplexity) == {
        "eval_held_out_perplexity": held_out,
        "eval_retain_perplexity": retained,
    }
    (tokens,) = loss.child_axes
    loss.figure.draw_without_rendering()
    assert tokens.get_xlim() == pytest.approx([100 * step for step in loss.get_xlim()])
    (axes,) = figure(HISTORY[1:3], "run").axes
    assert list(lines_of(axes)) == ["loss"]
    (_, perplexity) = figure(HISTORY[:1], "run").axes  # evaluated before the first step
    assert lines_of(perplexity)["eval_retain_perplexity"] == ([0], [8.0])


def test_a_failure_is_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    draw(HISTORY, tmp_path)
    assert capsys.readouterr().err == "mica adapt: warning: no curve: division by zero\n"
    assert not list(tmp_path.iterdir())
