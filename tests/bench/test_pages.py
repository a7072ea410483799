"""The tables of the pages: their columns, and that rows that show no difference are marked."""

import pytest

from bench import pages
from bench.results.cell import Group, Timing
from bench.results.names import BARE, FAST, FAST_NORMS, STOCK, STOCK_16, STOCK_UNCAST
from bench.results.schema import Result


def step(*seconds):
    """A cell in which stock PEFT takes 1 s in every round."""
    stock = Timing([1.0] * len(seconds))
    return Group("", {"tokens": 8}, {BARE: stock, STOCK: stock, FAST: Timing([*seconds])})


@pytest.mark.parametrize(
    ("seconds", "is_marked"),
    [
        ([0.5, 0.51, 0.52], False),
        ([0.8, 1.0, 1.2], True),
        ([0.5], True),  # one round has no interval
    ],
)
def test_a_speedup_whose_interval_contains_one_is_marked_and_explained(seconds, is_marked):
    row = pages._throughput_row("step", step(*seconds))
    assert [cell.endswith(f") {pages.MARK}") for cell in row[-2:]] == [is_marked] * 2
    assert pages.with_footnote([row]) == [row, pages.FOOTNOTE][: 1 + is_marked]


@pytest.mark.parametrize("best", [STOCK_16, STOCK_UNCAST, STOCK])
def test_stock_peft_stands_in_its_best_setting_too(best):
    """Where that is the default, twice."""
    seconds = {BARE: 1.0, STOCK: 4.0, best: 2.0, FAST: 1.0}
    group = Group("", {"tokens": 8}, {name: Timing([value] * 6) for name, value in seconds.items()})
    _, *rates, over_default, over_best = pages._throughput_row("step", group)
    default = "4" if best == STOCK else "2"
    assert rates == [f"{value} tokens/s" for value in ("8", default, "4", "8")]
    assert over_best == "2.00× (2.00–2.00)"
    assert (over_default == over_best) == (best == STOCK)


def run(monkeypatch, suite, facts, **axes):
    """A run with one cell: implementation -> (seconds, megabytes kept)."""
    timings = {name: Timing([seconds], {"saved_mb": kept}) for name, (seconds, kept) in facts.items()}
    group = Group("", {"suite": suite, **axes}, timings)
    monkeypatch.setattr(pages, "result", lambda name: Result({}, [group]))


def test_what_is_kept_beside_the_bare_model(monkeypatch):
    megabytes = {BARE: 100.0, STOCK: 219.0, STOCK_16: 133.0, FAST: 97.0, FAST_NORMS: 71.0}
    facts = {name: (1.0, kept) for name, kept in megabytes.items()}
    run(monkeypatch, "kept", facts, model="a model", adapter="LoRA", dtype="bfloat16")
    expected = ["100.0 MB", "219.0 MB, 2.190", "133.0 MB, 1.330", "97.0 MB, 0.970", "71.0 MB, 0.710"]
    assert pages.kept("")[1] == ["a model, LoRA, bf16", *expected]


def test_peers_are_rows(monkeypatch):
    facts = {BARE: (1.0, 4.0), STOCK: (2.0, 9.0), "A peer 1.0": (1.5, 5.0)}
    run(monkeypatch, "peers", facts, model="layer", dtype="float32", out=8, **{"in": 4})
    rows = [["", "layer, 4 × 8, fp32"], [BARE, "1.00, 4.00 MB"], [STOCK, "2.00, 9.00 MB"]]
    assert pages.peers("") == [*rows, ["A peer 1.0", "1.50, 5.00 MB"]]
