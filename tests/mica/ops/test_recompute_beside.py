"""What a layer's backward computes again instead of keeping it: edits, and who else uses these values."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.kept_layers import (
    Layer,
    as_saved,
    assert_same,
    check,
    gated,
    gradients,
    leaves,
    norm_weight,
    of_shared,
    rms_norm,
)
from tests.support.linear_calls import addresses, saved_by
from tests.support.tolerances import RELATIVE, error

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64

pytestmark = pytest.mark.usefixtures("way")


def edited_later(edit, dtype=FP32):
    """The gradient of A where ``edit(layer, gate, up, act, x)`` comes between forward and backward."""
    layer = Layer(dtype)
    gate, up = (leaf * 1 for leaf in leaves(dtype, dtype))
    act = F.silu(gate)
    x = act * up
    y = layer(x)
    with torch.no_grad():
        edit(layer, gate, up, act, x)
    return torch.autograd.grad(y.sum(), layer.lora_A)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda layer, gate, *_: gate.zero_(),
            r"^What SiluBackward0 keeps \(a tensor of shape \(5, 64\) and torch.float32\) was",
        ),
        (lambda layer, gate, up, *_: up.mul_(2), "^The second factor of a product .* Modify a clone of it"),
        (lambda layer, *_: layer.weight.zero_(), "the weight of an adapted layer has been modified"),
        (lambda layer, *_: layer.lora_A.zero_(), "the weight of an adapted layer has been modified"),
        (lambda layer, *_: layer.lora_B.zero_(), "the weight of an adapted layer has been modified"),
    ],
    ids=["gate", "up", "weight", "A", "B"],
)
def test_an_edit_of_what_is_needed_raises(edit, message):
    with pytest.raises(RuntimeError, match=message):
        edited_later(edit)


def norm_of(h, weight):
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True)))


def emptied(weight):
    weight.data = torch.empty(0)


EDITS = {  # of a norm's weight, which autograd does not count
    "its values": lambda weight: weight.data.mul_(2),
    "as FSDP2 reshards": lambda weight: weight.untyped_storage().resize_(0),
    "as DeepSpeed ZeRO-3 partitions": emptied,
}


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("when", ["before the layer", "after it"])
@pytest.mark.parametrize("name", EDITS)
def test_edits_of_a_norms_weight_after_the_norm(name, when, is_trained):
    """And where it has no memory when the layer is called, x is saved."""
    layer, found = Layer(), []
    for edit, change in ((EDITS[name], lambda x: x), (id, torch.clone)):
        (h,) = leaves(FP32)
        weight = norm_weight(FP32).requires_grad_(is_trained)
        x = norm_of(h, weight)
        if when == "before the layer" and name != "its values":  # which x would follow
            edit(weight)
        y = layer(change(x))
        edit(weight)
        found.append(torch.autograd.grad(y.sum(), layer.lora_A))
    assert_same(*found)


def test_a_step_of_the_optimizer_before_the_backward():
    """It raises, as without an adapter, because PyTorch's own nodes need the weight."""
    (h,) = leaves(FP32)
    weight = norm_weight(FP32).requires_grad_()
    y = Layer()(norm_of(h, weight))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("what", ["x", "act"])
def test_an_edit_of_what_is_not_needed_any_more_changes_nothing(what):
    expected = edited_later(lambda *_: None)
    assert_same(edited_later(lambda layer, gate, up, act, x: {"x": x, "act": act}[what].zero_()), expected)


def test_other_memory_for_an_operand_changes_nothing():
    """``parameter.data = other``: what the forward has seen is kept, as where x is saved."""
    expected = edited_later(lambda *_: None)

    def replace(layer, *_):
        for tensor in layer.weight, layer.lora_A, layer.lora_B:
            tensor.data = torch.full_like(tensor, torch.nan)

    assert_same(edited_later(replace), expected)


@pytest.mark.parametrize("what", ["x", "act", "factor"])
def test_an_edit_before_the_layer(what):
    """Then x is not the product of what is kept, or what is kept is not what it was: x is saved."""
    layer = Layer()
    gate, up = leaves(FP32, FP32)
    act = F.silu(gate)
    if what == "act":
        with torch.no_grad():
            act.mul_(2)
    x = act * up
    with torch.no_grad():
        {"x": x, "factor": act, "act": torch.empty(0)}[what].mul_(2)
    as_saved(lambda change: torch.autograd.grad(layer(change(x)).sum(), layer.lora_A))


