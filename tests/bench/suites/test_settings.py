"""What suites check before they time anything, and after: tiny cells, in this process."""

from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mica.fast
from bench.results import journal
from bench.results.names import BARE, EIGH, FAST, STOCK, SVD
from bench.suites import bench_adapter, bench_step, bench_subspace, eigh, harness
from bench.suites.case import case
from bench.suites.layer import Form, adapted_module, make_layer
from bench.suites.once import Once
from bench.suites.steps import Step, checked, operators
from mica.ops.operator import run_formula
from tests.support import models
from tests.support.stock import counted


@pytest.fixture(autouse=True)
def written(monkeypatch, tmp_path):
    """The journal's entries so far."""
    monkeypatch.setenv(journal.VARIABLE, str(tmp_path / "run.jsonl"))
    monkeypatch.setattr(harness, "refusals", {})
    monkeypatch.setattr(bench_step, "LEARNING_RATE", 3e-2)
    yield journal.read
    for cached in (bench_step.setting, bench_subspace.setting):
        cached.cache_clear()


# ---------------------------------------------------------------------------------------------------
# harness
# ---------------------------------------------------------------------------------------------------


def test_an_implementation_that_is_wrong_or_raises_is_refused_alone_and_not_built_again(written):
    def build(name):
        assert name != "wrong", "the relative error of y is 0.1\nand more"
        return {"a": 1, "b": 2}[name]

    assert harness.build_all("cell", ["a", "wrong", "raising", "b"], build) == {"a": 1, "b": 2}
    whys = {"wrong": "the relative error of y is 0.1", "raising": "KeyError: 'raising'"}
    assert harness.refusals == {("cell", name): why for name, why in whys.items()}
    refused = [(one["group"], one["implementation"]) for one in written() if one["kind"] == "refused"]
    assert refused == [("cell", "wrong"), ("cell", "raising")]
    doing = [one["implementation"] for one in written() if one["kind"] == "doing"]
    assert doing == ["a", "wrong", "raising", "b"]
    assert harness.build_all("cell", ["wrong", "b"], {"b": 2}.get) == {"b": 2}


def test_what_was_refused_in_a_cell_is_refused_in_each_of_its_passes():
    harness.refuse("cell", "wrong", "a")
    assert harness.why_refused("cell, backward", "a") == "wrong"
    assert harness.why_refused("cell", "b") is None


def test_a_case_gives_a_wrong_implementation_no_number():
    x = torch.ones(4)
    bench = case(
        "cell",
        {},
        {BARE: lambda: x, FAST: lambda: 2 * x, STOCK: lambda: x},
        {FAST: lambda: x, STOCK: lambda: x},
    )
    timed = []

    def once(call, group, implementation, axes, iterations, all_clocks):
        timed.append(implementation)

    for implementation in (BARE, STOCK):
        bench(once, lambda group, check, _: check(), 0, implementation)
    assert timed == [BARE, STOCK]
    assert harness.refusals == {("cell", FAST): "the relative error is 1.00e+00, above 2e-06"}


class Benchmark:
    """pytest-benchmark's fixture, as far as `Once` uses it."""

    def __init__(self):
        self.extra_info, self.stats = {}, SimpleNamespace(stats=SimpleNamespace(median=2.0))

    def pedantic(self, call, rounds, iterations):
        return [call() for _ in range(iterations)][-1]


def test_an_untimed_call_comes_before_the_timed_ones_each_on_an_operand_of_its_own():
    calls, made = [], count()
    timed = Once(Benchmark())
    assert timed(lambda: calls.append("call"), "cell", FAST, {}, iterations=3) is None
    assert len(calls) == 1 + 3
    once = Once(Benchmark())
    assert once(calls.append, "cell", FAST, {"suite": "x"}, make=lambda: next(made), counted=1.0) is None
    assert calls[4:] == [0, 1]
    once.grown = 3e6
    once.note_growth(peak_mb=1e6)
    (sample,) = once.samples
    assert (sample["seconds"], sample["facts"]) == (2.0, {"counted": 1.0, "peak_mb": 3.0})


