"""One layer in 16 bit against the same layer in float32: forward + backward of mica.fast's operator, r = 16.

On processors without such instructions `mica.paths.products` takes 16-bit products through fp32;
``ONEDNN_MAX_CPU_ISA=AVX2`` makes an x86 processor that has them stand in for one that does not. ``native``:
whether the processor has products of the dtype that are used.
"""

import functools

import pytest
import torch

from bench.measure.clocks import seconds
from bench.measure.machine import DEVICE, ON_ACCELERATOR
from bench.results.names import FAST, FLOAT32
from bench.suites.harness import build_all, iterations, pick
from bench.suites.layer import Form, check_errors, exact, make_layer
from mica.ops import mica_linear
from mica.paths.products import has_native
from tests.support.tolerances import RELATIVE

pytestmark = pytest.mark.skipif(ON_ACCELERATOR, reason="it is about CPU instructions")
ROUNDS = pick(quick=3, default=7)
SHAPES = pick(
    quick=[(512, 576, 576)],
    default=[(64, 2048, 2048), (1024, 576, 576), (1024, 1536, 576), (1024, 2048, 2048)],
)
DTYPES = {FLOAT32: torch.float32, "mica.fast, bfloat16": torch.bfloat16, "mica.fast, float16": torch.float16}


def checked(shape, dtype):
    """A forward and backward, and how many calls make a sample."""
    layer = make_layer(*shape, 16, dtype, DEVICE)

    operands = layer.x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling
    form = Form(lambda: mica_linear(*operands), (layer.x, layer.lora_A))
    check_errors(FAST, form.errors(layer.grad_output, exact(layer)), RELATIVE[dtype])

    def call():
        return torch.autograd.grad(form.forward(), form.inputs, layer.grad_output)

    return call, iterations(seconds(call), sample=0.05)


@functools.lru_cache(maxsize=1)
def setting(shape, group):
    return build_all(group, DTYPES, lambda name: checked(shape, DTYPES[name]))


@pytest.mark.parametrize("implementation", DTYPES)
@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_dtype(once, gated, shape, round_, implementation):
    group = f"forward + backward of a layer, {'x'.join(map(str, shape))}, r = 16"
    call, count = gated(group, lambda: setting(shape, group), implementation)[implementation]
    tokens, out, inner = shape
    axes = {"suite": "dtype", "tokens": tokens, "out": out, "in": inner, "rank": 16}
    native = float(has_native(DTYPES[implementation]))
    once(call, group, implementation, axes, count, native=native)
