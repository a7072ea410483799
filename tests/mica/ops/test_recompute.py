"""What a layer's backward computes again instead of keeping it: bytes and bits."""

import gc

import pytest
import torch
import torch.nn.functional as F

from bench.measure.memory import alive_bytes
from mica.ops import mica_experts_linear, norms, recompute
from tests.support.kept_layers import (
    IN,
    TOKENS,
    Layer,
    as_saved,
    check,
    gated,
    gradients,
    leaves,
    norm_weight,
    rms_norm,
)
from tests.support.linear_calls import adapted

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.usefixtures("way")


def test_over_a_weight_of_inference_mode_pytorch_says_what_helps(request):
    layer, (gate, up) = Layer(), leaves(FP32, FP32)
    with torch.inference_mode():
        layer.weight = layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"use `torch.no_grad\(\)` instead"):
        layer(gated(gate, up))


def offset_norm(h, _=None, eps=1e-6):
    """Gemma's: the product is in fp32, and what is cast is the whole."""
    wide = h.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    weight = torch.linspace(-0.5, 1, IN).to(h.dtype)
    return (wide * rstd * (1.0 + weight.float())).type_as(h)


def squared_relu(gate):
    return F.relu(gate).square()


class LigerSiLUMulFunction(torch.autograd.Function):
    """Liger's contract: it keeps two matrices and numbers, and its backward overwrites the matrices."""

    @staticmethod
    def forward(ctx, gate, up, gate_multiplier=1.0, down_multiplier=1.0):
        ctx.gate_multiplier, ctx.down_multiplier = gate_multiplier, down_multiplier
        rows, factors = gate.view(-1, gate.shape[-1]), up.view(-1, up.shape[-1])
        ctx.save_for_backward(rows, factors)
        return (F.silu(rows * gate_multiplier) * factors * down_multiplier).view(gate.shape)

    @staticmethod
    def backward(ctx, grad):
        rows, factors = ctx.saved_tensors
        with torch.enable_grad():
            inputs = rows.detach().clone().requires_grad_(), factors.detach().clone().requires_grad_()
            product = F.silu(inputs[0] * ctx.gate_multiplier) * inputs[1] * ctx.down_multiplier
        grads = torch.autograd.grad(product, inputs, grad.view(product.shape))
        for kept_one, written in zip((rows, factors), grads, strict=True):
            kept_one.data.copy_(written)  # no version shows what a kernel writes
        return rows.view(grad.shape), factors.view(grad.shape), None, None


def of_liger(gate, up):
    # of its backward's copies: it would overwrite the test's own
    return LigerSiLUMulFunction.apply(gate * 1, up * 1, 1.5, 0.5)


def of_liger_scaled(gate, up):
    """In three dimensions, where Liger keeps matrices."""
    both = torch.stack([gate, up])
    return LigerSiLUMulFunction.apply(both * 1, both * 2) * gate


def exact_gelu_tanh(gate):
    return F.gelu(gate, approximate="tanh")


def written_out_gelu(gate, _):
    """GELU by tanh, as GPT-2 and Phi-2 have it."""
    return 0.5 * gate * (1.0 + torch.tanh(0.8 * (gate + 0.044715 * torch.pow(gate, 3.0))))


def attention_of(q, k, v):
    heads = [t.view(1, TOKENS, 4, -1).transpose(1, 2) for t in (q, k, v)]
    output = F.scaled_dot_product_attention(heads[0].contiguous(), *heads[1:])
    return output.transpose(1, 2).contiguous().view(TOKENS, IN)


def attention_of_a_joint_product(gate, up):
    """Only v is a view of what the product of q, k and v gives."""
    q, k, v = torch.cat([gate, up, gate], -1).chunk(3, -1)
    return attention_of(q * 2, k * 2, v)


MADE = {  # x of two tensors, and how many tensors of its size and dtype are kept with and without the adapter
    "silu(G)·U": (gated, 0, 1),
    "U·gelu(G)": (lambda gate, up: up * F.gelu(gate), 0, 1),
    "gelu-tanh(G)·U": (lambda gate, up: exact_gelu_tanh(gate) * up, 0, 1),
    "relu(G)²·U": (lambda gate, up: squared_relu(gate) * up, 1, 2),
    "silu(G)·U in three dimensions": (lambda gate, up: F.silu(gate[None]) * up[None], 0, 1),
    "gelu(G)": (lambda gate, _: F.gelu(gate), 0, 0),
    "relu(G)²": (lambda gate, _: squared_relu(gate), 1, 1),
    "gelu(G), written out": (written_out_gelu, 2, 3),
    "attention": (lambda gate, up: attention_of(gate, up, up), 2, 2),
    "attention of a joint product": (attention_of_a_joint_product, 4, 6),
    "a product in another shape": (lambda h, weight: weight[0] * h.sin(), 1, 1),
    "Liger's": (of_liger, 2, 2),
    "Liger's, times a tensor": (of_liger_scaled, 2, 3),
}
NORM = torch.nn.LayerNorm(IN, eps=1e-4)
for _parameter in NORM.parameters():
    torch.nn.init.normal_(_parameter)
