"""Layers on one x as one operator: learnt by observation, never wrong, and nothing is kept alive."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mica.fast
from mica.fast import grouping
from tests.support.grouped import X, assert_equal, learned, run, three
from tests.support.models import gradients, randomise, tiny_llama, wrap
from tests.support.tolerances import RELATIVE, error

TOKENS = torch.randint(0, 61, (2, 5), generator=torch.Generator().manual_seed(2))
LAYERS = 2


pytestmark = pytest.mark.usefixtures("grouping_on")


def llama(dtype=torch.float32, **kwargs):
    return randomise(wrap(tiny_llama().to(dtype), targets="all-linear", **kwargs)).train()


def step(model, tokens=TOKENS):
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=tokens).logits
    logits.float().square().mean().backward()
    return logits.detach(), gradients(model)


def ungrouped(model, tokens=TOKENS):
    mica.fast.enable(group_projections=False)
    try:
        return step(model, tokens)
    finally:
        mica.fast.enable(group_projections=True)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_the_second_step_on(monkeypatch, backend, dtype):
    monkeypatch.setenv("MICA_BACKEND", backend)
    model = llama(dtype)
    expected = ungrouped(model)
    mica.fast.call_counts.clear()
    step(model)
    assert mica.fast.call_counts["linear_group"] == 0  # the first is watched
    assert mica.fast.call_counts["linear"] == 7 * LAYERS
    mica.fast.call_counts.clear()
    assert_equal(step(model), expected, 20 * RELATIVE[dtype])
    counts = mica.fast.call_counts
    assert counts["linear_group"] == counts["linear_group_backward"] == 2 * LAYERS  # q/k/v and gate/up
    assert counts["linear"] == counts["linear_backward"] == 2 * LAYERS  # o and down
    assert counts["linear_group_kernels"] == (2 * LAYERS if backend == "triton" else 0)


def test_auto_is_off_on_the_cpu():
    mica.fast.enable()
    model = llama()
    for _ in range(3):
        step(model)
    assert mica.fast.call_counts["linear_group"] == 0


@pytest.mark.parametrize("kept", [True, False])
def test_a_loss_that_is_kept_does_not_keep_it_from_starting(kept):
    model, losses = llama(), []
    for _ in range(3):
        loss = model(input_ids=TOKENS).logits.square().mean()
        loss.backward()
        losses.append(loss if kept else None)
    assert mica.fast.call_counts["linear_group"] == 2 * 2 * LAYERS


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing(use_reentrant, dtype):
    """Never over to a group between a forward and its recomputation: PyTorch would refuse the step."""
    model = llama(dtype)
    expected = ungrouped(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    mica.fast.call_counts.clear()
    for _ in range(4):
        assert_equal(step(model), expected, 20 * RELATIVE[dtype])
    assert mica.fast.call_counts["linear_group"] >= 2 * LAYERS
    mica.fast.enable(group_projections=False)
    assert_equal(step(model), expected, 20 * RELATIVE[dtype])


def test_two_forwards_before_their_backwards_under_checkpointing():
    model = llama()
    expected = ungrouped(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        losses = [model(input_ids=TOKENS).logits.square().mean() / 2 for _ in range(2)]
        for loss in losses:
            loss.backward()
        assert_equal((expected[0], gradients(model)), expected)
    assert mica.fast.call_counts["linear_group"] > 0


def check(model, x):
    actual = run(model, x)
    mica.fast.enable(group_projections=False)
    expected = run(model, x)
    mica.fast.enable(group_projections=True)
    assert_equal(actual, expected)


@pytest.mark.parametrize("order", ["ab", "acb", "bca", "a", "abcabc", "aabc", "cab"])
def test_a_changed_order_is_right(order):
    model = learned()
    model.base_model.model.order = order
    for _ in range(4):
        check(model, X)
    model.base_model.model.order = "abc"
    check(model, X)


def test_outputs_that_are_not_fetched_end_the_group():
    model = learned()
    model.base_model.model.order = "a"
    for _ in range(4):
        run(model, X)
    assert mica.fast.call_counts["linear_group"] == 2
    assert mica.fast.call_counts["linear"] == 2 * 2 + 2


def test_x_edited_in_place_between_the_calls():
    model = learned()
    model.base_model.model.between = lambda x: x.clone() * 2
    check(model, X)

    def edit(x):
        with torch.no_grad():
            x.mul_(2.0)
        return x

    model = learned()
    model.base_model.model.between = edit
    out = model(X.clone())
    assert mica.fast.call_counts["linear_group"] == 1
    mica.fast.enable(group_projections=False)
    assert error(out, model(X.clone())) <= 1e-5


def test_an_exception_in_the_middle_leaves_nothing_behind():
    model = learned()

    def fail(x):
        raise RuntimeError("in the middle")

    model.base_model.model.between = fail
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="in the middle"):
        model(x)
    assert grouping.state.pending is None
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None
    model.base_model.model.between = lambda x: x
    check(model, X)
    mica.fast.call_counts.clear()
    check(model, X)
    assert mica.fast.call_counts["linear_group"] == 1  # one exception is no reason to end it


def test_a_step_holds_no_reference_to_x():
    model = learned()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None


def test_backward_lets_go_of_what_was_not_fetched():
    """Outside PEFT's tuner, where nothing else would."""
    model = learned()
    x = X.clone().requires_grad_()
    out = model.base_model.model.a(x)
    assert len(grouping.state.pending.outputs) == 2
    out.sum().backward()
    assert not any(grouping.state.pending.outputs.values())
    alive = weakref.ref(x)
    del x, out
    gc.collect()
    assert alive() is None
    grouping.forget_pending()


