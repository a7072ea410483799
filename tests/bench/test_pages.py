"""The tables of the pages: their columns, and that rows that show no difference are marked."""

from bench import pages
from bench.results.cell import Group, Timing
from bench.results.names import BARE, FAST, FAST_ACTIVATIONS, STOCK, STOCK_16
from bench.results.schema import Result


def run(monkeypatch, suite, facts, **axes):
    """A run with one cell: implementation -> (seconds, megabytes kept)."""
    timings = {name: Timing([seconds], {"saved_mb": kept}) for name, (seconds, kept) in facts.items()}
    group = Group("", {"suite": suite, **axes}, timings)
    monkeypatch.setattr(pages, "result", lambda name: Result({}, [group]))


def test_what_is_kept_beside_the_bare_model(monkeypatch):
    megabytes = {BARE: 100.0, STOCK: 219.0, STOCK_16: 133.0, FAST: 71.0, FAST_ACTIVATIONS: 97.0}
    facts = {name: (1.0, kept) for name, kept in megabytes.items()}
    run(monkeypatch, "kept", facts, model="a model", adapter="LoRA", dtype="bfloat16")
    expected = ["100.0 MB", "219.0 MB, 2.190", "133.0 MB, 1.330", "71.0 MB, 0.710", "97.0 MB, 0.970"]
    assert pages.kept("")[1] == ["a model, LoRA, bf16", *expected]


def test_peers_are_rows(monkeypatch):
    facts = {BARE: (1.0, 4.0), STOCK: (2.0, 9.0), "A peer 1.0": (1.5, 5.0)}
    run(monkeypatch, "peers", facts, model="layer", adapter="DoRA", dtype="float32", out=8, **{"in": 4})
    rows = [["", "DoRA, layer, 4 × 8, fp32"], [BARE, "1.00, 4.00 MB"], [STOCK, "2.00, 9.00 MB"]]
    assert pages.peers("") == [*rows, ["A peer 1.0", "1.50, 5.00 MB"]]