# ---------------------------------------------------------------------------------------------------
# who else uses these values
# ---------------------------------------------------------------------------------------------------


def with_hooks(x, act, seen):
    for tensor in x, act:
        tensor.register_hook(seen.append)
    return 0


def with_retained(x, act, seen):
    x.retain_grad()
    act.retain_grad()
    return 0


OTHERS = {
    "x is used again": lambda x, act, seen: x.pow(2).sum(),
    "act(G) is used again": lambda x, act, seen: act.pow(2).sum() + act.exp().sum(),
    "hooks": with_hooks,
    "retain_grad": with_retained,
}


@pytest.mark.parametrize("when", ["before the layer", "after it"])
@pytest.mark.parametrize("name", OTHERS)
def test_others_that_need_the_same_values(name, when):
    layer = Layer()
    gate, up = leaves(FP32, FP32)

    def found(change):
        act = F.silu(gate)
        x = act * up
        seen = []
        more = OTHERS[name](x, act, seen) if when == "before the layer" else None
        y = layer(change(x)).sin().sum()
        more = OTHERS[name](x, act, seen) if more is None else more
        grads = torch.autograd.grad(y + more, (layer.lora_A, gate, up, x, act))
        return [*grads, *seen]

    as_saved(found)


def test_saved_tensor_hooks_get_x():
    layer = Layer()
    gate, up = leaves(FP32, FP32)
    x = gate * up
    saved, _ = saved_by(lambda: layer(x))
    assert saved == addresses(x, layer.weight, layer.lora_A, layer.lora_B)


def test_where_hooks_are_forbidden():
    inputs = leaves(FP32, FP32)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        check([Layer()], lambda: gated(*inputs), inputs)


def test_factors_that_hooks_have_packed():
    layer = Layer()
    gate, up = leaves(FP32, FP32)
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        x = gated(gate, up)
    layer(x)
    assert not unpacked


def test_a_product_whose_graph_is_freed():
    layer = Layer()
    gate, up = leaves(FP32, FP32)
    x = gate.sin() * up
    x.sum().backward()
    as_saved(lambda change: torch.autograd.grad(layer(change(x)).sum(), layer.lora_A))


SECOND = {
    "a gated MLP": gated,
    "a product of products": lambda gate, up: up * (gate.sin() * up),
    "a norm": norm_of,
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(name, way):
    if way == "kernels":
        pytest.skip("kernels do not compute in fp64")
    layer = Layer(FP64)
    gate, up = leaves(FP64, FP64)
    found = []
    for change in (lambda x: x, torch.clone):
        x = SECOND[name](gate, up)
        y = layer(change(x)).sin().sum()
        first = torch.autograd.grad(y, (layer.lora_A, gate), create_graph=True)
        inputs = layer.lora_A, gate, up, x
        found.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), inputs))
    for ours, expected in zip(*found, strict=True):
        assert error(ours, expected) <= RELATIVE[FP64]


def test_a_checkpoint_does_not_compute_the_last_product_again(way):
    """As with F.linear: by then all is saved."""
    if way != "C++":
        pytest.skip("from Python a layer saves what it needs after its products")
    layer, (x,) = Layer(), leaves(FP32)
    counts = []
    for block in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        y = block(x).sum()
        with torch.profiler.profile() as profiler:
            y.backward()
        counts.append(sum(event.name in ("aten::mm", "aten::addmm") for event in profiler.events()))
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [rms_norm, gated], ids=["norm", "product"])
@pytest.mark.parametrize("number", [1, 3])
def test_compiled_autograd(number, make):
    for _ in range(2):  # the second backward is the compiled one of the first
        ys, layers = of_shared(number, make)
        (expected, *_) = gradients(sum(ys), layers[0].lora_A)
        ys, layers = of_shared(number, make)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            sum(ys).float().sin().sum().backward()
        assert torch.equal(layers[0].lora_A.grad, expected)


def test_a_norm_whose_32_bits_were_edited():
    """They are no 16-bit number any more, from which they could be made again."""
    (h,) = leaves(torch.bfloat16)

    def make():
        wide = h.float()
        with torch.no_grad():
            wide.mul_(1 + 2**-12)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return norm_weight(h.dtype) * normed.to(h.dtype)

    check([Layer(torch.bfloat16)], make, [h])
