"""What becomes of a layer's tensors around its call: other weights, scalings, large numbers, odd inputs."""

from contextlib import nullcontext

import pytest
import torch

from mica import native
from tests.support.layer_changes import layer_of
from tests.support.processor import has_instructions
from tests.support.stock import as_stock, counted
from tests.support.tolerances import RELATIVE

pytestmark = pytest.mark.usefixtures("language")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaling_that_is_a_tensor_is_not_rounded(dtype):
    """1.3 in bf16 is 0.24 % less, and so would be every update."""
    layer = layer_of(dtype, autocast_adapter_dtype=False, rank=12)
    layer.scaling["default"] = torch.tensor(1.3)
    A = layer.lora_A["default"].weight
    x = torch.eye(12, dtype=dtype).repeat(200, 1)
    with torch.no_grad():
        A.normal_(generator=torch.Generator().manual_seed(4))
        layer.base_layer.weight.zero_(), layer.base_layer.bias.zero_()
        y, counts = counted(lambda: layer(x).double())
    assert counts["linear"]
    update = 1.3 * x.double() @ A.double().t() @ layer.lora_B["default"].weight.double().t()
    assert abs(((y - update) * update).sum() / update.square().sum()) <= 1e-3


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("is_called", [False, True], ids=["fused", "called"])
def test_fp16_overflows_nowhere_where_stock_does_not(monkeypatch, adapter, backend, is_called):
    """h and its gradient are beyond 65504, over fp32 masters; second derivatives have them, too."""
    has_instructions(True, monkeypatch)  # or no fp16 is multiplied by C++
    monkeypatch.setenv("MICA_BACKEND", backend)
    layer = layer_of(torch.float16, adapter, lora_alpha=1024)
    if is_called:
        layer.base_layer.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.normal_(0, 0.01)
    x, dy = (30000 * torch.eye(20, 12)).half().requires_grad_(), 10000 * torch.randn(20, 20).half()
    inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]

    def derivatives():
        y = layer(x)
        first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        _, grad_A, *_ = torch.autograd.grad(y, inputs, dy, create_graph=True)
        return y, *first, *torch.autograd.grad(grad_A.sum(), x, 1e-6 * torch.ones([]))

    _, counts = counted(lambda: as_stock(derivatives, RELATIVE[torch.float16]))
    assert ("linear_backward_kernels" in counts) == (backend == "triton")


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad])
def test_an_input_without_dimensions_is_named(around):
    with (
        around(),
        pytest.raises(ValueError, match=r"must be \(\.\.\., in_features\), but it has no dimensions"),
    ):
        layer_of()(torch.tensor(1.0))


HELD = []
WATCHED = {
    "nobody": lambda out: None,
    "who keeps it": HELD.append,
    "who keeps a view": lambda out: HELD.append(out[0]),
    "who keeps its memory": lambda out: HELD.append(out.detach()),
    "who wants its gradient": lambda out: out.retain_grad(),
    "who hooks its gradient": lambda out: out.register_hook(lambda grad: None) and None,
}


@pytest.mark.parametrize("who", WATCHED)
def test_the_output_of_a_called_base_is_written_into_where_nobody_else_sees_it(who):
    layer, x, seen = layer_of(), torch.randn(5, 12, requires_grad=True), []

    def hook(module, args, out):
        seen.extend([out.data_ptr(), out.detach().clone()])
        WATCHED[who](out)

    layer.base_layer.register_forward_hook(hook)
    as_stock(lambda: (y := layer(x), *torch.autograd.grad(y.square().sum(), x)), RELATIVE[torch.float32])
    HELD.clear()
    seen.clear()
    y = layer(x)
    place, before = seen
    assert (y.data_ptr() == place) == (who == "nobody" and native.module() is not None)
    for held in HELD:
        assert torch.equal(held, before if held.shape == before.shape else before[0])
    HELD.clear()
