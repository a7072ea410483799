"""What keeps a layer on PEFT's path, or its base layer called: it is said, and the numbers are PEFT's own."""

import functools
import types

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import mica.fast
from mica.fast.forward import eligibility
from tests.support.models import net, randomise
from tests.support.tolerances import RELATIVE, error

X = torch.randn(3, 12)


def up(model):
    return model.base_model.model.up


def _dropout(module):
    def change(model):
        up(model).lora_dropout["default"] = module

    return change


def _merged(model):
    up(model).merge()


def _disabled(model):
    model.base_model.disable_adapter_layers()


def _no_adapter(model):
    up(model).set_adapter("absent")


def _not_mica(model):
    up(model).lora_variant.clear()


def _hook_on(part):
    def change(model):
        layer = up(model)
        module = layer.base_layer if part == "base layer" else getattr(layer, part)["default"]
        module.register_forward_hook(lambda module, args, out: out * 2)

    return change


def _own_forward(model):
    base = up(model).base_layer
    base.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) + 1, base)


def _subclass(model):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    up(model).base_layer.__class__ = Doubling


def _weight_norm(model):
    parametrizations.weight_norm(up(model).base_layer)


def _trainable(part):
    def change(model):
        layer = up(model)
        tensors = {
            "base weight": layer.base_layer.weight,
            "base bias": layer.base_layer.bias,
            "lora_B": layer.lora_B["default"].weight,
        }
        tensors[part].requires_grad_()

    return change


def _lora_bias(model):
    up(model).lora_B["default"].bias = nn.Parameter(torch.ones(20))


def _bias_on_down_projection(model):
    up(model).lora_A["default"].bias = nn.Parameter(torch.ones(4))


def _own_dropout_forward(model):
    dropout = up(model).lora_dropout["default"]
    dropout.forward = lambda x: 2 * x


def _scaling(value):
    def change(model):
        up(model).scaling["default"] = value

    return change


def _sparse_down_projection(model):
    lora_A = up(model).lora_A["default"]
    lora_A.weight = nn.Parameter(lora_A.weight.detach().to_sparse())


def _partitioned(model):
    up(model).base_layer.weight.ds_id = 0


CASES = {
    "adapters are disabled": _disabled,
    "the adapter is merged into the weight": _merged,
    "none of the active adapters ['absent'] is on this layer": _no_adapter,
    "adapter 'default' is not MiCA": _not_mica,
    "dropout of type AlphaDropout": _dropout(nn.AlphaDropout(0.5)),
    "lora_dropout of 1": _dropout(nn.Dropout(1.0)),
    "hooks on the lora_A": _hook_on("lora_A"),
    "hooks on the lora_dropout": _hook_on("lora_dropout"),
    "the lora_dropout has a forward of its own": _own_dropout_forward,
    "the lora_B is trainable": _trainable("lora_B"),
    "lora_bias=True": _lora_bias,
    "a bias on the lora_A": _bias_on_down_projection,
    "its scaling is trained": _scaling(torch.tensor(2.0, requires_grad=True)),
    "its scaling is more than one number": _scaling(torch.rand(20)),
    "the lora_A has layout torch.sparse_coo": _sparse_down_projection,
}
CALLED = {
    "hooks on the base layer": _hook_on("base layer"),
    "the base layer has a forward of its own": _own_forward,
    "a base layer of type Doubling": _subclass,
    "a base layer of type ParametrizedLinear": _weight_norm,
    "the base weight is trainable": _trainable("base weight"),
    "the base bias is trainable": _trainable("base bias"),
    "the base weight is offloaded or partitioned": _partitioned,
}


def assert_peft_runs(model, x=X):
    before = mica.fast.call_counts.copy()
    torch.manual_seed(5)
    out = up(model)(x)
    assert mica.fast.call_counts == before
    torch.manual_seed(5)
    with mica.fast.disabled():
        assert torch.equal(out, up(model)(x))


@pytest.mark.parametrize("reason", CASES)
def test_layer_runs_on_peft_and_the_reason_is_said(reason):
    model = randomise(net(targets=["up"]))
    CASES[reason](model)
    (row,) = mica.fast.explain(model).rows
    assert row.path == "peft"
    assert row.reason.startswith(reason)
    assert_peft_runs(model)


