"""What ``mica inspect`` measures in a layer, and which layers it takes, against PEFT and the fp64 SVD."""

from dataclasses import fields

import pytest
import torch
from torch import nn

from mica.cli import spectra
from mica.subspace import MinorSubspace
from tests.support import models, quantised_models

MEASURED = [field.name for field in fields(spectra.Row) if field.default is None]


# Layers that cannot be adapted


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Packed(nn.Parameter):
    """A tensor subclass, as quantised weights are."""


def quantised():
    layer = nn.Linear(8, 8)
    layer.weight = Packed(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (linear(torch.eye(8).fill_(torch.nan)), (8, 8), "must be finite, but got 64 NaN or infinite"),
        (linear(torch.ones(8, 9, dtype=torch.int8)), (8, 9), "the weight has dtype int8"),
        (linear(torch.ones(8, 3)), (8, 3), "rank 4 > min(out, in) = 3"),
        (nn.Embedding(3, 8), (8, 3), "rank 4 > min(out, in) = 3"),
        (linear(torch.ones(8, 8, device="meta")), (8, 8), "not loaded"),
        (quantised(), (8, 8), "a Packed, not a plain tensor"),
        (nn.Conv2d(8, 8, 1), None, "a layer of type Conv2d"),
        (nn.Identity(), None, "a layer of type Identity"),
    ],
)
def test_unsuitable_layer_gives_a_reason(layer, shape, reason):
    row, values = spectra.measure("layer", layer, 4)
    assert reason in row.reason
    assert row.shape == shape
    assert values is None
    assert all(getattr(row, name) is None for name in MEASURED)


# Quantised layers: what the backend can adapt, by what it starts from


@pytest.mark.parametrize("kind", quantised_models.KINDS)
def test_quantised_layers_are_those_of_the_backend(kind, monkeypatch):
    if "stub" in kind:
        quantised_models.stub_gptqmodel(monkeypatch)
    model = quantised_models.llama(kind)
    layer = model.model.layers[0].mlp.up_proj
    trained = [(name, parameter.requires_grad) for name, parameter in layer.named_parameters()]
    row, values = spectra.measure("layer", layer, 4)
    assert (row.reason, row.shape, row.kind) == (None, (48, 32), type(layer).__name__)
    assert row.quantised
    assert row.dtype in ("float32", "bfloat16", "float16")
    expected = torch.linalg.svdvals(quantised_models.dequantised(layer))
    torch.testing.assert_close(values, expected[-4:], rtol=2e-2, atol=0)
    assert row.sigma_max == pytest.approx(expected[0].item(), rel=1e-2)
    torch.testing.assert_close(spectra.spectrum(spectra.weight_of(layer, 4))[-4:], values, rtol=1e-5, atol=0)
    assert [(name, parameter.requires_grad) for name, parameter in layer.named_parameters()] == trained
    assert type(model.model.layers[0].mlp.up_proj) is type(layer)
    adapted = quantised_models.adapted(kind)
    assert type(adapted.base_model.model.model.layers[0].mlp.up_proj.base_layer) is type(layer)
    assert spectra.measure("layer", layer, 33)[0].reason == "rank 33 > min(out, in) = 32"


def test_a_quantised_layer_that_the_backend_refuses():
    """A weight that was never moved to its device, and so is not packed yet."""
    bnb = pytest.importorskip("bitsandbytes")
    row, values = spectra.measure("layer", bnb.nn.Linear4bit(8, 8), 4)
    assert "bitsandbytes 4-bit) is not quantised yet" in row.reason
    assert (row.quantised, values) == ("bitsandbytes 4-bit", None)


# Numbers


@pytest.mark.parametrize("shape", [(64, 64), (40, 7), (7, 40), (1, 9), (9, 1)])
@pytest.mark.parametrize("block", [16, 1 << 22])
def test_largest_singular_value(shape, block, monkeypatch):
    monkeypatch.setattr(spectra, "CONVERTED_ELEMENTS", block)
    for weight in (torch.randn(shape), torch.ones(shape), torch.zeros(shape), torch.randn(shape).bfloat16()):
        expected = torch.linalg.svdvals(weight.double())[0].item()
        assert spectra.largest_singular_value(weight) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def graded(out_features, in_features, smallest):
    count = min(out_features, in_features)
    left = torch.linalg.qr(torch.randn(out_features, count, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(in_features, count, dtype=torch.float64)).Q
    return left * torch.logspace(0, smallest, count, dtype=torch.float64) @ right.T


@pytest.mark.parametrize("shape", [(20, 24), (24, 20), (100, 20), (20, 100)])  # the last two: streamed QR
def test_spectrum(shape, monkeypatch):
    weight = graded(*shape, -12)
    expected = torch.linalg.svdvals(weight)
    torch.testing.assert_close(spectra.spectrum(weight), expected, rtol=1e-9, atol=1e-15)
    monkeypatch.setattr(spectra, "LARGEST_SVD", 19)
    monkeypatch.setattr(spectra, "CONVERTED_ELEMENTS", 64)
    by_gram = spectra.spectrum(weight)  # clipped where a Gram matrix shows nothing
    floor = 2 * (20**0.5 * torch.finfo(torch.float64).eps) ** 0.5
    torch.testing.assert_close(by_gram, expected.clamp_min(floor), rtol=0.3, atol=0)
    torch.testing.assert_close(by_gram[:6], expected[:6], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "shape"), [("embed", (12, 29)), ("up", (20, 12)), ("conv", (16, 20))])
def test_the_solver_sees_the_effective_weight(name, shape, monkeypatch):
    """The singular values do not tell W from its transpose; certificate and method may."""
    seen, solver = [], spectra.minor_subspace

    def spying(weight, rank):
        seen.append(tuple(weight.shape))
        return solver(weight, rank)

    monkeypatch.setattr(spectra, "minor_subspace", spying)
    row, _ = spectra.measure(name, models.Net().get_submodule(name), 4)
    assert seen == [row.shape] == [shape]


@pytest.mark.parametrize(
    ("values", "excess", "ranks", "reported"),
    [([2.0, 1.0, 1.0], 1e-9, [3], 3e-9), ([1e3, 1.0, 1.0], 1e-9, [3, 2], 7e-9)],
)
def test_the_bound_is_for_the_chosen_rank(values, excess, ranks, reported, monkeypatch):
    """An excess of the three vectors may be one of the chosen two: more of their smaller energy."""
    asked = []

    def solver(weight, rank):
        asked.append(rank)
        found = torch.tensor(values[-rank:], dtype=torch.float64)
        return MinorSubspace(
            basis=torch.eye(6, dtype=torch.float64)[:, -rank:],
            singular_values=found,
            method="gram",
            certified=True,
            energy_excess=excess if rank == 3 else 7e-9,
            resolution=1e-14,
        )

    monkeypatch.setattr(spectra, "minor_subspace", solver)
    row, _ = spectra.measure("layer", linear(torch.randn(6, 6)), 2)
    assert asked == ranks
    assert row.proven
    assert row.energy_excess == pytest.approx(reported)


def test_null_singular_values_are_shown_and_not_warned_about(recwarn):
    row, values = spectra.measure("layer", linear(torch.ones(9, 8)), 4)
    assert (row.sigma_largest, row.sigma_max) == (pytest.approx(0, abs=1e-6), pytest.approx(72**0.5))
    assert len(values) == 4
    assert spectra.measure("layer", linear(torch.zeros(9, 8)), 4)[0].energy_share is None
    assert not [warning for warning in recwarn if "null" in str(warning.message)]
