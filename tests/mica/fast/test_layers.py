"""A layer of each kind against stock PEFT's own code: values, gradients, memory, dropout and compilation."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

import mica.fast
from mica.paths import dropout
from tests.support.layer_changes import layer_of
from tests.support.linear_calls import kept_by
from tests.support.models import INDICES, adapted_layers, net, randomise, wrap
from tests.support.stock import as_graph, as_stock, assert_same, both, counted, step
from tests.support.tolerances import RELATIVE, error

in_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def compare(model, tolerance):
    """The same model, backend on and off: outputs and gradients of A."""
    (out, grads), counts = counted(lambda: as_stock(lambda: step(model, INDICES), tolerance))
    assert counts["linear"]
    assert not any("lora_B" in name or "lora_embedding_B" in name for name in grads)
    return out


DTYPES = [(torch.float64, True), (torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]
DTYPES += [(torch.float16, True), (torch.float16, False)]  # of the base; whether the adapters are in fp32


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
@pytest.mark.parametrize(("dtype", "masters"), DTYPES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_parity_with_stock(monkeypatch, backend, dtype, masters, compute_dtype):
    """A layer of each kind. Triton's kernels are interpreted, none for fp64; the embedding has none."""
    kernels = 3 if backend == "triton" and dtype != torch.float64 else 0
    monkeypatch.setenv("MICA_BACKEND", "triton" if kernels else "reference")
    mica.fast.enable(compute_dtype=compute_dtype)
    model = randomise(net(dtype, autocast_adapter_dtype=masters))
    tolerance = (1 if dtype == torch.float64 else 3) * RELATIVE[dtype]
    _, counts = counted(lambda: compare(model, tolerance))
    assert counts.get("linear_kernels", 0) == counts.get("linear_backward_kernels", 0) == kernels
    assert counts["embedding"] == counts["embedding_backward"] == 1


@pytest.mark.parametrize("other", ["wrapped before the backend was on", "embed_scale"])
def test_parity_of_other_models(other):
    model = randomise(net(stock=other != "embed_scale"))
    if other == "embed_scale":
        model.base_model.model.embed.base_layer.embed_scale = torch.tensor(3.0)
    assert mica.fast.explain(model).counts() == {"reference": 4}
    compare(model, 3 * RELATIVE[torch.float32])


def test_compute_dtype_float32_has_stocks_products(monkeypatch):
    """Over a bf16 base; y, which is rounded once, is nearer to fp64."""
    mica.fast.enable(compute_dtype=torch.float32)
    model = randomise(net(torch.bfloat16, targets=["up", "conv", "down"]))
    (out, grads), (expected, expected_grads) = both(lambda: step(model, INDICES))
    with mica.fast.disabled():
        exact, _ = step(copy.deepcopy(model).double(), INDICES)
    assert error(out, exact) <= 1.1 * error(expected, exact)
    assert_same(grads, expected_grads, RELATIVE[torch.bfloat16])
    mica.fast.enable(compute_dtype=None)
    monkeypatch.setenv("MICA_NATIVE", "0")  # C++ has the number below already
    monkeypatch.setattr("mica.paths.products.FEW_TO_ROUND", 0)  # few tokens compute so by default
    coarse, _ = step(model, INDICES)
    assert (coarse != expected).any()  # the default computes in bf16: the setting does something


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_stock(base_dtype, autocast_dtype):
    model = randomise(net(base_dtype))
    with torch.autocast("cpu", autocast_dtype):
        out = compare(model, 3 * RELATIVE[torch.bfloat16])
    assert out.dtype == autocast_dtype


@pytest.mark.parametrize("is_called", [False, True])
def test_a_model_that_changes_outputs_in_place(is_called):
    """Falcon has a sum of outputs in place; also where hooks have its base layers called."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.FalconConfig(**sizes, attention_dropout=0.0, hidden_dropout=0.0)
    model = randomise(wrap(transformers.FalconForCausalLM(config), targets="all-linear"))
    for layer in adapted_layers(model).values() if is_called else ():
        layer.base_layer.register_forward_hook(lambda *_: None)
    assert mica.fast.explain(model).counts().keys() == {"reference"}
    ids, tolerances = torch.randint(3, 61, (2, 12)), (RELATIVE[torch.float32], 10 * RELATIVE[torch.float32])
    _, counts = counted(lambda: as_stock(lambda: step(model.eval(), input_ids=ids, labels=ids), *tolerances))
    assert "linear" in counts


def test_compile_fullgraph_follows_enable_and_disable():
    model = randomise(net(torch.bfloat16))
    compiled = as_graph(model.base_model.model)
    done, counts = counted(lambda: step(compiled, INDICES))
    assert counts["linear"] == 3
    out, grads = step(model.base_model.model, INDICES)
    grads = {f"_orig_mod.{name}": grad for name, grad in grads.items()}
    assert_same(done, (out, grads), 3 * RELATIVE[torch.bfloat16])
    with mica.fast.disabled():
        assert not counted(lambda: step(compiled, INDICES))[1]


@in_both_dtypes
@pytest.mark.parametrize("called", [False, True])
def test_dropout_is_drawn_from_torch_s_generator(dtype, called):
    """Inverted dropout of x, as nn.Dropout's; the mask is that of the seed, and nothing of it is stored."""
    layer = layer_of(dtype, lora_dropout=0.3)
    if called:
        layer.base_layer.weight.requires_grad_()
    x = torch.randn(200, 12).to(dtype).requires_grad_()
    torch.manual_seed(7)
    kept, out = kept_by(lambda: layer(x))
    assert not any(t.dtype == torch.bool for t in kept)
    torch.manual_seed(7)
    seed = torch.randint(0, 2**63 - 1, (1,))
    keep = dropout.dropout_keep(seed, 200, 12, 0.3)
    assert 0.66 <= keep.double().mean() <= 0.74
    dropped = torch.where(keep, x.double() / 0.7, 0.0)
    update = layer.get_delta_weight("default").double()
    expected = F.linear(x.double(), layer.base_layer.weight.double(), layer.base_layer.bias.double())
    assert error(out, expected + F.linear(dropped, update)) <= 2 * RELATIVE[dtype]
    assert not torch.equal(layer(x), out)  # the next call draws another mask
    layer.eval()
    as_stock(lambda: layer(x), 3 * RELATIVE[dtype])


def test_each_compiled_call_draws_another_mask():
    layer, x = layer_of(lora_dropout=0.5), torch.randn(5, 12)
    compiled = as_graph(layer)
    assert not torch.equal(compiled(x), compiled(x))