def _hook(layer):
    layer.register_forward_hook(lambda module, args, out: out * 2)


def _dropout(layer):
    layer.lora_dropout["default"] = nn.Dropout(0.5)


def _trainable(layer):
    layer.base_layer.weight.requires_grad_()


def _disabled(layer):
    layer.enable_adapters(False)


def _merged(layer):
    layer.merge()


def _tensor_scaling(layer):
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])


@pytest.mark.parametrize("change", [_hook, _dropout, _trainable, _disabled, _merged, _tensor_scaling])
def test_a_layer_that_has_changed(change):
    model = learned()
    change(model.base_model.model.b)
    if change is _dropout:  # other masks, but no error, and no group
        run(model, X)
        assert mica.fast.call_counts["linear_group"] == 0
        return
    for _ in range(3):
        check(model, X)
    assert mica.fast.call_counts["linear_group"] == (3 if change is _tensor_scaling else 0)


def test_ranks_too_wide_for_the_kernels_stay_alone(monkeypatch):
    monkeypatch.setattr("mica.fast.grouping.MAX_RANK", 40)
    model = three()
    for _ in range(3):
        check(model, X)
    assert mica.fast.call_counts["linear_group"] == 0


def test_not_without_gradients_and_not_compiled():
    model = learned()
    with torch.no_grad():
        model(X)
    with torch.inference_mode():
        model(X)
    torch.compiler.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(X).sum().backward()
    assert mica.fast.call_counts["linear_group"] == 0


def test_a_model_inside_the_call_of_another():
    inner, outer = learned(), learned()

    def call_inner(x):
        inner(x)
        return x

    outer.base_model.model.between = call_inner
    for _ in range(3):
        check(outer, X)


def test_threads_do_not_see_each_other_s_outputs():
    model, results, failures = learned(), {}, []
    inputs = {n: torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in range(4)}
    barrier = threading.Barrier(4)

    def work(n):
        try:
            for _ in range(20):
                barrier.wait()
                results[n] = model(inputs[n]).detach()
        except Exception as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(n,)) for n in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert mica.fast.call_counts["linear_group"] > 70  # of 80; counting itself is not atomic
    assert mica.fast.call_counts["linear"] <= 80  # the last layer only: no output was missed
    mica.fast.enable(group_projections=False)
    for n, x in inputs.items():
        assert error(results[n], model(x)) <= 1e-5


def test_a_thread_goes_on_where_it_was_when_another_has_run_in_between():
    model = learned()
    net = model.base_model.model

    def other_thread(x):
        net.between = lambda x: x
        thread = threading.Thread(target=model, args=(X + 1,))
        thread.start()
        thread.join()
        return x

    net.between = other_thread
    model(X)
    assert mica.fast.call_counts["linear_group"] == 2
    assert mica.fast.call_counts["linear"] == 2  # the last layers


def test_checkpointed_block_that_is_called_twice():
    model = three()
    block = model.base_model.model
    expected = None
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        x = X.detach().requires_grad_()
        out = checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False)
        out.square().sum().backward()
        actual = (out.detach(), {**gradients(model), "x": x.grad})
        expected = expected or actual
        assert_equal(actual, expected)
    assert mica.fast.call_counts["linear_group"] > 0


def test_the_setting_is_checked():
    with pytest.raises(ValueError, match="group_projections must be 'auto', True or False, but it is 'on'"):
        mica.fast.enable(group_projections="on")


@pytest.mark.parametrize(
    ("is_cuda", "tokens", "has_kernels", "expected"),
    [
        (True, 2048, True, True),
        (True, 2047, True, False),  # the host decides how long a step takes, and a group costs it more
        (True, 2048, False, False),
        (False, 2048, True, False),
    ],
)
def test_auto_groups_large_tensors_on_kernels(monkeypatch, is_cuda, tokens, has_kernels, expected):
    monkeypatch.setattr("mica.backend.use_kernels", lambda *args, **options: has_kernels)
    x = SimpleNamespace(
        is_cuda=is_cuda,
        shape=(1, tokens, 4096),
        numel=lambda: tokens * 4096,
        is_inference=lambda: False,
        device=None,
        dtype=torch.bfloat16,
    )
    assert mica.fast.enable() is None
    assert grouping.is_on(x, torch.zeros(16, 4096)) is expected
    mica.fast.enable(group_projections=True)
    assert grouping.is_on(x, torch.zeros(16, 4096))
    mica.fast.enable()
