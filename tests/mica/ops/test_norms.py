"""A LayerNorm's output is computed again only by the norm that has made it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mica.ops import norms, recompute
from mica.ops.computed import nodes_before
from tests.support.kept_layers import IN, Layer, check, leaves

BF16, FP32 = torch.bfloat16, torch.float32


def noted(eps=1e-5, **options):
    """A model of one norm, whose statistics show its eps."""
    norm = nn.LayerNorm(IN, eps, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norms.note(norm)
    return norm


def small(dtype=FP32):
    (h,) = leaves(FP32)
    return (1e-3 * h.detach()).to(dtype).requires_grad_()


def is_computed_again(norm, h):
    x = norm(h)
    computed = recompute.arrange(x)
    if computed is not None:
        assert torch.equal(computed.value(None), x)
    return computed is not None


def test_a_row_of_nan_is_no_other_eps():
    norm, h = noted(), small()
    assert is_computed_again(norm, h)
    h.data[1] = float("nan")
    assert recompute.arrange(norm(h)).value(None)[1].isnan().all()


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 3e-5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_whatever_its_eps(dtype, bias, eps):
    norm = noted(eps, bias=bias)
    h = small(dtype)
    check([Layer(dtype)], lambda: norm.to(dtype)(h), [h])
    assert is_computed_again(norm, h)


def test_an_eps_that_is_changed():
    norm = noted(1e-5)
    for eps in (1e-5, 1e-6, 1e-5):
        norm.eps = eps
        assert is_computed_again(norm, small())


def test_its_bits_are_compared_once(monkeypatch):
    norm, compared, equal = noted(), [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda *tensors: compared.append(tensors) or equal(*tensors))
    for _ in range(3):
        recompute.arrange(norm(small()))
    assert len(compared) == 1


def by_a_call_of_its_own(norm, h):
    return F.layer_norm(h, (IN,), norm.weight, norm.bias, 1e-6)


def by_a_norm_with_its_weight(norm, h):
    other = nn.LayerNorm(IN, 1e-6)
    other.weight, other.bias = norm.weight, norm.bias
    return other(h)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("compute", [by_a_call_of_its_own, by_a_norm_with_its_weight])
def test_another_eps_once_the_norm_s_own_is_proven_is_an_error(compute, dtype):
    """Its first output had the bits of the module's eps, later ones have not."""
    norm, layer, h = noted(1e-5).to(dtype), Layer(dtype), small(dtype)
    assert is_computed_again(norm, h)
    y = layer(compute(norm, h))
    with pytest.raises(RuntimeError, match="its eps was not that of"):
        y.sum().backward()


def of_another_eps():
    norm = noted(1e-5)
    norm.forward = lambda h: F.layer_norm(h, (IN,), norm.weight, norm.bias, 1e-6)
    return norm


def of_a_shared_weight():
    norm, other = noted(1e-5), noted(1e-6)
    other.weight = norm.weight
    norm.beside = other
    return norm


def of_another_weight():
    norm = noted()
    is_computed_again(norm, small())
    norm.forward = nn.LayerNorm(IN, eps=1e-6).forward
    return norm


def of_two_dimensions():
    norm = nn.LayerNorm((5, IN))
    norms.note(norm)
    return norm


def whose_weight_is_replaced():
    norm = noted(1e-6)
    weight = norm.weight
    is_computed_again(norm, small())
    norm.weight = nn.Parameter(weight.detach().clone())
    norm.forward = lambda h: F.layer_norm(h, (IN,), weight, norm.bias, 1e-5)
    return norm


NOT_KNOWN = {
    "its model was not noted": lambda: nn.LayerNorm(IN),
    "it has no weight": lambda: noted(elementwise_affine=False),
    "its forward takes another eps": of_another_eps,
    "another norm has its weight": of_a_shared_weight,
    "it takes another weight": of_another_weight,
    "it has another weight now": whose_weight_is_replaced,
    "it is over two dimensions": of_two_dimensions,
}


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_else_x_is_saved(name):
    norm = NOT_KNOWN[name]()
    h = small()
    assert not is_computed_again(norm, h)
    check([Layer()], lambda: norm(h), [h])


def test_a_weight_is_not_read_after_the_layer():
    """Optimizers edit it without a count, and FSDP2 takes its memory away; without memory, x is saved."""
    norm, layer, h = noted(), Layer(), small()
    x = norm(h)
    (expected,) = torch.autograd.grad(layer(x.clone()).sum(), layer.lora_A)
    y, again = layer(x), norm(h)
    norm.weight.data.mul_(2)
    norm.bias.untyped_storage().resize_(0)
    assert torch.equal(torch.autograd.grad(y.sum(), layer.lora_A)[0], expected)
    assert recompute.arrange(again) is None


def test_the_look_at_a_graph_ends():
    (h,) = leaves(FP32)
    x = h
    for _ in range(500):
        x = x.sin()
    assert len(list(nodes_before(x.grad_fn, 64))) == 64