@pytest.mark.parametrize("reason", CALLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_layer_is_called_and_the_adapter_is_ours(reason, dtype):
    model = randomise(net(dtype, targets=["up"]))
    CALLED[reason](model)
    (row,) = mica.fast.explain(model).rows
    assert row.path == "reference"
    assert f"base layer called: {reason}" in row.reason
    layer, x = up(model), X.to(dtype).requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def step():
        out = layer(x)
        return out, *torch.autograd.grad(out.float().square().sum(), [x, *trained])

    mica.fast.call_counts.clear()
    actual = step()
    for name in ("down_projection", "up_projection", "down_projection_backward", "up_projection_backward"):
        assert mica.fast.call_counts[name] == 1
    with mica.fast.disabled():
        expected = step()
    for ours, stock in zip(actual, expected, strict=True):
        assert ours.dtype == stock.dtype
        assert error(ours, stock) <= 3 * RELATIVE[dtype]


@pytest.mark.parametrize("part", [nn.Linear, nn.Dropout])
def test_a_forward_that_is_replaced_for_all_modules_runs(monkeypatch, part):
    model = randomise(net(targets=["up"], lora_dropout=0.5))
    expected = up(model)(X)
    stock = part.forward
    monkeypatch.setattr(part, "forward", lambda self, x: 2 * stock(self, x))
    (row,) = mica.fast.explain(model).rows
    assert (row.path, row.reason) == ("peft", f"{part.__name__}.forward has been monkey-patched")
    assert_peft_runs(model)
    monkeypatch.undo()
    assert mica.fast.explain(model).counts() == {"reference": 1}
    assert not torch.equal(up(model)(X), expected)  # another mask


def test_a_replaced_forward_of_conv1d_has_the_base_layer_called(monkeypatch):
    model = randomise(net(targets=["conv"]))
    stock, x = Conv1D.forward, torch.randn(3, 20)
    monkeypatch.setattr(Conv1D, "forward", lambda self, x: 2 * stock(self, x))
    (row,) = mica.fast.explain(model).rows
    assert "base layer called: Conv1D.forward has been monkey-patched" in row.reason
    out = model.base_model.model.conv(x)
    with mica.fast.disabled():
        assert error(out, model.base_model.model.conv(x)) <= RELATIVE[torch.float32]


@pytest.mark.parametrize(
    ("owner", "name", "called"),
    [
        (nn.Module, "__call__", "Module.__call__"),
        (nn.Linear, "__call__", "Linear.__call__"),
        (nn.functional, "linear", "torch.nn.functional.linear"),
    ],
)
def test_a_call_that_is_replaced_for_all_modules_runs(monkeypatch, owner, name, called):
    """Also where a compiled graph from before is called."""
    torch.compiler.reset()
    model = randomise(net(targets=["up"]))
    compiled = torch.compile(up(model), backend="aot_eager", fullgraph=True)
    expected = compiled(X)
    stock = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: 2 * stock(*args), raising=False)
    (row,) = mica.fast.explain(model).rows
    assert (row.path, row.reason) == ("peft", f"{called} has been monkey-patched")
    assert_peft_runs(model)
    with mica.fast.disabled():
        doubled = up(model)(X)
    assert error(compiled(X), doubled) <= RELATIVE[torch.float32]
    monkeypatch.undo()
    assert torch.equal(compiled(X), expected)
    assert mica.fast.explain(model).counts() == {"reference": 1}


def test_fx_s_own_call_while_it_traces_is_no_reason():
    layer = up(randomise(net(targets=["up"])))
    graph = make_fx(layer)(X)
    assert "mica.linear" in graph.code
    assert error(graph(X), layer(X)) <= RELATIVE[torch.float32]


def test_a_forward_that_was_replaced_before_the_import_is_known(monkeypatch):
    assert set(eligibility.FORWARDS.values()) == {kind.forward for kind in eligibility.FORWARDS}
    stock = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(stock)(lambda self, x: stock(self, x)))
    assert eligibility.own(nn.Linear) is None


