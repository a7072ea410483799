"""Kinds of layers, and the numbers of a whole kind."""

from types import SimpleNamespace

import pytest

from mica.cli.kinds import Kind, by_kind, grouped


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["layers.0.q_proj", "layers.1.q_proj"], {"q_proj": [0, 1]}),
        (["h.0.attn.c_proj", "h.0.mlp.c_proj"], {"attn.c_proj": [0], "mlp.c_proj": [1]}),
        (["mlp.experts.0.w1", "mlp.experts.1.w1", "mlp.gate"], {"w1": [0, 1], "gate": [2]}),
        (["embed"], {"embed": [0]}),
    ],
)
def test_a_kind_is_the_end_of_a_name_without_numbers(names, kinds):
    assert by_kind(names) == {kind: [names[index] for index in indices] for kind, indices in kinds.items()}


def row(name, **facts):
    usual = {"shape": (8, 4), "dtype": "float32", "quantised": None, "reason": None, "gap": 1.0}
    return SimpleNamespace(name=name, **usual | facts)


def rows(**facts):
    """Two layers of a kind; ``facts`` are of the second."""
    return row("h.0.q"), row("h.1.q", **facts)


def test_layers_of_a_kind_are_one_group():
    first, second = rows()
    assert grouped([first, second]) == [Kind("q", [first, second])]


@pytest.mark.parametrize(
    "different", [{"shape": (8, 6)}, {"dtype": "bfloat16"}, {"quantised": "int8"}, {"reason": "NaN"}]
)
def test_what_differs_is_a_group_of_its_own(different):
    first, second = rows(**different)
    assert grouped([first, second]) == [Kind("q", [first]), Kind("q", [second])]


def test_numbers_that_are_not_there_do_not_count():
    kind = Kind("q", [row("a", gap=1.0), row("b", gap=None), row("c", gap=8.0), row("d", gap=2.0)])
    assert (kind.smallest("gap"), kind.median("gap"), kind.largest("gap")) == (1, 2, 8)
    kind = Kind("q", [row("a", gap=None)])
    assert (kind.smallest("gap"), kind.median("gap"), kind.largest("gap")) == (None, None, None)