# ---------------------------------------------------------------------------------------------------
# steps
# ---------------------------------------------------------------------------------------------------


class Calls:
    """Calls as the suites' fixture does, and keeps the axes; pytest-benchmark adds further calls."""

    def __call__(self, function, group, implementation, axes, iterations):
        for _ in range(iterations + 3):
            function()
        self.axes = axes


def layer_step(context=nullcontext, ran=None, optimizer=None):
    """A step that runs one operator of mica.fast; what it claims to run may be wrong."""
    layer = make_layer(4, 8, 8, 2, torch.float32, "cpu")
    module, lora_A = adapted_module(layer, torch.float32)
    x = layer.x.detach()[None].requires_grad_()
    claimed = operators(1, on_kernels=False) if ran is None else ran
    optimizer = optimizer and optimizer([lora_A], lr=1.0)
    form = Form(lambda: module(x), (x, lora_A), context, module)
    return Step(form, torch.ones(1, 4, 8), optimizer, claimed)


def test_a_step_trains_where_there_is_an_optimizer_and_leaves_no_gradient():
    step = layer_step(optimizer=torch.optim.SGD)
    lora_A = step.form.inputs[1]
    before, expected = lora_A.detach().clone(), step.results()["dA"].view_as(lora_A)
    y, ran = counted(step)
    assert y.shape == (1, 4, 8)
    assert ran == step.operators
    torch.testing.assert_close(before - lora_A, expected)
    assert all(tensor.grad is None for tensor in step.form.inputs)
    x, module = torch.randn(2, 3, requires_grad=True), nn.Linear(3, 3).requires_grad_(False)
    frozen = Step(Form(lambda: module(x), (x,)), torch.ones(2, 3))
    assert frozen.results().keys() == {"y", "dx"}  # no gradient of adapters


@pytest.mark.parametrize(
    ("forward_only", "context", "ran"),
    [
        (False, mica.fast.disabled, None),  # stock PEFT under our name
        (True, mica.fast.disabled, None),
        (False, nullcontext, {}),  # ours under stock PEFT's
        (True, nullcontext, {}),
        (False, nullcontext, operators(1, on_kernels=True)),  # the reference path under the kernels'
        (False, nullcontext, operators(2, on_kernels=False)),
        (False, nullcontext, operators(1, on_kernels=False, forwards=2)),
    ],
)
def test_an_implementation_under_another_ones_name_gets_no_number(forward_only, context, ran):
    step = layer_step(context, ran)
    with pytest.raises(AssertionError, match="implementation ran"):
        step.time(Calls(), "group", "implementation", {}, 5, step.form.forward if forward_only else None)


def test_results_are_compared_and_must_come_from_the_operators_of_the_name():
    expected, gates = layer_step(mica.fast.disabled, {}).results(), dict.fromkeys(("y", "dx", "dA"), 1e-5)
    assert checked(layer_step(), expected, gates) is not None
    for what in gates:
        wrong = expected | {what: 1.1 * expected[what]}
        with pytest.raises(AssertionError, match=f"{what} is 9.1e-02 off stock PEFT's"):
            checked(layer_step(), wrong, gates)
    step = layer_step(mica.fast.disabled)
    with pytest.raises(AssertionError, match=r"a step ran {}, not {'linear': 1"):
        checked(step, step.results(), gates)


STEP = bench_step.Cell("toy", (1, 8), "float32", layers=1, vocabulary=64)


