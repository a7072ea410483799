"""The lines of `mica inspect` that no small model has: stacks, many layers not proven."""

import pytest

from mica.cli.kinds import grouped
from mica.cli.layer_tables import kinds_table, layer_line
from mica.cli.spectra import Row

MEASURED = {
    "sigma_max": 9.0,
    "sigma_above": 2.0,
    "sigma_largest": 1.0,
    "sigma_smallest": 0.5,
    "gap": 2.0,
    "energy_share": 0.01,
    "method": "gram",
    "proven": True,
    "energy_excess": 1e-9,
}


def row(name, shape=(8, 4), **facts):
    return Row(name, "Linear", 0.1, shape, "float32", **MEASURED | facts)


@pytest.mark.parametrize(
    ("count", "said"), [(1, "h.0.q"), (3, "h.0.q, h.1.q, h.2.q"), (5, "h.0.q, h.1.q, h.2.q and 2 more")]
)
def test_layers_that_are_not_proven_are_named(count, said):
    unproven = [row(f"h.{index}.q", proven=False, energy_excess=None) for index in range(count)]
    kinds = grouped([*unproven, row("h.9.q")])
    assert kinds_table(kinds, 4).splitlines()[1 + len(kinds) :] == [f"not proven: {said}"]


def test_columns_are_as_wide_as_the_longest_shape():
    table = kinds_table(grouped([row("h.0.q"), row("h.0.down_proj", (256, 4096, 14336))]), 4)
    lines = table.splitlines()[:3]
    assert len({len(line) for line in lines}) == 1
    assert " 256 x 4096 x 14336  " in lines[2]


def test_a_layer_says_that_it_is_dequantised_and_which_expert_it_shows():
    assert layer_line(row("h.0.q"), 5).endswith("0.10")
    assert layer_line(row("h.0.q", quantised="int8"), 5).endswith("  int8, dequantised")
    assert layer_line(row("h.0.q", expert=7), 5).endswith("  of expert 7")
