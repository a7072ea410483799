"""Groups within gradient checkpointing: a forward and its recomputations agree, whatever came between."""

import gc
import random
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from transformers import T5Config, T5ForConditionalGeneration

import mica.fast
from tests.support.grouped import X, assert_equal, learned, three
from tests.support.models import gradients, randomise, tiny_llama, wrap
from tests.support.peft_versions import needs_peft
from tests.support.tolerances import RELATIVE

pytestmark = pytest.mark.usefixtures("grouping_on")

TOKENS = torch.randint(0, 61, (2, 5), generator=torch.Generator().manual_seed(2))
kept = partial(checkpoint, use_reentrant=False)


def plain(function, *tensors):
    return function(*tensors)


def stock(step, *args):
    with mica.fast.disabled():
        return step(*args)


def step_of(model, forward, losses=1):
    """Output and gradients of ``forward()``, whose sum is taken apart into so many losses, each kept."""
    model.zero_grad(set_to_none=True)
    out = forward()
    for part in out.float().square().flatten().split(-(-out.numel() // losses)):
        part.sum().backward(retain_graph=losses > 1)
    return out.detach(), gradients(model)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("needs_x", [False, True])
def test_a_layer_saves_the_same_in_a_group_as_alone(needs_x, autocast):
    """Number, order, shapes, dtypes and values: what checkpointing compares and hands to the backward."""
    model = learned()
    lists = {}
    for grouped in (True, False):
        mica.fast.enable(group_projections=grouped)
        mica.fast.call_counts.clear()
        saved = lists[grouped] = []
        with (
            saved_tensors_hooks(lambda t, saved=saved: saved.append(t.detach()) or t, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            model(X.clone().requires_grad_(needs_x))
        assert mica.fast.call_counts["linear_group"] == grouped
    assert len(lists[True]) == len(lists[False])
    for in_group, alone in zip(*lists.values(), strict=True):
        assert in_group.dtype == alone.dtype
        torch.testing.assert_close(in_group, alone, rtol=1e-2 if autocast else 1e-5, atol=1e-6)


def test_two_losses_of_one_forward():
    """The first backward, and its recomputation, come before the second recomputation."""
    model = randomise(wrap(tiny_llama(), targets="all-linear")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def step():
        return step_of(model, lambda: model(input_ids=TOKENS).logits, losses=2)

    expected = stock(step)
    for _ in range(4):
        assert_equal(step(), expected)
    assert mica.fast.call_counts["linear_group"] > 0


def test_a_follower_in_a_region_whose_leader_is_outside():
    """An MLP that is checkpointed alone and reads the attention's x; with checkpointing switched on later."""
    model = three()
    net = model.base_model.model

    def forward(around):
        x = X.clone().requires_grad_()
        attention = net.a(x) + net.b(x)
        return net.last(attention + around(lambda x: net.c(x), x))

    expected = stock(step_of, model, partial(forward, plain))
    for around in (kept, plain, plain, kept, kept, kept, plain):
        assert_equal(step_of(model, partial(forward, around)), expected)
    counts = mica.fast.call_counts
    counts.clear()
    assert_equal(step_of(model, partial(forward, kept)), expected)
    assert counts["linear_group"] == 1  # a with b
    assert counts["linear"] == 3  # c, c recomputed, last


def test_a_group_that_spans_several_regions():
    """Every block reads one conditioning tensor, as in diffusion transformers."""
    model = three()
    net = model.base_model.model

    def forward(around):
        x, h = X.clone().requires_grad_(), X.clone()
        for layer in (net.a, net.b, net.c):
            h = around(lambda h, x, layer=layer: h + torch.tanh(h) * layer(x), h, x)
        return h

    expected = stock(step_of, model, partial(forward, plain))
    for around in (plain, plain, kept, kept, kept, plain, kept):
        assert_equal(step_of(model, partial(forward, around), losses=2), expected)


@needs_peft("0.21", "a sequence-to-sequence model needs a method that transformers no longer has")
def test_t5_with_checkpointing_switched_on_later():
    """Cross-attention: all layers' k and v read the encoder's output."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=61, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    model = T5ForConditionalGeneration(config)
    model = randomise(wrap(model, targets=r".*EncDecAttention\.(k|v)", task_type="SEQ_2_SEQ_LM")).train()

    def step():
        return step_of(model, lambda: model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits)

    expected = stock(step)
    for _ in range(3):
        assert_equal(step(), expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for _ in range(4):
        assert_equal(step(), expected)
    mica.fast.call_counts.clear()
    assert_equal(step(), expected)
    assert mica.fast.call_counts["linear_group"] == 2 * 2  # k with v, in the forward and recomputed


def test_a_recomputation_keeps_nothing_alive():
    """Its leader computes for a layer that is no longer in the region; nothing else would let go of that."""
    model = learned()
    net = model.base_model.model
    x = X.clone().requires_grad_()
    kept(lambda x: torch.tanh(net.a(x)), x).sum().backward()
    assert mica.fast.call_counts["linear_group"] == 2
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None


def test_in_place_edits_of_an_output_that_was_computed_ahead():
    model = learned()
    net = model.base_model.model

    def forward():
        def block(x):
            return net.last(net.a(x).relu_() + net.b(x).mul_(2.0) + torch.sigmoid_(net.c(x)))

        return kept(block, X.clone().requires_grad_())

    expected = stock(step_of, model, forward)
    assert_equal(step_of(model, forward), expected)
    assert mica.fast.call_counts["linear_group"] == 2


def test_second_derivatives_through_a_checkpointed_group():
    model = learned()
    net = model.base_model.model

    def forward():
        x = X.clone().requires_grad_()
        out = kept(lambda x: torch.tanh(net.a(x)) * net.b(x) + net.c(x), x)
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return grad

    expected = stock(step_of, model, forward)
    assert_equal(step_of(model, forward), expected)
    assert mica.fast.call_counts["linear_group"] > 0


def _selective(function, *tensors):
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *tensors, use_reentrant=False, context_fn=contexts)


def test_selective_checkpointing_that_learns_between_forward_and_recomputation():
    """It looks for the forward's operators by name: a layer that it is around never joins a group."""
    model = three()
    net = model.base_model.model

    def block(x):
        return net.last(net.a(x) + net.b(x) + net.c(x))

    def forward(around):
        return around(block, X.clone().requires_grad_())

    expected = stock(step_of, model, partial(forward, plain))
    for around in (_selective, plain, plain, _selective, _selective, plain):
        assert_equal(step_of(model, partial(forward, around)), expected)
    assert mica.fast.call_counts["linear_group"] == 2


def _offloaded(function, *tensors):
    with save_on_cpu():
        return function(*tensors)


def _to_the_end(function, *tensors):
    with set_checkpoint_early_stop(False):
        return kept(function, *tensors)


def _nested(function, *tensors):
    return kept(partial(kept, function), *tensors)


AROUND = {
    "kept": kept,
    "nested": _nested,
    "to the end": _to_the_end,
    "reentrant": partial(checkpoint, use_reentrant=True),
    "selective": _selective,
    "offloaded": _offloaded,
    "plain": plain,
}


class Blocks(nn.Module):
    """A random program: blocks of calls on the shared x, on what is read by all of a block, or in a chain."""

    def __init__(self, choose):
        super().__init__()
        names = "abcdef"
        for name in names:
            setattr(self, name, nn.Linear(6, 6, bias=choose.random() < 0.5))
        orders = [choose.sample(names, choose.randint(1, 4)) for _ in range(3)]  # met again, as shared blocks
        self.blocks = [
            [(choose.choice(["shared", "shared", "block's", "last"]), name) for name in choose.choice(orders)]
            for _ in range(choose.randint(2, 4))
        ]

    def forward(self, x, arounds):
        h = x
        for calls, around in zip(self.blocks, arounds, strict=True):
            h = around(partial(self.block, calls), x, h)
        return h

    def block(self, calls, x, h):
        result = last = h
        for source, name in calls:
            last = getattr(self, name)({"shared": x, "block's": h, "last": last}[source])
            result = result + torch.tanh(last)
        return result


@pytest.mark.parametrize("seed", range(24))
def test_random_programs_and_regions(seed):
    """Checkpointing of all kinds goes on and off from step to step; one or two losses, or forwards."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    net = Blocks(choose)
    model = randomise(wrap(net, targets=list("abcdef"), rank=2))
    expected = None
    for number in range(8):
        kinds = choose.choice([["plain"], ["kept"], ["kept", "plain"], list(AROUND)])
        forwards, losses = choose.choice([(1, 1), (1, 2), (2, 1)])
        arounds = [[choose.choice(kinds) for _ in net.blocks] for _ in range(forwards)]
        if any("selective" in names for names in arounds):
            losses = 1  # PyTorch allows one backward

        def step(arounds=arounds, losses=losses):
            def forward():
                outs = [model(X.clone().requires_grad_(), [AROUND[a] for a in names]) for names in arounds]
                return torch.cat([out / len(outs) for out in outs])

            return step_of(model, forward, losses)

        expected = stock(step, [["plain"] * len(net.blocks)] * forwards, losses)
        try:
            assert_equal(step(), expected, 20 * RELATIVE[torch.float32])
        except Exception as error:
            raise AssertionError(f"step {number}, {arounds}, {losses} losses, {net.blocks}") from error
