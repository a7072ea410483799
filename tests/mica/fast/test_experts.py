"""The forward of experts with MiCA adapters: against PEFT's own path."""

import pytest
import torch

import mica.fast
from tests.support import moe_models
from tests.support.linear_calls import kept_by
from tests.support.models import randomise
from tests.support.moe_models import BUILDERS, STACKS, tokens, wrap_experts
from tests.support.moe_steps import adapted, as_stock_s, call_of, gradients, outermost, ran, use
from tests.support.stock import as_graph, as_stock, assert_same
from tests.support.tolerances import RELATIVE, error
from tests.support.training import checkpointed

of_each_model = pytest.mark.parametrize("kind", BUILDERS)

# -- training -----------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize(("autocast", "init"), [(False, "mica"), (True, True)])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@of_each_model
def test_equals_every_implementation_of_transformers(kind, implementation, autocast, init):
    """The grouped products of transformers run in the weight's dtype; F.linear and bmm in autocast's."""
    mica.fast.enable(lora=True)
    model, ids = adapted(kind, init_lora_weights=init), tokens()
    model.base_model.model.set_experts_implementation(implementation)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        counts = as_stock_s(model, ids, torch.bfloat16 if autocast else torch.float32)
    rows = mica.fast.explain(model).rows  # of the forward before the disabled one
    # that one adds its biases in fp32
    is_ours = not autocast or kind != "gpt_oss" or implementation != "eager"
    assert counts == ((4, 4) if is_ours else (0, 0))
    assert {row.path for row in rows} == {"reference" if is_ours else "peft"}
    assert is_ours or "eager forward adds in fp32" in rows[0].reason
    assert {w.grad.dtype for w in model.parameters() if w.grad is not None} == {torch.float32}


@of_each_model
@pytest.mark.parametrize("target", STACKS)
def test_one_of_the_stacks_alone(kind, target):
    model, ids = adapted(kind, target_parameters=[target]), tokens()
    before = mica.fast.call_counts["experts_base"]
    assert as_stock_s(model, ids)[0] == 2
    assert mica.fast.call_counts["experts_base"] >= before + 2  # the other one


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(use_reentrant):
    model, ids = adapted().train(), tokens()
    loss, grads, _ = gradients(model, ids)
    again, grads_again, counts = gradients(checkpointed(model, use_reentrant), ids)
    assert counts == (8, 4)
    assert_same((again, grads_again), (loss, grads), 0.0)


@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
def test_under_autocast_nothing_of_a_stack_is_kept(implementation):
    """The cast stack is an operator's own; x is kept in autocast's dtype, and the result has that of x."""
    layer = use(outermost(adapted("qwen3_moe")), implementation)
    x, *routing = call_of(width=32)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept, y = kept_by(lambda: layer(x, *routing))
    stacks = {w.untyped_storage().data_ptr() for w in layer.parameters()}
    assert all(t.dim() < 3 for t in kept if t is not None and t.untyped_storage().data_ptr() not in stacks)
    assert {t.dtype for t in kept if t is not None and t.shape == x.shape} == {torch.bfloat16}
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_compiled_without_a_graph_break():
    layer = outermost(adapted("gpt_oss"))
    call = call_of(width=32)
    expected = layer(*call)
    compiled = as_graph(layer)
    y, counts = ran(lambda: compiled(*call))
    assert counts[0] == 2
    assert error(y, expected) <= RELATIVE[torch.float32]
    y.sum().backward()
    assert all(w.grad is not None for w in layer.parameters() if w.requires_grad)


def test_tokens_without_an_expert_and_no_tokens():
    """An index of num_experts, which transformers' experts skip: its part is 0, whatever its weight."""
    layer = use(outermost(adapted()), "eager")
    x, index, weights = call_of(width=32)
    index[::2, 1] = 4
    y, counts = ran(lambda: layer(x, index, weights))
    assert counts[0] == 2
    weights[::2, 1] = 0
    with mica.fast.disabled():  # another index, as eager experts of transformers 5.16 refuse this one
        assert error(y, layer(x, index % 4, weights)) <= RELATIVE[torch.float32]
    assert layer(x[:0], index[:0], weights[:0]).shape == (0, 32)


def test_what_is_saved_for_the_backward_does_not_grow_with_the_experts():
    """Nothing of the stacks' size: PEFT's path keeps W + s·B·A of all experts."""

    def saved(count):
        layer = outermost(randomise(wrap_experts(moe_models.mixtral(experts=count))))
        known = {w.untyped_storage().data_ptr() for w in layer.parameters()}
        x, *routing = call_of(width=32)
        kept, _ = kept_by(lambda: layer(x.requires_grad_(), *routing))
        storages = [tensor.untyped_storage() for tensor in kept]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for address, size in sizes.items() if address not in known)

    assert saved(32) - saved(4) == 28 * 4  # the offsets, one tensor for both stacks


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_fp16_overflows_nowhere_where_stock_does_not(monkeypatch, backend):
    """The gradient of h is beyond 65504, over fp32 masters."""
    monkeypatch.setenv("MICA_BACKEND", backend)
    layer = outermost(randomise(adapted(dtype=torch.float16, lora_alpha=1 << 16), scale=1e-5))
    trained = [weight for weight in layer.parameters() if weight.requires_grad]
    x, index = 0.03 * torch.randn(5, 32).half(), torch.arange(10).view(5, 2) % 4

    def grads():
        y = layer(x, index, torch.ones(5, 2).half())
        return torch.autograd.grad(y, trained, torch.full_like(y, 100.0))

    _, counts = ran(lambda: as_stock(grads, RELATIVE[torch.bfloat16]))
    assert counts == (2, 2)


@of_each_model
@pytest.mark.parametrize("init", ["mica", True])
def test_on_kernels(monkeypatch, kind, init):
    """Interpreted: a step of the whole model, its losses and gradients."""
    mica.fast.enable(lora=True)
    model, ids = adapted(kind, init_lora_weights=init), tokens(1, 4)
    loss, grads, _ = gradients(model, ids)
    monkeypatch.setenv("MICA_BACKEND", "triton")
    mica.fast.call_counts.clear()
    again, grads_again, _ = gradients(model, ids)
    assert mica.fast.call_counts["experts_linear_backward_kernels"] == 4
    assert error(again, loss) <= RELATIVE[torch.float32]
    assert_same(grads_again, grads, 10 * RELATIVE[torch.float32])
