"""Which cells of a run on a GPU the targets are taken from."""

from bench.report.targets import LAYER, SPEEDUPS, targets
from bench.results.cell import Group, Timing
from bench.results.names import ATEN, BOTH, COMPILED, DEVICE_TIME, FAST, STOCK
from bench.results.schema import Result


def cell(seconds, **axes):
    axes = {**LAYER, "pass": BOTH, "clock": DEVICE_TIME, **axes}
    return Group("a layer", axes, {name: Timing([value] * 6) for name, value in seconds.items()})


def test_a_compiled_layer_has_a_cell_of_its_own_and_one_with_dropout_does_not_count():
    cells = [
        cell({FAST: 9.0, ATEN: 90.0}, dropout=0.05),
        cell({FAST: 1.0, STOCK: 2.0, ATEN: 1.5}),
        cell({FAST: 2.0, STOCK: 5.0, COMPILED: 3.0}, compiler="torch.compile"),
    ]
    rows = targets(Result({}, cells))
    measured = dict(zip(rows["what"], rows["measured"], strict=True))
    found = {name: measured[f"a layer, {BOTH}: {name} ÷ {FAST}"].partition(" ")[0] for name in SPEEDUPS}
    assert (found[STOCK], found[ATEN], found[COMPILED]) == ("2.000", "1.500", "1.500")
