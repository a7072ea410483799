"""What suites check before they time anything, and after: tiny cells, in this process."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mica.fast
from bench.results import journal
from bench.results.names import (
    BARE,
    DORA,
    EIGH,
    FAST,
    FAST_ACTIVATIONS,
    PLAIN_LORA,
    STOCK,
    STOCK_16,
    STOCK_UNCAST,
    SVD,
)
from bench.suites import (
    bench_adapter,
    bench_fresh,
    bench_host,
    bench_kept,
    bench_layer,
    bench_peers,
    bench_step,
    bench_subspace,
    harness,
)
from bench.suites.layer import Form, adapted_module, make_layer
from bench.suites.peers import Peer, factors
from bench.suites.steps import Step, checked, operators
from tests.support import models


@pytest.fixture(autouse=True)
def written(monkeypatch, tmp_path):
    """The journal's entries so far."""
    monkeypatch.setenv(journal.VARIABLE, str(tmp_path / "run.jsonl"))
    monkeypatch.setattr(harness, "refusals", {})
    monkeypatch.setattr(bench_step, "LEARNING_RATE", 3e-2)
    yield journal.read
    for suite in (bench_kept, bench_peers, bench_step, bench_subspace):
        suite.setting.cache_clear()


@pytest.fixture
def lora():
    """Plain LoRA on mica.fast, as in all suites."""
    mica.fast.enable(lora=True)
    yield
    mica.fast.enable(lora=False)


# ---------------------------------------------------------------------------------------------------
# harness
# ---------------------------------------------------------------------------------------------------


def test_an_implementation_that_is_wrong_or_raises_is_refused_alone_and_not_built_again(written):
    def build(name):
        assert name != "wrong", "the relative error of y is 0.1\nand more"
        return {"a": 1, "b": 2}[name]

    assert harness.build_all("cell", ["a", "wrong", "raising", "b"], build) == {"a": 1, "b": 2}
    whys = {"wrong": "the relative error of y is 0.1", "raising": "KeyError: 'raising'"}
    refused = [one for one in written() if one["kind"] == "refused"]
    assert {one["implementation"]: one["why"] for one in refused} == whys
    assert harness.build_all("cell, backward", ["wrong", "b"], {"b": 2}.get) == {"b": 2}


@pytest.mark.parametrize(
    "suite", [bench_host, bench_kept, bench_layer, bench_peers, bench_step, bench_subspace]
)
def test_no_cell_shares_the_refusals_of_another(suite):
    """Those of a name hold for all that begin with it."""
    names = [f"{cell.name}, " for cell in suite.CELLS]
    assert len(names) == len({*names})
    for name in names:
        assert [other for other in names if other.startswith(name)] == [name]


# ---------------------------------------------------------------------------------------------------
# steps
# ---------------------------------------------------------------------------------------------------


def layer_step(context=nullcontext, ran=None):
    """A step that runs one operator of mica.fast; what it claims to run may be wrong."""
    layer = make_layer(4, 8, 8, 2, torch.float32, "cpu")
    module, (lora_A,) = adapted_module(layer, torch.float32)
    x = layer.x.detach()[None].requires_grad_()
    claimed = operators(1, on_kernels=False) if ran is None else ran
    return Step(Form(lambda: module(x), (x, lora_A), context, module), torch.ones(1, 4, 8), None, claimed)


def test_a_step_trains_where_there_is_an_optimizer_and_leaves_no_gradient():
    step = layer_step()
    x, lora_A = step.form.inputs
    before, expected = lora_A.detach().clone(), step.results()["dA"].view_as(lora_A)
    step._replace(optimizer=torch.optim.SGD([lora_A], lr=1.0))()
    torch.testing.assert_close(before - lora_A, expected)
    assert x.grad is lora_A.grad is None


def call_it(function, axes, iterations):
    """As `Once` does, which adds an untimed call."""
    for _ in range(iterations + 1):
        function()


call_it.implementation = "implementation"


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize(
    ("context", "ran"),
    [
        (mica.fast.disabled, None),  # stock PEFT under our name
        (nullcontext, {}),  # ours under stock PEFT's
        (nullcontext, operators(1, on_kernels=True)),  # the reference path under the kernels'
        (nullcontext, operators(1, on_kernels=False, forwards=2)),
    ],
)
def test_an_implementation_under_another_ones_name_gets_no_number(forward_only, context, ran):
    """A forward alone shows whether it ran operators, not which."""
    step = layer_step(context, ran)
    is_wrong = not forward_only or not ran
    with pytest.raises(AssertionError, match="implementation ran") if is_wrong else nullcontext():
        step.time(call_it, {}, 5, step.form.forward if forward_only else None)


def test_results_are_compared_and_must_come_from_the_operators_of_the_name():
    step, gates = layer_step(), dict.fromkeys(("y", "dx", "dA"), 1e-5)
    expected = layer_step(mica.fast.disabled).results()
    assert checked(step, expected, gates) is step
    for what in gates:
        with pytest.raises(AssertionError, match=f"{what} is 9.1e-02 off what is expected"):
            checked(step, expected | {what: 1.1 * expected[what]}, gates)
    with pytest.raises(AssertionError, match=r"a step ran {}, not {'linear': 1"):
        checked(layer_step(mica.fast.disabled), expected, gates)


STEP = bench_step.Cell("toy", (1, 8), "float32", layers=1, vocabulary=64)