def test_a_wrong_operator_and_losses_that_diverge_later_are_refused(monkeypatch):
    monkeypatch.setenv("MICA_NATIVE", "0")  # what is wrong is Python

    def scaled(name, *args, **options):
        result = run_formula(name, *args, **options)
        return result * 1.1 if name == "linear" else result

    check = bench_step.checked

    def with_another_rate(step, *args):
        step.optimizer.param_groups[0]["lr"] *= 2
        return check(step, *args)

    for where, wrong, why in (
        ("mica.ops.linear.run_formula", scaled, "y is "),
        ("bench.suites.bench_step.checked", with_another_rate, "a loss is"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, wrong)
            harness.refusals.clear()
            bench_step.setting.cache_clear()
            assert bench_step.setting(STEP).steps.keys() == {BARE, STOCK}
            assert harness.refusals[STEP.name, FAST].startswith(why)


def test_steps_that_change_nothing_can_show_nothing(monkeypatch):
    monkeypatch.setattr(bench_step, "LEARNING_RATE", 1e-9)
    with pytest.raises(AssertionError, match="the steps make no difference"):
        bench_step.setting(STEP)


# ---------------------------------------------------------------------------------------------------
# initialisation
# ---------------------------------------------------------------------------------------------------

CELL = bench_subspace.Cell(128, 96, 1, ranks=(16, 64))


def test_a_result_without_a_certificate_is_refused_alone(monkeypatch):
    solve = bench_subspace.minor_subspace

    def uncertified(weight, rank):
        return SimpleNamespace(certified=False) if rank == 64 else solve(weight, rank)

    monkeypatch.setattr(bench_subspace, "minor_subspace", uncertified)
    calls, _ = bench_subspace.setting(CELL)
    assert list(calls) == [SVD, EIGH, "minor_subspace, auto, r = 16"]
    assert harness.refusals == {(CELL.name, "minor_subspace, auto, r = 64"): "not certified"}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda vectors: vectors.flip(1), "‖BᵀW‖² is"),  # those of the largest singular values
        (lambda vectors: 1.01 * vectors, "BᵀB is off by"),
    ],
)
def test_eigenvectors_that_are_not_the_minor_ones_are_refused(monkeypatch, wrong, why):
    solve = torch.linalg.eigh

    def wrongly(gram):
        values, vectors = solve(gram)
        return values, wrong(vectors)

    monkeypatch.setattr(torch.linalg, "eigh", wrongly)
    with pytest.raises(AssertionError, match=why):
        bench_subspace.by_eigh(torch.randn(96, 128), 16)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)], ids=str)
@pytest.mark.parametrize("smallest", [0.5, 1e-9])
def test_all_eigenvectors_span_the_minor_subspace(shape, smallest):
    """And the SVD's do where the smallest singular value is lost in the Gram."""
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    values[-1] = smallest
    weight = left * values @ right
    basis = eigh.basis_by_eigh(weight, 8)
    assert basis.dtype == torch.float32
    expected = left[:, -8:].float()
    torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=0, atol=1e-5)


def test_peft_creates_an_adapter_by_all_eigenvectors_and_is_itself_again():
    def basis_of(layer):
        return layer.lora_B["default"].weight.detach()

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 32, bias=False), nn.Linear(32, 24, bias=False))
    weights = [layer.weight.detach() for layer in base]
    mica_init = eigh.LoraLayer.mica_init
    with eigh.peft_with_eigh():
        model = models.wrap(base, rank=16, targets=["0", "1"])
    assert eigh.LoraLayer.mica_init is mica_init
    assert mica.fast.is_enabled()
    for layer, weight in zip(models.adapted_layers(model).values(), weights, strict=True):
        assert torch.equal(basis_of(layer), eigh.basis_by_eigh(weight, 16))
        assert not layer.lora_A["default"].weight.any()


def test_a_start_from_another_subspace_has_more_energy():
    def energy(first, last=None, scale=1.0):
        """The energy of one adapted layer that starts from these left singular vectors of its weight."""
        torch.manual_seed(0)
        model = models.wrap(nn.Sequential(nn.Linear(24, 32, bias=False)), rank=16, targets=["0"])
        (layer,) = models.adapted_layers(model).values()
        u = torch.linalg.svd(layer.get_base_layer().weight.detach(), full_matrices=False).U
        layer.lora_B["default"].weight.data = scale * u[:, first:last]
        return bench_adapter.energy(model)

    assert energy(-17, -1) > 1.01 * energy(-16)
    with pytest.raises(AssertionError, match="BᵀB is off by"):
        energy(-16, scale=1.01)
