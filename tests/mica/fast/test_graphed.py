"""CUDA graphs: replays give what runs eagerly. On a GPU alone (MICA_TEST_DEVICE=cuda).

What of it a CPU can show (who allocates what is kept, and when a device is tried) is in tests/kernels.
"""

import pytest
import torch

import mica.fast
from mica.kernels import prepared
from tests.support.kernel_cases import DEVICE
from tests.support.models import net, randomise, tiny_llama, wrap
from tests.support.tolerances import RELATIVE, error

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU (MICA_TEST_DEVICE=cuda)")


def step(model, *inputs):
    model.zero_grad(set_to_none=True)
    out = model(*inputs)
    out = getattr(out, "logits", out)
    out.float().square().mean().backward()
    return [out.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("rank", [4, 16])  # B is copied and padded, and used as it is
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduce_overhead(dtype, rank):
    """Prepared B and counters, made while the compiler warms up, must not stay in its graphs' memory."""
    torch.compiler.reset()
    prepared.forget()
    model = randomise(wrap(tiny_llama().to(dtype), rank=rank, targets="all-linear")).to(DEVICE)
    tokens = torch.randint(0, 61, (2, 16), device=DEVICE)
    compiled = torch.compile(model, mode="reduce-overhead")
    for _ in range(4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        replayed = step(compiled, tokens)
    for ours, eager in zip(replayed, step(model, tokens), strict=True):
        assert error(ours, eager) <= 5 * RELATIVE[dtype]


@pytest.mark.parametrize("rank", [4, 16])
def test_make_graphed_callables(rank):
    model = randomise(net(torch.bfloat16, targets=["up"], rank=rank)).to(DEVICE)
    layer = model.base_model.model.up
    x = torch.randn(40, 12, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    expected = step(layer, x), x.grad.clone()
    x.grad = None
    before = mica.fast.call_counts["linear_kernels"]
    graphed = torch.cuda.make_graphed_callables(layer, (x.detach().clone().requires_grad_(),))
    assert mica.fast.call_counts["linear_kernels"] > before
    for _ in range(3):
        x.grad = None
        for ours, eager in zip((*step(graphed, x), x.grad), (*expected[0], expected[1]), strict=True):
            assert error(ours, eager) <= RELATIVE[torch.bfloat16]