def test_losses_that_diverge_later_are_refused(monkeypatch):
    check = bench_step.checked

    def with_another_rate(step, *args):
        step.optimizer.param_groups[0]["lr"] *= 2
        return check(step, *args)

    monkeypatch.setattr(bench_step, "checked", with_another_rate)
    assert bench_step.setting(STEP).steps.keys() == {BARE, STOCK}
    assert harness.refusals[STEP.name, FAST].startswith("a loss is")


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("adapter", [PLAIN_LORA, DORA])
def test_all_that_an_adapter_trains_is_compared_and_the_operators_run(adapter, native, lora, monkeypatch):
    monkeypatch.setenv("MICA_NATIVE", native)
    setting = bench_step.setting(replace(STEP, adapter=adapter))
    assert setting.steps.keys() == {BARE, STOCK, FAST}
    of_magnitudes = {"dm"} if adapter == DORA else set()
    assert setting.steps[FAST].results().keys() == {"y", "dx", "dA", "dB"} | of_magnitudes


@pytest.mark.parametrize(
    ("dtype", "how", "best"),
    [
        ("bfloat16", "", [STOCK_16]),
        ("float32", bench_step.AUTOCAST, [STOCK_UNCAST]),
        ("float32", "", []),
    ],
)
def test_what_is_kept_beside_stock_and_its_best_setting(dtype, how, best, lora):
    cell = replace(STEP, dtype=dtype, how=how, adapter=PLAIN_LORA)
    kept = {name: facts["saved_mb"] for name, facts in bench_kept.setting(cell).facts.items()}
    assert [*kept] == [BARE, STOCK, *best, FAST, FAST_ACTIVATIONS]
    fewest_first = [kept[name] for name in (FAST, FAST_ACTIVATIONS, *best, STOCK)]
    assert fewest_first == sorted(set(fewest_first))


@pytest.mark.slow
def test_a_step_in_a_fresh_process(tmp_path):
    file = bench_fresh.saved_work(STEP, tmp_path)
    facts = bench_fresh.in_a_process(file, FAST)
    assert facts.keys() == {"seconds", "page_faults", "threads"}
    with pytest.raises(AssertionError, match="KeyError: 'nobody'"):
        bench_fresh.in_a_process(file, "nobody")


def test_steps_that_change_nothing_can_show_nothing(monkeypatch):
    monkeypatch.setattr(bench_step, "LEARNING_RATE", 1e-9)
    with pytest.raises(AssertionError, match="the steps make no difference"):
        bench_step.setting(STEP)


# ---------------------------------------------------------------------------------------------------
# peers
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intermediate", [24, 0])
def test_a_peer_that_is_wrong_gets_no_number(intermediate, monkeypatch, lora):
    def peer(error):
        def linear(layer, x):
            W, A, B, scaling = factors(layer)
            return x @ W.T + (1 + error) * scaling * (x @ A.T @ B.T)

        def mlp(model, x):
            hidden = F.silu(linear(model.gate_proj, x)) * linear(model.up_proj, x)
            return linear(model.down_proj, hidden)

        return Peer(mlp, linear)

    monkeypatch.setattr(bench_peers, "PEERS", {"right 1.0": peer(0.0), "wrong 2.0": peer(1e-3)})
    cell = bench_peers.Cell(16, intermediate, "float32")
    setting = bench_peers.setting(cell)
    assert [*setting.steps] == [BARE, STOCK, FAST, "right 1.0"]
    ((_, wrong),) = harness.refusals
    assert wrong == "wrong 2.0"
    assert replace(cell, adapter=DORA).implementations == [BARE, STOCK, FAST]  # these peers have LoRA only


# ---------------------------------------------------------------------------------------------------
# initialisation
# ---------------------------------------------------------------------------------------------------

CELL = bench_subspace.Cell(128, 96, ranks=(16, 64))


def test_a_result_without_a_certificate_is_refused_alone(monkeypatch):
    solve = bench_subspace.minor_subspace

    def uncertified(weight, rank):
        return SimpleNamespace(certified=False) if rank == 64 else solve(weight, rank)

    monkeypatch.setattr(bench_subspace, "minor_subspace", uncertified)
    calls, _ = bench_subspace.setting(CELL)
    assert list(calls) == [SVD, EIGH, "minor_subspace, auto, r = 16"]
    assert harness.refusals == {(CELL.name, "minor_subspace, auto, r = 64"): "not certified"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda vectors: vectors.flip(1), "‖BᵀW‖² is"),  # those of the largest singular values
        (lambda vectors: 1.01 * vectors, "BᵀB is off by"),
    ],
)
def test_eigenvectors_that_are_not_the_minor_ones_are_refused(monkeypatch, change, why):
    weight = torch.randn(96, 128)
    values, vectors = torch.linalg.eigh(weight.double() @ weight.double().T)
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: (values, change(vectors)))
    with pytest.raises(AssertionError, match=why):
        bench_subspace.by_eigh(weight, 16)


def test_a_start_from_another_subspace_has_more_energy():
    model = models.wrap(nn.Sequential(nn.Linear(24, 32, bias=False)), rank=16, targets=["0"])
    (layer,) = models.adapted_layers(model).values()
    least = bench_adapter.energy(model)
    left, _, _ = torch.linalg.svd(layer.get_base_layer().weight.detach(), full_matrices=False)
    layer.lora_B["default"].weight.data = left[:, -17:-1]
    assert bench_adapter.energy(model) > 1.01 * least
