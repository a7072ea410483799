"""How long what is computed again lives."""

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from mica.ops import computed
from tests.support.kept_layers import Layer, as_saved, assert_same, gated, leaves, of_shared, rms_norm

FP32 = torch.float32

pytestmark = pytest.mark.usefixtures("way")


def profiled_backward(ys, **options):
    with torch.profiler.profile(**options) as profiler:
        sum(y.sum() for y in ys).backward(retain_graph=True)
    return profiler.events()


def test_layers_that_share_compute_once_in_each_backward():
    counts = []
    for number in (1, 3):
        ys, _ = of_shared(number, dtype=FP32)  # in bfloat16 C++ computes a norm
        names = [[event.name for event in profiled_backward(ys)] for _ in range(2)]
        counts.append([of_one.count("aten::mul") for of_one in names])
    for one, three in zip(*counts, strict=True):
        assert three - one < 2 * 2  # the products of a norm, if both further layers made them


def test_act_is_computed_once_for_two_layers_and_the_product():
    """And nothing waits any more, as soon as all have had it."""
    gate, up = leaves(FP32, FP32)
    x = gated(gate, up)
    ys = [Layer()(x), Layer(seed=1)(x)]
    waiting = []
    gate.register_hook(lambda _: waiting.append(len(computed._backward.held)))
    names = [event.name for event in profiled_backward(ys)]
    assert names.count("aten::silu") == 1
    assert waiting == [0]


@pytest.mark.parametrize("used", [1, 3])
@pytest.mark.parametrize("make", [rms_norm, gated], ids=["norm", "product"])
def test_nothing_outlives_a_backward_whose_graph_lives_on(make, used, way):
    """Also where some of the layers that share x take no part in it."""
    if way == "kernels":
        pytest.skip("what Triton's interpreter allocates is counted, too")
    ys, _ = of_shared(3, make)
    profiled_backward(ys)  # makes the gradients, to which the next adds
    assert (
        sum(event.self_cpu_memory_usage for event in profiled_backward(ys[:used], profile_memory=True)) == 0
    )


def test_what_waits_for_a_layer_that_takes_no_part_does_not_add_up():
    gate, up = leaves(FP32, FP32)
    ys, seen = [], []
    for seed in range(6):
        x = F.silu(gate * seed) * up
        x.register_hook(lambda _: seen.append(len(computed._backward.held)))
        taking_part, other = Layer(seed=seed), Layer(seed=seed)
        ys.append((taking_part(x), other(x)))

    sum(y for y, _ in ys).sum().backward()
    assert len(seen) == 6
    assert 0 < max(seen) <= 3
    assert computed._backward.held == OrderedDict()


@pytest.mark.parametrize("retain", [False, True])
def test_nothing_outlives_a_backward_that_raises(retain):
    def out_of_memory(_):
        waiting.append(len(computed._backward.held))
        raise torch.OutOfMemoryError

    waiting = []
    gate, up = leaves(FP32, FP32)
    x = gated(gate, up)
    x.register_hook(out_of_memory)  # after the layer has had x, before the product has had act(G)
    y = Layer()(x)
    with pytest.raises(torch.OutOfMemoryError):
        y.sum().backward(retain_graph=retain)
    assert waiting == [1]
    assert computed._backward.held == OrderedDict()


def test_a_node_that_is_looked_at_outside_of_a_backward():
    gate, up = leaves(FP32, FP32)
    x = gated(gate, up)
    Layer()(x)
    assert torch.equal(x.grad_fn._saved_self, F.silu(gate))


def test_two_losses_and_a_graph_that_is_retained():
    layers = Layer(), Layer(seed=1)
    gate, up = leaves(FP32, FP32)

    def found(change):
        x = change(gated(gate, up))
        losses = [layer(x).sin().sum() for layer in layers]
        inputs = layers[0].lora_A, layers[1].lora_A, gate, up
        first = torch.autograd.grad(losses[0], inputs, retain_graph=True, allow_unused=True)
        both = torch.autograd.grad(sum(losses), inputs, retain_graph=True)
        again = torch.autograd.grad(sum(losses), inputs)
        return [t for t in (*first, *both, *again) if t is not None]

    as_saved(found)


def test_two_threads(way):
    """Each with a backward of its own, through the same graph."""
    if way == "kernels":
        pytest.skip("Triton's interpreter takes one thread")
    ys, layers = of_shared(2, gated)
    expected = [
        torch.autograd.grad(y.float().sum(), layer.lora_A, retain_graph=True)
        for y, layer in zip(ys, layers, strict=True)
    ]
    start = threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(20):
            found = torch.autograd.grad(ys[i].float().sum(), layers[i].lora_A, retain_graph=True)
            assert_same(found, expected[i])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