INPUTS = {
    "nested": lambda x: torch.nested.nested_tensor([x, x[:2]]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
    "sparse": torch.Tensor.to_sparse,
    "sparse rows": torch.Tensor.to_sparse_csr,
    "mkldnn": torch.Tensor.to_mkldnn,
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR)")
def test_inputs_that_are_not_plain_are_peft_s(kind):
    model, x = randomise(net(targets=["up"])), INPUTS[kind](X)
    before = mica.fast.call_counts.copy()
    out = up(model)(x)
    with mica.fast.disabled():
        expected = up(model)(x)
    assert mica.fast.call_counts == before
    assert out.layout == expected.layout
    for ours, stock in zip(*map(_dense_parts, (out, expected)), strict=True):
        assert torch.equal(ours, stock)


def _dense_parts(out):
    if out.is_nested:
        return out.unbind()
    return [out.to_dense() if out.layout != torch.strided else out]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_traced_runs_without_this_package():
    """And so does what torch.onnx exports by tracing."""
    model = randomise(net())
    indices = torch.tensor([[1, 2, 3], [0, 7, 7]])
    traced = torch.jit.trace(model, indices)
    assert "mica::" not in str(traced.inlined_graph)
    before = mica.fast.call_counts["linear"]
    assert error(traced(indices), model(indices)) <= 3 * RELATIVE[torch.float32]
    assert mica.fast.call_counts["linear"] == before + 3  # the model's own, after tracing


@pytest.mark.parametrize("threads", [1, 2])
def test_adapters_made_in_inference_mode(monkeypatch, threads):
    """With two threads the solver's results come from threads that are not in that mode."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with torch.inference_mode():
        model = randomise(net(targets=["embed", "up"]))
        assert mica.fast.explain(model).counts() == {"reference": 2}
        expected = model(torch.tensor([1, 2]))
    rows = mica.fast.explain(model).rows
    assert [row.reason for row in rows] == ["the lora_A was made in inference mode"] * 2
    assert error(model(torch.tensor([1, 2])), expected) <= RELATIVE[torch.float32]


def test_global_hooks():
    model = randomise(net(targets=["up"]))
    handle = register_module_forward_hook(lambda module, args, out: None)
    try:
        assert mica.fast.explain(model).rows[0].reason == "global module hooks are registered"
        assert_peft_runs(model)
    finally:
        handle.remove()
    assert mica.fast.explain(model).counts() == {"reference": 1}


def test_input_cast_switched_off_is_peft_s_business():
    from peft.helpers import disable_input_dtype_casting

    model = randomise(net(torch.bfloat16, targets=["up"]))
    before = mica.fast.call_counts["linear"]
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        up(model)(X.bfloat16())
    assert mica.fast.call_counts["linear"] == before


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("max_norm", 1.0, "an embedding with max_norm"),
        ("sparse", True, "an embedding with scale_grad_by_freq or sparse gradients"),
        ("scale_grad_by_freq", True, "an embedding with scale_grad_by_freq or sparse gradients"),
    ],
)
def test_embeddings(attribute, value, reason):
    model = randomise(net(targets=["embed"]))
    setattr(model.base_model.model.embed.base_layer, attribute, value)
    (row,) = mica.fast.explain(model).rows
    assert (row.path, row.reason) == ("peft", reason)
    before = mica.fast.call_counts["embedding"]
    model.base_model.model.embed(torch.tensor([1, 2]))
    assert mica.fast.call_counts["embedding"] == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_double_embedding_stays_one_under_autocast(dtype):
    model = randomise(net(targets=["embed"])).double()
    before = mica.fast.call_counts["embedding"]
    with torch.autocast("cpu", dtype):
        out = model.base_model.model.embed(torch.tensor([1, 2]))
        with mica.fast.disabled():
            expected = model.base_model.model.embed(torch.tensor([1, 2]))
    assert mica.fast.call_counts["embedding"] == before
    assert out.dtype == torch.float64
    assert torch.equal(out, expected)


def test_an_embedding_s_adapter_of_two_dtypes_is_peft_s():
    model = randomise(net(targets=["embed"]))
    lora_A = model.base_model.model.embed.lora_embedding_A["default"]
    lora_A.data = lora_A.data.half()
    with pytest.raises(RuntimeError, match="same dtype"):
        model.base_model.model.embed(torch.tensor([1, 2]))
