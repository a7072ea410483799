"""CUDA graphs, streams, `torch.compile`, checkpoints: an adapted layer gives what it gives eagerly, alone.

What a CPU can show of it (where kept memory is allocated, and when a device is tried) is in `tests/kernels`;
here it has the compilers that generate no code, and checkpoints.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mica.fast
from bench.measure.clocks import CLOCK_RATE, captured
from bench.measure.machine import DEVICE
from bench.results.names import MICA, PLAIN_LORA
from bench.suites.harness import pick
from bench.suites.layer import OF_A_STEP, adapted_module, make_layer
from mica.ops import mica_linear
from tests.support import models
from tests.support.tolerances import RELATIVE, error

prepared_b = pytest.importorskip("mica.kernels.prepared_b")  # imports Triton

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
# B is copied and padded, and cast alone; in LoRA in each pass
each_layer = pytest.mark.parametrize(("rank", "adapter"), [(4, MICA), (16, MICA), (4, PLAIN_LORA)])

DTYPE = torch.bfloat16
# tokens, out_features, in_features: on a GPU both of the sums over a long side are split
SIZES = pick(default=(40, 48, 64), cuda=(512, 1024, 2048))
REPEATS, SLEEP = 50, 0.05  # of the calls on two streams; seconds that these wait for the host


class Adapted(NamedTuple):
    """A PEFT layer on `mica.fast`."""

    module: nn.Module
    x: Tensor
    trained: list[Tensor]  # A, and B in LoRA
    grad_output: Tensor

    def step(self, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """y, dx, dA and, in LoRA, dB; ``call``: what runs the module."""
        y = (self.module if call is None else call)(self.x)
        return [y.detach(), *torch.autograd.grad(y, (self.x, *self.trained), self.grad_output)]

    def alone(self) -> list[Tensor]:
        """y, without recording a graph."""
        with torch.no_grad():
            return [self.module(self.x)]


@pytest.fixture(autouse=True)
def counted():
    """Every test runs kernels, and whatever algorithms PyTorch would choose."""
    torch.use_deterministic_algorithms(False)
    mica.fast.enable(lora=True)
    before = mica.fast.call_counts["linear_kernels"]
    yield
    assert mica.fast.call_counts["linear_kernels"] > before, "no kernels ran"


def adapted(rank: int = 16, adapter: str = MICA) -> Adapted:
    layer = make_layer(*SIZES, rank, DTYPE, DEVICE, adapter)
    module, trained = adapted_module(layer, torch.float32)
    return Adapted(module, layer.x, trained, layer.grad_output)


def same_bits(values: list[Tensor], expected: list[Tensor], where: str) -> None:
    names = OF_A_STEP[: len(expected)]
    different = [name for name, *pair in zip(names, values, expected, strict=True) if not torch.equal(*pair)]
    assert not different, f"{where}: other bits of {', '.join(different)}"


@needs_gpu
@each_layer
@pytest.mark.parametrize("part", [Adapted.alone, Adapted.step])
def test_a_graph_follows_an_update(part, rank, adapter):
    layer, static = adapted(rank, adapter), []

    def call() -> None:
        static[:] = part(layer)

    replay = captured(call)
    for factor in (-2.0, 0.5):  # as an optimizer does, in place
        with torch.no_grad():
            for tensor in layer.trained:
                tensor.mul_(factor)
        expected = part(layer)
        replay()
        same_bits(static, expected, f"a replay after what is trained was multiplied by {factor}")


@needs_gpu
@each_layer
def test_graphed_callables(rank, adapter):
    layer = adapted(rank, adapter)
    expected = layer.step()
    graphed = torch.cuda.make_graphed_callables(layer.module, (layer.x.detach().clone().requires_grad_(),))
    for _ in range(3):
        same_bits(layer.step(graphed), expected, "a graphed call")


@needs_gpu
def test_two_streams_share_nothing():
    """The same launches on other data, concurrently: each stream has its own partial sums and counters."""

    def step(layer) -> list[Tensor]:
        y = mica_linear(layer.x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
        return [y.detach(), *torch.autograd.grad(y, (layer.x, layer.lora_A), layer.grad_output)]

    layers = [make_layer(*SIZES, 4, DTYPE, DEVICE) for _ in range(2)]
    layers[1].lora_B = layers[0].lora_B
    layers[1].x = layers[1].x.detach().roll(1, 0).requires_grad_()
    expected, streams = [step(layer) for layer in layers], [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    prepared_b.clear()
    with torch.cuda.stream(streams[0]):  # which makes the copy of B after that: the other has to wait for it
        torch.cuda._sleep(int(SLEEP * CLOCK_RATE))
    outputs = [[], []]
    for repeat in range(REPEATS):
        for layer, stream, results in zip(layers, streams, outputs, strict=True):
            with torch.cuda.stream(stream):
                if repeat == 1:  # what is set up once per stream exists, so neither waits for the other
                    torch.cuda._sleep(int(SLEEP * CLOCK_RATE))
                results.append(step(layer))
    torch.cuda.synchronize()
    for number, results in enumerate(outputs):
        for repeat, result in enumerate(results):
            same_bits(result, expected[number], f"stream {number}, repeat {repeat}")


@needs_gpu
def test_a_backward_follows_its_forward_to_another_stream():
    layer = adapted()
    expected, side, here = layer.step(), torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        torch.cuda._sleep(int(SLEEP * CLOCK_RATE))
        y = layer.module(layer.x)
    here.wait_stream(side)
    gradients = torch.autograd.grad(y, (layer.x, *layer.trained), layer.grad_output)
    same_bits([y, *gradients], expected, "a backward called from another stream")


COMPILERS = [
    pytest.param({"backend": "eager"}, id="eager"),
    pytest.param({"backend": "aot_eager"}, id="aot_eager"),
    pytest.param({"mode": "default"}, id="default", marks=needs_gpu),
    pytest.param({"mode": "reduce-overhead"}, id="reduce-overhead", marks=needs_gpu),
]


@each_layer
@pytest.mark.parametrize("how", COMPILERS)
def test_compile_fullgraph(how, rank, adapter):
    """Four calls: a warm-up, the recording of CUDA graphs, replays. ``fullgraph`` raises at a graph break.

    Prepared B and counters, made while the compiler warms up, must not stay in its graphs' memory.
    """
    torch.compiler.reset()
    layer = adapted(rank, adapter)
    expected = layer.step()
    prepared_b.clear()
    compiled = torch.compile(layer.module, fullgraph=True, dynamic=False, **how)
    for number in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        values = [tensor.clone() for tensor in layer.step(compiled)]  # the next call overwrites a graph's
        for what, value, eager in zip(OF_A_STEP, values, expected, strict=False):
            wrong, limit = error(value, eager), RELATIVE[DTYPE]
            assert wrong <= limit, (
                f"call {number}: {what} is {wrong:.2e} off the eager one, above {limit:.0e}"
            )


@needs_gpu
def test_a_model_under_reduce_overhead():
    """Layers that share counters and prepared B, in the graphs of a whole model."""
    torch.compiler.reset()
    prepared_b.clear()
    model = models.randomise(models.wrap(models.tiny_llama().to(DTYPE), rank=16, targets="all-linear"))
    model, tokens = model.to(DEVICE), torch.randint(0, 61, (2, 16), device=DEVICE)
    compiled = torch.compile(model, mode="reduce-overhead")

    def step(call) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        logits = call(tokens).logits
        logits.float().square().mean().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [tensor.detach().clone() for tensor in (logits, *grads)]

    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        replayed = step(compiled)
    for number, pair in enumerate(zip(replayed, step(model), strict=True)):
        wrong, limit = error(*pair), 5 * RELATIVE[DTYPE]
        assert wrong <= limit, f"result {number} is {wrong:.2e} off the eager one, above {limit:.0e}"


def test_a_checkpoint_draws_the_same_mask():
    """The seed is drawn by torch's generator, whose state is restored for the recomputation."""
    layer = adapted()
    without = layer.step()
    layer.module.lora_dropout["default"] = nn.Dropout(0.5)

    def step(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        return layer.step(call)

    plain = step(layer.module)
    same_bits(step(lambda x: checkpoint(layer.module, x, use_reentrant=False)), plain, "a checkpointed layer")
    assert not any(map(torch.equal, plain, without)), "nothing was dropped"