norms.note(NORM)


def layer_norm(h, _=None):
    return NORM.to(h.dtype)(h)


NORMS = {  # the same, in 32 and in 16 bits
    "a LayerNorm": (layer_norm, (0, 0), (0, 0)),
    "a norm that feeds no layer": (lambda h, _: rms_norm(h) + h, (1, 0), (2, 2)),
    "a norm": (rms_norm, (0, 0), (1, 2)),
    "a norm whose weight is offset": (offset_norm, (0, 0), (1, 2)),
    "a norm scaled by a number": (lambda gate, up: 2.5 * (gate * up), (0, 0), (0, 0)),
}
STATISTICS = {  # of an RMS norm, over parts and views of its input (tokens, features)
    "all features": lambda h: h.pow(2).mean(-1, keepdim=True),
    "half of the features": lambda h: h[:, : IN // 2].pow(2).mean(-1, keepdim=True),
    "the first feature": lambda h: h[:, :1].pow(2),
    "the first token": lambda h: h[:1].pow(2).mean(-1, keepdim=True),
    "the first two tokens": lambda h: h[:2].pow(2).mean(),
    "heads": lambda h: h.view(TOKENS, 4, -1).pow(2).mean((-1, -2))[:, None],
    "a transpose": lambda h: h.t().pow(2).mean(0)[:, None],
    "columns for rows": lambda h: h.view(IN, TOKENS).t().pow(2).mean(-1, keepdim=True),
    "one row": lambda h: h.view(-1).pow(2).mean(),
    "the negative": lambda h: torch._neg_view(h).pow(2).mean(-1, keepdim=True),
}
SAVED = {  # and how many tensors like x are kept; relu(G) would be anyway
    "a copy": (lambda gate, up: gated(gate, up).clone(), 2),
    "times a Python number": (lambda h, _: h * 2.5, 1),
    "relu(G)": (lambda gate, _: F.relu(gate), 1),
}
in_each_dtype = pytest.mark.parametrize("dtype", [FP32, BF16, FP16])


def kept_sizes(call, make, number):
    """How many tensors like x are alive after the forward of so many layers, beside their outputs."""
    x = make()
    outputs = number * call(0, x).nbytes

    def forward():
        made = make()
        outputs = [call(i, made) for i in range(number)]
        gc.collect()  # the cycles that Triton's interpreter leaves hold its arguments
        return outputs

    # What is freed meanwhile would count: those cycles, and what other tests have left, which is put out of
    # reach (to search it takes a second in a long session).
    gc.freeze()
    try:
        alive = max(alive_bytes(forward) for _ in range(2))
    finally:
        gc.unfreeze()
    return (alive - outputs) // x.nbytes


def check_sizes(make, dtype, number, way, expected):
    """Bits and bytes; ``expected``: sizes that are kept with and without the adapter."""
    layers = [Layer(dtype, seed) for seed in range(number)]
    inputs = leaves(dtype, dtype)
    made = lambda: make(*inputs)  # noqa: E731
    ours = kept_sizes(lambda i, x: layers[i](x), made, number)
    bare = kept_sizes(lambda i, x: F.linear(x, layers[i].weight), made, number)
    if way == "kernels":  # what Triton's interpreter has left behind may be freed meanwhile
        assert (ours, bare) <= expected
    else:
        assert (ours, bare) == expected
    check(layers, made, inputs)


def check_kept(make, kept):
    """So many tensors like x, of one layer in fp32; and the bits."""
    layer, inputs = Layer(), leaves(FP32, FP32)
    made = lambda: make(*inputs)  # noqa: E731
    assert kept_sizes(lambda _, x: layer(x), made, 1) == kept
    check([layer], made, inputs)


@pytest.mark.parametrize("number", [1, 3])
@in_each_dtype
@pytest.mark.parametrize("name", MADE)
def test_it_keeps_less_and_gives_the_same_bits(name, dtype, number, way):
    """For one layer, and for several that share an x."""
    make, *expected = MADE[name]
    check_sizes(make, dtype, number, way, tuple(expected))


@pytest.mark.whole  # in 16 bits h is narrow
@in_each_dtype
@pytest.mark.parametrize("name", NORMS)
def test_so_does_the_output_of_a_norm(name, dtype, way):
    make, *expected = NORMS[name]
    check_sizes(make, dtype, 2, way, tuple(expected[dtype is not FP32]))


@pytest.mark.parametrize(
    ("name", "rounded_to"),
    [*((name, BF16) for name in STATISTICS), ("all features", FP32), ("all features", FP16)],
)
def test_a_norm_by_a_part_or_a_view_of_its_input(name, rounded_to):
    """The node of the square keeps another tensor than that of the product, in the same memory.

    Or it is rounded to another dtype than that of x.
    """
    inputs = leaves(BF16)

    def make():
        wide = inputs[0].float()
        normed = wide * torch.rsqrt(STATISTICS[name](wide) + 1e-6)
        return (norm_weight(BF16) * normed.to(rounded_to)).to(BF16)

    check([Layer(BF16)], make, inputs)


@pytest.mark.parametrize("make", [rms_norm, offset_norm])
def test_a_norm_of_subnormal_numbers(make):
    (h,) = leaves(FP32)
    x = make((h.detach() * 1e-39).to(BF16).requires_grad_(), eps=1.0)
    assert 0 < x.abs().max() < torch.finfo(BF16).tiny
    assert torch.equal(recompute.arrange(x).value(None), x)


@pytest.mark.parametrize(("small", "kept"), [(TOKENS * IN, 0), (TOKENS * IN + 1, 2)])
def test_a_small_x_is_saved(small, kept, monkeypatch):
    """And so is act(G)."""
    monkeypatch.setattr(recompute, "MIN_NUMBERS", small)
    check_kept(gated, kept)


def test_an_x_that_comes_again_after_another():
    """Then act(G) is not kept any more, but computed already."""
    gate, up = leaves(FP32, FP32)
    layer = Layer()

    def forward():
        x, other = gated(gate, up), gated(up, gate)
        return [layer(x), layer(other), layer(x)]

    outputs = sum(y.nbytes for y in forward())
    assert alive_bytes(forward) - outputs < gate.nbytes


@pytest.mark.parametrize("name", SAVED)
def test_any_other_x_is_saved(name):
    check_kept(*SAVED[name])


def test_a_norm_is_saved_where_only_activations_are_computed_again(monkeypatch):
    monkeypatch.setattr(recompute, "_norms", False)
    check_kept(rms_norm, 1)


def test_a_cast_to_another_device_is_saved():
    gate, up = leaves(FP32, FP32)
    assert recompute.arrange((gate * up).to(BF16)) is not None
    assert recompute.arrange((gate * up).to("meta")) is None


def test_what_autocast_casts(way):
    layer = Layer(BF16)
    gate, up = leaves(FP32, FP32)

    def found(change):
        with torch.autocast("cpu", BF16):
            y = layer(change(gated(gate, up)), BF16)
        return gradients(y, layer.lora_A, gate, up)

    as_saved(found)


def test_dropout():
    inputs = leaves(BF16, BF16)
    check([Layer(BF16, dropout=True)], lambda: gated(*inputs), inputs)


def test_beside_a_called_base_layer_and_experts(way):
    """Their x is that of the same MLPs."""
    gate, up = leaves(FP32, FP32)
    layer = Layer()
    offsets = torch.tensor([2, TOKENS])
    stack = [t.detach().expand(2, *t.shape).contiguous() for t in (layer.weight, layer.lora_A, layer.lora_B)]
    stack[1].requires_grad_()
    calls = {
        layer.lora_A: lambda x: adapted(
            x.new_zeros(len(x), len(layer.lora_B)), x, layer.lora_A, layer.lora_B
        ),
        stack[1]: lambda x: mica_experts_linear(x, offsets, *stack, 0.5),
    }
    for lora_A, call in calls.items():
        if way != "kernels":  # Triton's interpreter leaves cycles that hold its arguments
            assert kept_sizes(lambda _, x: call(x), lambda: gated(gate, up), 1) == 0  # noqa: B023
        as_saved(lambda change: gradients(call(change(gated(gate, up))), lora_A, gate, up))  # noqa: B023
