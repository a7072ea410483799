import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import mica.fast
from mica.paths import torch_path
from tests.support.models import gradients, net, randomise, tiny_gpt2, tiny_llama, wrap
from tests.support.stock import as_stock, both, counted, step
from tests.support.tolerances import RELATIVE, error

INDICES = torch.tensor([[1, 2, 3, 28], [0, 7, 7, 3]])


def compare(model, tolerance, indices=INDICES):
    """The same model, backend on and off: outputs and gradients of A."""
    (out, grads), counts = counted(lambda: as_stock(lambda: step(model, indices), tolerance))
    assert counts["linear"]
    assert not any("lora_B" in name or "lora_embedding_B" in name for name in grads)
    return out


@pytest.mark.parametrize("stock", [False, True], ids=["wrapped after", "wrapped before the backend was on"])
def test_parity_with_stock_fp32(stock):
    compare(randomise(net(stock=stock)), 3 * RELATIVE[torch.float32])


def test_parity_with_stock_fp64():
    model = net().double()
    compare(randomise(model), RELATIVE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False], ids=["fp32 masters", "16-bit adapters"])
def test_parity_with_stock_16_bit(dtype, autocast_adapter_dtype):
    model = net(dtype, autocast_adapter_dtype=autocast_adapter_dtype)
    compare(randomise(model), 3 * RELATIVE[dtype])


