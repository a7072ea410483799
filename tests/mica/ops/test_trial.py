"""The first call of a kind of layer, on a CPU that stands for a device: its kernels are interpreted."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from mica import native, ops
from mica.kernels import launching
from mica.kernels.launching import Plan
from mica.ops import mica_linear, trial
from mica.paths import choose, triton_path, tuning
from mica.paths.operands import Operands
from mica.paths.tuning import NATIVE
from tests.support.faults import raising
from tests.support.kernel_cases import BF16, DEVICE, mica_and_lora, seed_of
from tests.support.linear_calls import agree, call, contiguous, leaves, of_users, run, same_bits
from tests.support.oracle import problem, solve

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the CPU stands for a device")
CPU = torch.device("cpu")
HAS_CPP = native.why_not() is None


@pytest.fixture(autouse=True)
def device(by_default, monkeypatch, tmp_path):
    """It can run kernels, nothing is known of it, and calls are few: an interpreted one takes 0.1 s."""
    by_default()
    monkeypatch.setenv("MICA_TUNE", str(tmp_path))
    for name, value in {"UNTIMED": 1, "CALLS": 1, "ROUNDS": 2}.items():
        monkeypatch.setattr(tuning, name, value)
    ops.call_counts.clear()
    torch.use_deterministic_algorithms(False)
    return monkeypatch


def another_process():
    choose.clear()
    choose.devices_without_kernels.clear()
    launching.clear()


@pytest.fixture
def costs(monkeypatch):
    """``costs(forward, backward)``: seconds of the forms, for 1 that the others take.

    Returns how many tensors each pass returns when it is measured.
    """

    def costs(forward, backward=None):
        table = {"forward": forward, "backward": backward or forward}
        returned = {name: set() for name in table}

        def seconds(call, synchronize):
            (form,) = call.args
            name = call.func.__name__
            returned[name].add(len(call()))
            return table[name].get(form, 1.0)

        monkeypatch.setattr(tuning, "_seconds", seconds)
        return returned

    return costs


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    seen, launch = [], Plan.__call__

    def watched(plan, *tensors):
        seen.append(plan.kernel.__name__.strip("_").removesuffix("_kernel"))
        return launch(plan, *tensors)

    monkeypatch.setattr(Plan, "__call__", watched)
    return seen


def layer(trains_B=False, tokens=16, dtype=BF16, rank=16):
    p = contiguous(problem((tokens,), 16, 32, rank, dtype))
    p.lora_B.requires_grad_(trains_B)
    return p


def counted(how):
    """Counts of a forward and backward of MiCA that ran so."""
    names = ("linear", "linear_backward")
    return dict.fromkeys(names, 1) | {f"{name}_{how}": 1 for name in names if how}


@mica_and_lora
def test_from_end_to_end_with_the_real_clock(device, tmp_path, capfd, trains_B):
    """Interpreted kernels are a thousand times slower, so the reference path is taken."""
    p = layer(trains_B)
    agree(run(p), solve(p), BF16)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "mica: measured in " in said
    assert " how 32 x 16, up to 16 tokens, " in said
    (file,) = tmp_path.glob("*.json")
    text = file.read_text(encoding="utf-8")
    assert all(f'"{form}"' in text for form in ("split", "first", "mixed", "fused", "reference"))

    for settle in (lambda: None, another_process):
        settle()
        run(p)  # in another process, what the file says
        ops.call_counts.clear()
        run(p)
        how = "native" if HAS_CPP else ""
        assert {**ops.call_counts, **counted(how)} == ops.call_counts
        assert ("grad_b" in ops.call_counts) == (trains_B and not HAS_CPP)
    assert capfd.readouterr().err == ""
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("forward", "backward", "kernels"),
    [
        ({"fused": 0.5}, {"split": 0.5}, "down_projection fused_linear down_projection grad_a up_projection"),
        ({"split": 0.5}, {"mixed": 0.5}, "down_projection up_projection up_projection"),
        ({"mixed": 0.5}, {"first": 0.5}, "up_projection down_projection grad_a"),
        ({"first": 0.5}, {}, "down_projection"),
        ({}, {"fused": 0.5}, "down_projection grad_a fused_linear"),
        ({"fused": 0.99}, {"split": 1.5}, ""),
    ],
)
@mica_and_lora
def test_the_fastest_form_of_each_pass_runs_from_the_first_call_on(
    costs, launched, forward, backward, kernels, trains_B
):
    returned = costs({NATIVE: 1.0, **forward}, {NATIVE: 1.0, **backward})
    p = layer(trains_B)
    first = run(p)
    assert returned["backward"] == {3 if trains_B else 2}  # dx, dA and dB
    agree(first, solve(p), BF16)
    expected = kernels.split()
    if trains_B and expected and backward and "mixed" not in backward:
        expected.append("grad_a")  # of B
    assert sorted(launched[-len(expected) :] if expected else []) == sorted(expected)
    launched.clear()
    same_bits(run(p), first)
    assert sorted(launched) == sorted(expected)


def test_c_plus_plus_has_to_be_beaten_by_both_passes_together(costs, launched):
    costs({NATIVE: 0.6, "split": 0.5}, {NATIVE: 0.6, "split": 0.9})
    run(layer())
    launched.clear()
    run(layer())
    assert bool(launched) != HAS_CPP


def test_dropout_of_a_layer_that_trains_b(costs, launched):
    """C++ has no mask on a device. dB, which is not told of dropout, takes its layer's form."""
    costs({"fused": 0.5}, {"split": 0.5})
    p, options = layer(trains_B=True), {"dropout_p": 0.4, "seed": seed_of(77)}
    for _ in range(2):
        launched.clear()
        agree(run(p, **options), solve(p, **options), BF16)
    assert launched.count("grad_a") == 2
    assert (launched.count("fused_linear"), launched.count("up_projection")) == (1, 1)
    (known,) = tuning.table(CPU).settled.values()
    assert [*known.forward.microseconds] == ["reference", "split", "fused"]


