"""What suites check before they time anything: tiny cells, in this process."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench.results.names import BARE, FAST, STOCK, STOCK_16, SVD
from bench.suites import bench_adapter, bench_step, bench_subspace, check_profile, harness
from mica.ops.operator import run_formula
from tests.support import models


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(harness, "refusals", {})
    monkeypatch.setattr(bench_step, "LEARNING_RATE", 3e-2)
    yield
    bench_step.setting.cache_clear()
    bench_subspace.setting.cache_clear()


STEP = bench_step.Cell("toy", (1, 8), "float32", layers=1, vocabulary=64)
STEP_16 = STEP._replace(dtype="bfloat16", checkpointing=1)


@pytest.mark.parametrize("cell", [STEP, STEP_16])
def test_every_implementation_of_a_step_is_built_and_trains(cell):
    steps = bench_step.setting(cell)
    assert (
        list(steps)
        == list(cell.implementations)
        == [BARE, STOCK, *([STOCK_16] if cell == STEP_16 else []), FAST]
    )
    assert not harness.refusals
    assert bench_step.memory(steps[BARE])["optimizer_mb"] == 0
    facts = bench_step.memory(steps[FAST])
    # exp_avg and exp_avg_sq of A, and a count of steps for each layer
    assert facts["optimizer_mb"] == pytest.approx(2 * facts["trained_mb"] + 7 * 4e-6)


def scaled(factor, part):
    def wrong(name, *args):
        result = run_formula(name, *args)
        return result * factor if name == part else result

    return wrong


def test_our_wrong_operator_is_refused_alone(monkeypatch):
    monkeypatch.setattr("mica.ops.linear.run_formula", scaled(1.1, "linear"))
    assert bench_step.setting(STEP).keys() == {BARE, STOCK}
    assert harness.refusals.keys() == {(STEP.name, FAST)}


def test_losses_that_diverge_later_are_refused(monkeypatch):
    checked = bench_step.checked

    def with_another_rate(step, *args):
        step.optimizer.param_groups[0]["lr"] *= 2
        return checked(step, *args)

    monkeypatch.setattr(bench_step, "checked", with_another_rate)
    assert bench_step.setting(STEP).keys() == {BARE, STOCK}
    assert "a loss is" in harness.refusals[STEP.name, FAST]


def test_steps_that_change_nothing_can_show_nothing(monkeypatch):
    monkeypatch.setattr(bench_step, "LEARNING_RATE", 1e-9)
    with pytest.raises(AssertionError, match="the steps make no difference"):
        bench_step.setting(STEP)


CELL = bench_subspace.Cell(64, 48, 1, ("auto, r = 16", "gram, r = 16"))


@pytest.mark.parametrize("cell", [CELL, CELL._replace(methods=("auto, r = 16",), weights=3)])
def test_all_weights_of_a_cell_are_solved(cell):
    calls, count = bench_subspace.setting(cell)
    assert list(calls) == cell.implementations
    assert 1 <= count <= 100
    results, vectors = calls["minor_subspace, auto, r = 16"](), calls[SVD]()
    assert len(results) == len(vectors) == cell.weights
    assert {result.basis.shape for result in results} == {(64, 16)}
    assert {u.shape for u in vectors} == {(64, 48)}


def test_a_method_without_a_certificate_is_refused_alone(monkeypatch):
    solved = bench_subspace.solved

    def uncertified(weights, method, rank):
        results = solved(weights, method, rank)
        return [SimpleNamespace(certified=False)] if method == "gram" else results

    monkeypatch.setattr(bench_subspace, "solved", uncertified)
    calls, _ = bench_subspace.setting(CELL)
    assert list(calls) == [SVD, "minor_subspace, auto, r = 16"]
    assert harness.refusals == {(CELL.name, "minor_subspace, gram, r = 16"): "not certified"}


def layer_with(vectors):
    """A model of one adapted layer that starts from these left singular vectors of its weight."""
    torch.manual_seed(0)
    model = models.wrap(nn.Sequential(nn.Linear(24, 32, bias=False)), rank=16, targets=["0"])
    (layer,) = models.adapted_layers(model).values()
    u = torch.linalg.svd(layer.get_base_layer().weight.detach(), full_matrices=False).U
    layer.lora_B["default"].weight.data = vectors(u)
    return model


def test_a_start_from_another_subspace_has_more_energy():
    minor = bench_adapter.energy(layer_with(lambda u: u[:, -16:]))
    assert bench_adapter.energy(layer_with(lambda u: u[:, -17:-1])) > 1.01 * minor
    with pytest.raises(AssertionError, match="BᵀB is off by"):
        bench_adapter.energy(layer_with(lambda u: 1.01 * u[:, -16:]))


def test_the_longest_kernels_come_first():
    events = [
        SimpleNamespace(key=f"kernel {i}", count=i, self_device_time_total=float(i), self_cpu_time_total=0.0)
        for i in range(40)
    ]
    lines = check_profile.table(events, device=True).splitlines()
    assert len(lines) == 1 + check_profile.ROWS
    assert lines[1].split() == ["39.0", "39", "kernel", "39"]
    assert len(check_profile.table(events, device=False).splitlines()) == 1
