"""Kinds of layers, which share a line of `mica inspect`."""

import pytest

from mica.cli.kinds import Kind, by_kind, grouped, kinds_table
from mica.cli.spectra import Row
from tests.support.tables import rows


@pytest.mark.parametrize(
    ("names", "kinds"),
    rows("""
layers.0.q_proj layers.1.q_proj => q_proj q_proj
h.0.attn.c_proj h.0.mlp.c_proj => attn.c_proj mlp.c_proj
mlp.experts.0.w1 mlp.experts.1.w1 mlp.gate => w1 w1 gate
embed => embed
"""),
)
def test_a_kind_is_the_end_of_a_name_without_numbers(names, kinds):
    found = by_kind(names.split())
    assert [kind for name in names.split() for kind in found if name in found[kind]] == kinds.split()


def row(name, shape=(8, 4), dtype="float32", **facts):
    return Row(name, "Linear", shape, dtype, **facts)


@pytest.mark.parametrize(
    "different", [{"shape": (8, 6)}, {"dtype": "bfloat16"}, {"quantised": "int8"}, {"reason": "NaN"}]
)
def test_layers_that_differ_are_apart(different):
    first, second, third = row("h.0.q"), row("h.1.q", **different), row("h.2.q")
    assert grouped([first, second, third]) == [Kind("q", [first, third]), Kind("q", [second])]


def test_what_was_dequantised_is_said():
    table = kinds_table(grouped([row("a"), row("b", quantised="bitsandbytes 4-bit")]), rank=1)
    assert " bitsandbytes 4-bit, dequantised " in table.splitlines()[2]


def test_numbers_that_are_not_there_do_not_count():
    assert Kind("q", [row("a", gap=1.0), row("b"), row("c", gap=8.0)]).values("gap") == [1, 8]