# -- nobody sees it ----------------------------------------------------------------------------------


def test_nobody_sees_a_trial(costs):
    """Neither hooks of saved tensors nor those of parameters, nor counts, gradients, random numbers."""
    costs({"split": 0.5})
    p = layer()
    packed, reached = [], []

    def step():
        ops.call_counts.clear()
        ops.call_counts["embedding"] = 3
        packed.clear()
        reached.clear()
        state = torch.get_rng_state()
        lora_A = torch.nn.Parameter(p.lora_A.detach().clone())
        lora_A.register_hook(reached.append)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
            y = mica_linear(p.x, p.weight, lora_A, p.lora_B, p.scaling)
        y.backward(p.grad_output)
        assert torch.equal(torch.get_rng_state(), state)
        return len(packed), len(reached), dict(ops.call_counts), lora_A.grad

    *first, grad = step()
    *second, again = step()
    assert first == second == [len(packed), 1, {**counted("kernels"), "embedding": 3}]
    assert torch.equal(grad, again)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_first_call_without_gradients_settles_both_passes(costs, launched, context):
    costs({"split": 0.5})
    p = layer()
    with context():
        run_forward(p)
    launched.clear()
    run(p)
    assert launched == ["down_projection", "up_projection", "down_projection", "grad_a", "up_projection"]


def run_forward(p):
    return mica_linear(p.x, p.weight, p.lora_A, p.lora_B, p.scaling)


def deterministic(p):
    torch.use_deterministic_algorithms(True)
    run(p)


def of_inference(p):
    with torch.inference_mode():
        p.weight = p.weight.clone()
        run_forward(p)


NOT_NOW = {
    "deterministic": deterministic,
    "inference tensors": of_inference,
    "operator": lambda p: torch.ops.mica.linear(p.x, p.weight, p.lora_A, p.lora_B, 1.0, None, None),
    "vmap": lambda p: torch.func.vmap(lambda x: mica_linear(x, p.weight, p.lora_A, p.lora_B))(p.x[None]),
    "meta": lambda p: mica_linear(*(t.to("meta") for t in (p.x, p.weight, p.lora_A, p.lora_B))),
    "compiler": lambda p: torch.compile(run_forward, backend="eager")(p),
}


@pytest.mark.parametrize("when", NOT_NOW)
def test_when_nothing_can_be_measured_the_reference_runs_what_is_not_known(
    device, capfd, costs, launched, when
):
    costs({"split": 0.5})
    p = layer()
    if when == "meta":
        device.setattr(choose.runtime, "why_unavailable", lambda device: "no kernels on meta")
    NOT_NOW[when](p)
    assert capfd.readouterr().err == ""
    assert launched == []
    assert tuning.table(CPU).settled == {}
    assert choose.cpp_keys == set()


def test_what_is_known_counts_in_a_deterministic_run_too(costs, launched):
    costs({"split": 0.5})
    p = layer()
    run(p)
    another_process()
    launched.clear()
    deterministic(p)
    assert "up_projection" in launched


