"""`bench.quality.energy` on a tiny Llama."""

import pytest

from bench.quality import energy
from bench.quality.recipes import Method


def test_energy_of_updates(base, texts, monkeypatch):
    monkeypatch.setattr(energy, "RANKS", (2, 4))
    monkeypatch.setattr(energy, "TRAINED", {"MiCA": Method("MiCA", "mica", "all-linear", (1e-3,), 4)})
    result = energy.experiment(base, texts, 1)
    layers = result["layers"]
    assert layers.keys() == result["evaluations"].keys() == {energy.GRADIENT, "MiCA"}
    assert len(layers["MiCA"]) == 7 * base.config.num_hidden_layers
    for name, of_mica in layers["MiCA"].items():
        assert of_mica["smallest"][4] == pytest.approx(1, abs=1e-5)  # what MiCA changes lies there
        assert of_mica["largest"][4] == pytest.approx(0, abs=1e-5)
        of_gradient = layers[energy.GRADIENT][name]
        assert 0 < of_gradient["smallest"][2] < of_gradient["smallest"][4]