def test_compute_dtype_float32_is_stocks_arithmetic(monkeypatch):
    """Over a bf16 base: the same roundings at the same places, so nearly always the same bits."""
    mica.fast.enable(compute_dtype=torch.float32)
    model = randomise(net(torch.bfloat16, targets=["up", "conv", "down"]))
    (out, grads), (expected, expected_grads) = both(lambda: step(model, INDICES))
    assert (out != expected).float().mean() <= 0.02
    for name, grad in grads.items():
        assert error(grad, expected_grads[name]) <= 0.1 * RELATIVE[torch.bfloat16], name
    mica.fast.enable()
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


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_transformers_models(build):
    targets = ["c_attn", "c_fc", "c_proj"] if build is tiny_gpt2 else "all-linear"
    model = randomise(wrap(build(), targets=targets, fan_in_fan_out=build is tiny_gpt2))
    assert mica.fast.explain(model).counts().keys() == {"reference"}
    compare(model.eval(), 10 * RELATIVE[torch.float32], torch.randint(0, 61, (2, 9)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = randomise(net())
    embedded = torch.randn(5, 12, requires_grad=True)
    layer = model.base_model.model.up
    layer(embedded).sum().backward()
    expected, expected_x = gradients(model), embedded.grad.clone()
    model.zero_grad(set_to_none=True)
    embedded.grad = None
    checkpoint(layer, embedded, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(embedded.grad, expected_x)
    for name, grad in gradients(model).items():
        assert torch.equal(grad, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_fullgraph_follows_enable_and_disable(dtype):
    torch.compiler.reset()
    model = randomise(net(dtype))
    expected, expected_grads = step(model, INDICES)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (out, grads), counts = counted(lambda: step(compiled, INDICES))
    assert counts["linear"] == 3
    assert error(out, expected) <= 3 * RELATIVE[dtype]
    for name, grad in grads.items():
        assert error(grad, expected_grads[name.removeprefix("_orig_mod.")]) <= 3 * RELATIVE[dtype], name
    with mica.fast.disabled():
        assert not counted(lambda: step(compiled, INDICES))[1]


def test_scaling_as_a_tensor():
    """What `prepare_model_for_compiled_hotswap` makes of the scaling."""
    model = randomise(net())
    expected, expected_grads = step(model, INDICES)
    for layer in model.modules():
        if hasattr(layer, "lora_variant"):
            layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    assert mica.fast.explain(model).counts() == {"reference": 4}
    out, grads = step(model, INDICES)
    assert error(out, expected) <= RELATIVE[torch.float32]
    for name, grad in grads.items():
        assert error(grad, expected_grads[name]) <= RELATIVE[torch.float32]


def test_embed_scale():
    model = randomise(net())
    model.base_model.model.embed.base_layer.embed_scale = torch.tensor(3.0)
    compare(model, 3 * RELATIVE[torch.float32])


def test_padding_index_is_not_trained():
    model = randomise(net())
    _, grads = step(model, INDICES)
    (grad,) = [grad for name, grad in grads.items() if "lora_embedding_A" in name]
    assert (grad[:, 3] == 0).all()
    assert (grad[:, 7] != 0).all()


def test_saves_x_as_it_came_and_nothing_wider():
    """bf16 base, fp32 masters: stock keeps an fp32 copy of x at every layer, the backend x itself."""
    model = randomise(net(torch.bfloat16, targets=["up"]))
    x = torch.randn(6, 12, dtype=torch.bfloat16, requires_grad=True)
    layer = model.base_model.model.up

    def saved_tokens():
        saved = {}
        pack = lambda t: saved.setdefault((t.data_ptr(), t.dtype), t)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        return [t for t in saved.values() if 6 in t.shape]

    ours = saved_tokens()
    assert [t.data_ptr() for t in ours] == [x.data_ptr()]
    with mica.fast.disabled():
        assert any(t.dtype == torch.float32 for t in saved_tokens())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_active_adapters(dtype):
    model = randomise(net(dtype, targets=["up", "conv", "down"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up"], init_lora_weights="mica"))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    _, counts = counted(lambda: compare(model, 3 * RELATIVE[dtype]))
    assert (counts["linear"], counts["up_projection"]) == (3, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("called", [False, True])
def test_dropout_is_drawn_from_torch_s_generator(dtype, called):
    """Inverted dropout of x, as nn.Dropout's; the mask is that of the seed, and nothing of it is stored."""
    model = randomise(net(dtype, targets=["up"], lora_dropout=0.3))
    layer = model.base_model.model.up
    if called:
        layer.base_layer.weight.requires_grad_()
    x = torch.randn(200, 12).to(dtype).requires_grad_()
    saved = []
    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    assert not any(t.dtype == torch.bool for t in saved)
    grads = torch.autograd.grad(out.float().square().sum(), [x, layer.lora_A["default"].weight])

    torch.manual_seed(7)
    seed = torch.randint(0, 2**63 - 1, (1,))
    keep = torch_path.dropout_keep(seed, 200, 12, 0.3)
    assert 0.66 <= keep.double().mean() <= 0.74
    x64, A = x.detach().double().requires_grad_(), layer.lora_A["default"].weight.detach().double()
    A.requires_grad_()
    base, lora_B = layer.base_layer, layer.lora_B["default"].weight.double()
    dropped = torch.where(keep, x64 / 0.7, 0.0)
    expected = F.linear(x64, base.weight.double(), base.bias.double())
    expected = expected + layer.scaling["default"] * dropped @ A.t() @ lora_B.t()
    expected_grads = torch.autograd.grad(expected.square().sum(), [x64, A])
    assert error(out, expected) <= 2 * RELATIVE[dtype]
    for grad, oracle in zip(grads, expected_grads, strict=True):
        assert error(grad, oracle) <= 5 * RELATIVE[dtype]
    assert not torch.equal(layer(x), out)  # the next call draws another mask
    model.eval()
    as_stock(lambda: layer(x), 3 * RELATIVE[dtype])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_dropout_under_gradient_checkpointing(use_reentrant):
    layer = randomise(net(targets=["up"], lora_dropout=0.5)).base_model.model.up
    x = torch.randn(9, 12, requires_grad=True)

    def grads(forward):
        torch.manual_seed(3)
        return torch.autograd.grad(forward(x).square().sum(), [x, layer.lora_A["default"].weight])

    checkpointed = None
    torch.manual_seed(3)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    checkpointed = (x.grad, layer.lora_A["default"].weight.grad)
    for actual, expected in zip(checkpointed, grads(layer), strict=True):
        assert torch.equal(actual, expected)


def test_dropout_under_compile():
    torch.compiler.reset()
    model = randomise(net(targets=["up", "conv", "down"], lora_dropout=0.5))
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    first, second = compiled(INDICES), compiled(INDICES)
    assert not torch.equal(first, second)
    second.sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    model.eval()
    assert error(compiled(INDICES), model(INDICES)) <= 3 * RELATIVE[torch.float32]


KERNEL_CASES = [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)]


@pytest.mark.parametrize(("dtype", "autocast_adapter_dtype"), KERNEL_CASES)
@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_parity_with_stock_on_kernels(monkeypatch, dtype, autocast_adapter_dtype, compute_dtype):
    """Linear and Conv1D layers on Triton kernels, interpreted; the embedding has none."""
    monkeypatch.setenv("MICA_BACKEND", "triton")
    mica.fast.enable(compute_dtype=compute_dtype)
    model = randomise(net(dtype, autocast_adapter_dtype=autocast_adapter_dtype))
    _, counts = counted(lambda: compare(model, 3 * RELATIVE[dtype]))
    assert counts["linear_kernels"] == counts["linear_backward_kernels"] == 3
    assert counts["embedding"] == counts["embedding_backward"] == 1


def test_kernels_under_autocast_and_after_loading_another_adapter(monkeypatch, tmp_path):
    """A rank that is padded: the prepared copy of B must follow what is loaded into the same adapter."""
    monkeypatch.setenv("MICA_BACKEND", "triton")
    model = randomise(net(rank=3))
    with torch.autocast("cpu", torch.bfloat16):
        compare(model, 3 * RELATIVE[torch.bfloat16])
    other = randomise(net(rank=3, seed=5), seed=6)
    other.save_pretrained(tmp_path)
    before = model(INDICES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(other.get_parameter(name))
    after = compare(model, 3 * RELATIVE[torch.float32])
    assert error(after, before) > 0.01
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(compare(model, 3 * RELATIVE[torch.float32]), after)


@pytest.mark.parametrize("called", [False, True], ids=["fused", "base layer called"])
def test_forward_mode(called):
    layer = randomise(net(targets=["up"])).base_model.model.up
    if called:
        layer.base_layer.register_forward_hook(lambda module, args, out: out * 2)
    x, tangent = torch.randn(2, 3, 12)

    def jvp():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent

    _, counts = counted(lambda: as_stock(jvp, RELATIVE[torch.float32]))
    assert counts


@pytest.mark.parametrize("called", [False, True], ids=["fused", "base layer called"])
def test_an_edit_of_x_in_place_is_said(called):
    """Stock PEFT keeps an fp32 copy of a 16-bit x; here x is kept as it came, and may not be edited."""
    layer = randomise(net(torch.bfloat16, targets=["up"])).base_model.model.up
    if called:
        layer.base_layer.register_forward_hook(lambda module, args, out: out * 2)
    x = torch.randn(3, 12).bfloat16()

    def step():
        out = layer(x)
        x.mul_(2)
        out.float().sum().backward()

    with pytest.raises(RuntimeError, match="of a MiCA layer has been modified by an inplace operation"):
        step()
    with mica.fast.disabled():
        step()