def test_checkpointing_settles_in_the_first_forward(costs, launched):
    costs({"split": 0.5})
    p = layer()
    checkpoint(call, p, mica_linear, *leaves(p), use_reentrant=False).backward(p.grad_output)
    assert launched[-7:] == [
        *["down_projection", "up_projection"] * 2,
        "down_projection",
        "grad_a",
        "up_projection",
    ]


def test_a_thread_does_not_wait_for_another(costs, launched):
    costs({"split": 0.5})
    p = layer()
    with tuning.table(CPU).measuring:
        agree(run(p), solve(p), BF16)
    assert launched == []
    run(p)
    assert launched


# -- what goes wrong ---------------------------------------------------------------------------------


def off(function):
    def wrong(*args, **kwargs):
        return function(*args, **kwargs).mul_(1.5)

    return wrong


@pytest.mark.parametrize(
    ("broken", "text", "lasts"),
    [
        (off(triton_path.fused_linear), "its result is off by", True),
        (raising(RuntimeError("unspecified launch failure\nat …")), "unspecified launch failure$", True),
        (raising(launching.LaunchError("out of resource")), "out of resource", True),
        (raising(torch.OutOfMemoryError("CUDA out of memory.")), "CUDA out of memory.", False),
    ],
)
def test_a_form_that_fails_is_out_with_a_warning(device, tmp_path, costs, launched, broken, text, lasts):
    costs({"fused": 0.1, "split": 0.5})
    device.setattr(triton_path, "fused_linear", broken)
    p = layer()
    with pytest.warns(UserWarning, match=f"leaves out the form 'fused' of 32 x 16, .*: {text}") as warned:
        agree(run(p), solve(p), BF16)
    assert len(of_users(warned)) == 1
    launched.clear()
    agree(run(p), solve(p), BF16)
    assert "up_projection" in launched
    assert "fused_linear" not in launched
    assert bool([*tmp_path.iterdir()]) == lasts


def test_without_memory_for_scratch_the_reference_runs_in_this_process(device, tmp_path, costs, launched):
    costs({"split": 0.5})
    p = layer()
    with device.context() as patch:
        patch.setattr(trial, "_scratch", raising(torch.OutOfMemoryError("CUDA out of memory.")))
        with pytest.warns(UserWarning, match="reference path, as it could not be measured: CUDA out of mem"):
            agree(run(p), solve(p), BF16)
    agree(run(p), solve(p), BF16)
    assert launched == []
    assert not [*tmp_path.iterdir()]
    another_process()
    run(p)
    assert launched


def test_switched_off_the_reference_runs_from_c_plus_plus(device, capfd, launched):
    device.setenv("MICA_TUNE", "0")
    another_process()
    p = layer()
    run(p)
    ops.call_counts.clear()
    run(p)
    assert ops.call_counts == counted("native" if HAS_CPP else "")
    assert launched == []
    assert capfd.readouterr().err == ""


# -- what C++ knows ----------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_CPP, reason="without C++")
def test_c_plus_plus_computes_the_kinds_that_are_known_and_no_others(costs):
    """Its keys tell calls apart that may run in other forms."""
    costs({NATIVE: 0.1})
    p = layer()
    run(p)

    def runs_from_cpp(p, x=None, **changes):
        operands = Operands(p.weight, p.lora_A, p.lora_B, **changes)
        return native.module().linear(p.x if x is None else x, *operands) is not None

    assert runs_from_cpp(p)
    assert runs_from_cpp(layer(tokens=9))  # as many when rounded up
    assert runs_from_cpp(p, p.x.unsqueeze(0))
    assert runs_from_cpp(p, p.x[:0])
    assert runs_from_cpp(p, scaling=0.3)
    assert not runs_from_cpp(layer(tokens=8))
    assert not runs_from_cpp(layer(tokens=17))
    assert not runs_from_cpp(layer(rank=8))
    assert not runs_from_cpp(layer(dtype=torch.float32))
    assert not runs_from_cpp(p, compute_dtype=torch.float32)
    assert not runs_from_cpp(p, trains_B=True)
    assert not runs_from_cpp(p, dropout_p=0.5, seed=seed_of(1))
    shifted = torch.cat((p.x.new_zeros(1), p.x.flatten()))[1:].view(p.x.shape)
    assert not runs_from_cpp(p, shifted)
    another_process()
    assert not runs_from_cpp(p)
