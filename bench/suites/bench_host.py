"""Host time: a linear layer and a decoder block whose tensors are so small that the code around the products
decides, and `generate()` on a pretrained model, where that decides on a CPU too.

On a GPU the host decides wherever a layer's kernels take less time than the code that launches them: with few
tokens, in small models, in decoding. Here kernels are compiled and handed to a driver that launches nothing
(tests/support/no_launch.py): all of the host's work is timed and none of the device's. Such a result has no
numbers to check; `mica.fast.call_counts` proves that it came from kernels. All other rivals are checked
first, the layer's against `mica.reference`. Layer and block run on one thread, `generate()` on all.
"""

import copy
import functools
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModel, GenerationConfig, LlamaConfig

import mica.fast
from bench.results.names import (
    BARE,
    BOTH,
    BY_HAND,
    FAST,
    KERNELS,
    KERNELS_16,
    KERNELS_GROUPED,
    KERNELS_UNGROUPED,
    MERGED,
    NO_GRADIENT,
    PYTORCH,
    PYTORCH_16,
    PYTORCH_GROUPED,
    PYTORCH_UNGROUPED,
    STOCK,
    STOCK_16,
)
from bench.suites.decoder import forward, results, step
from bench.suites.harness import DEVICE, pick
from bench.suites.layer import AtenControl, adapted_module, exact, make_layer, relative_errors
from mica.products import has_native
from tests.support import models
from tests.support.tolerances import RELATIVE

no_launch = pytest.importorskip("tests.support.no_launch")  # imports Triton
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="Triton's driver is replaced for the whole process")

DTYPES = {"float32": torch.float32}
if has_native(torch.bfloat16):
    DTYPES["bfloat16"] = torch.bfloat16
PARTS = (NO_GRADIENT, BOTH)
RANK = 16


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def kernels():
    """Demanded: one that cannot be had is an error and not the PyTorch form."""
    with no_launch.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICA_BACKEND", "triton")
        yield


@contextmanager
def grouping(on, around=nullcontext):
    with around():
        mica.fast.enable(group_projections=on)
        try:
            yield
        finally:
            mica.fast.enable()


@contextmanager
def counting():
    """What is yielded says afterwards how often each operator has run inside, if it has."""
    ran, before = {}, Counter(mica.fast.call_counts)
    yield ran
    ran.update(Counter(mica.fast.call_counts) - before)


def operators(linear, groups=0, on_kernels=False):
    """What a forward + backward of so many layers alone, and of so many groups of layers, has to run."""
    wanted = {"linear": linear, "linear_group": groups}
    found = {f"{name}{part}": times for name, times in wanted.items() if times for part in ("", "_backward")}
    return found | ({f"{name}_kernels": times for name, times in found.items()} if on_kernels else {})


class Form(NamedTuple):
    """A rival. ``forward()`` gives y; ``inputs``: what has a gradient, x first.

    ``operators``: of mica.fast, how many of each a forward + backward runs.
    """

    forward: Callable[[], torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    grad_output: torch.Tensor
    context: Callable[[], AbstractContextManager] = nullcontext
    operators: dict[str, int] = {}  # noqa: RUF012

    def forward_and_backward(self) -> None:
        self.forward().backward(self.grad_output)
        for tensor in self.inputs:
            tensor.grad = None

    def gradients(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, self.inputs, self.grad_output)

    def time(self, once, part: str, calls: int, group: str, rival: str, axes: dict) -> None:
        """One sample, after which the operators that its name promises must have run in every call.

        Without a gradient it is the operators' own choice which kernels they launch, if any.
        """
        call, run = (self.forward_and_backward if part == BOTH else self.forward), count()

        def counted() -> None:
            next(run)
            call()

        launches = no_launch.launches
        with self.context(), torch.set_grad_enabled(part == BOTH), counting() as ran:
            once(counted, group, rival, {**axes, "call": part}, calls, warm_up=True)
        runs = next(run)  # more than were timed
        found = {name: times / runs for name, times in ran.items()}
        if part == BOTH:
            assert found == self.operators, f"{rival} ran {found} a call, not {self.operators}"
        else:
            assert bool(found) == bool(self.operators), f"{rival} ran {found} a call"
        once.note(launches=(no_launch.launches - launches) / runs)


# In all three parts the last named parameter is the innermost loop: rivals take turns within a round.
# ---------------------------------------------------------------------------------------------------
# one linear layer
# ---------------------------------------------------------------------------------------------------

LAYER_ROUNDS = pick(quick=5, default=15)
LAYER_CALLS = {NO_GRADIENT: 1000, BOTH: 300}  # in a sample: 10 ms of the quickest rival
TOKENS, OUT, IN = 4, 32, 32
UNSAVED = SimpleNamespace(save_for_backward=lambda *tensors: None)  # the control, without autograd


def layer_rivals(dtype):
    """name -> (dtype of the adapter, context, whether kernels run or None where it is not mica.fast)."""
    stock, pytorch, on_kernels = (mica.fast.disabled, None), (nullcontext, False), (kernels, True)
    found = {STOCK: (torch.float32, *stock)}
    found |= {PYTORCH: (torch.float32, *pytorch), KERNELS: (torch.float32, *on_kernels)}
    if dtype == "float32":  # the adapters' default dtype is the base's
        return found
    narrow = DTYPES[dtype]
    return found | {
        STOCK_16: (narrow, *stock),
        PYTORCH_16: (narrow, *pytorch),
        KERNELS_16: (narrow, *on_kernels),
    }


@functools.lru_cache(maxsize=1)
def layer_setting(dtype):
    """name -> Form. A layer of its own each: what one has learnt about it is not undone in another's turn."""
    layer = make_layer(TOKENS, OUT, IN, RANK, DTYPES[dtype], DEVICE)
    flat, dy = layer.x, layer.grad_output
    x = flat.detach()[None].requires_grad_()  # (1, tokens, features), as in a model
    plain, lora_A = adapted_module(layer, DTYPES[dtype], init="mica")
    lora_B = plain.lora_B["default"].weight

    def by_hand():
        control = AtenControl.apply if torch.is_grad_enabled() else partial(AtenControl.forward, UNSAVED)
        return control(flat, layer.weight, lora_A, lora_B, layer.scaling)

    forms = {
        BARE: Form(lambda: plain.base_layer(x), (x,), dy[None]),
        BY_HAND: Form(by_hand, (flat, lora_A), dy),
    }
    for name, (adapter_dtype, context, on_kernels) in layer_rivals(dtype).items():
        module, trained = adapted_module(layer, adapter_dtype, init="mica")
        ran = {} if on_kernels is None else operators(1, on_kernels=on_kernels)
        forms[name] = Form(partial(module, x), (x, trained), dy[None], context, ran)
    truth, limit = exact(layer), RELATIVE[DTYPES[dtype]]
    for name, form in forms.items():
        if form.context is kernels:
            continue  # no numbers
        with form.context():
            errors = relative_errors(form.forward, form.gradients, truth)
        bound = 1.0 if name == BARE else limit  # the bare layer lacks the adapter's term
        for what, error in errors.items():
            assert error <= bound, f"{name}: the relative error of {what} is {error:.2e}, above {bound:.0e}"
    return forms


def layer_cases():
    for dtype in DTYPES:
        for part in PARTS:
            for round_ in range(LAYER_ROUNDS):
                for rival in (BARE, BY_HAND, *layer_rivals(dtype)):
                    yield dtype, part, round_, rival


@pytest.mark.parametrize(("dtype", "part", "round_", "rival"), layer_cases())
def bench_host_layer(once, gated, one_thread, dtype, part, round_, rival):
    group = f"host time of a layer, {TOKENS} tokens, {OUT} x {IN}, r = {RANK}, {dtype}, {part}"
    form = gated(group, lambda: layer_setting(dtype))[rival]
    axes = {"suite": "host layer", "tokens": TOKENS, "out": OUT, "in": IN, "rank": RANK, "dtype": dtype}
    form.time(once, part, LAYER_CALLS[part], group, rival, axes)


# ---------------------------------------------------------------------------------------------------
# a decoder block of Llama's shape: q/k/v and gate/up read the same input
# ---------------------------------------------------------------------------------------------------

BLOCK_ROUNDS = pick(quick=5, default=9)
# One is timed with all that a model is beside its blocks (masks, rotary embedding, norm, PEFT's wrapper);
# with four that is a smaller share.
BLOCKS = pick(quick={1: 30}, default={1: 50, 4: 20})  # number of layers: calls in a sample
BLOCK_TOKENS, WIDTHS = 4, {"hidden_size": 64, "intermediate_size": 128}
CONFIG = {
    **WIDTHS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8,  # no tokens go in
    "bos_token_id": None,
    "eos_token_id": None,
}
# Relative differences of y, dx and dA from stock PEFT's, whose adapters compute in fp32
BLOCK_GATES = {"float32": 1e-5, "bfloat16": 2e-2}


def block_rivals(dtype):
    """name -> (context, operators of one block). Adapters are PEFT's default, fp32, but for `STOCK_16`."""
    found = {BARE: (nullcontext, {}), STOCK: (mica.fast.disabled, {})}
    if dtype != "float32":
        found[STOCK_16] = (mica.fast.disabled, {})
    alone, grouped = {"linear": 7}, {"linear": 2, "groups": 2}
    return found | {
        PYTORCH_UNGROUPED: (partial(grouping, False), operators(**alone)),
        PYTORCH_GROUPED: (partial(grouping, True), operators(**grouped)),
        KERNELS_UNGROUPED: (partial(grouping, False, kernels), operators(**alone, on_kernels=True)),
        KERNELS_GROUPED: (partial(grouping, True, kernels), operators(**grouped, on_kernels=True)),
    }


@functools.lru_cache(maxsize=1)
def block_setting(dtype, layers):
    """name -> Form, a model each. Groups are learnt by observation: every rival takes two steps first."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, **CONFIG)
    bare = AutoModel.from_config(config, dtype=DTYPES[dtype]).train().requires_grad_(False)
    masters = models.randomise(models.wrap(copy.deepcopy(bare), rank=RANK, targets="all-linear"), 0.02)
    x, dy = torch.randn(2, 1, BLOCK_TOKENS, config.hidden_size, dtype=DTYPES[dtype]).unbind()
    forms, expected = {}, None
    for name, (context, ran) in block_rivals(dtype).items():
        model = bare if name == BARE else copy.deepcopy(masters)
        if name == STOCK_16:
            for parameter in model.parameters():  # not the rotary embedding's fp32 frequencies, a buffer
                parameter.data = parameter.data.to(DTYPES[dtype])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        inputs = (x.detach().requires_grad_(), *trained)
        ran = {operator: layers * count for operator, count in ran.items()}
        forms[name] = Form(partial(forward, model, inputs[0]), inputs, dy, context, ran)
        with context():
            for _ in range(2):
                step(model, (x, dy))
            found = {} if name in (BARE, KERNELS_UNGROUPED, KERNELS_GROUPED) else results(model, (x, dy))
        model.zero_grad(set_to_none=True)
        expected = found if name == STOCK else expected
        for what, value in found.items():
            error = (value - expected[what]).norm() / expected[what].norm()
            assert error <= BLOCK_GATES[dtype], f"{name}: {what} is {error:.1e} off stock PEFT's"
    return forms


def block_cases():
    for dtype in DTYPES:
        for layers in BLOCKS:
            for part in PARTS:
                for round_ in range(BLOCK_ROUNDS):
                    for rival in block_rivals(dtype):
                        yield dtype, layers, part, round_, rival


@pytest.mark.parametrize(("dtype", "layers", "part", "round_", "rival"), block_cases())
def bench_host_block(once, gated, one_thread, dtype, layers, part, round_, rival):
    widths = " / ".join(map(str, WIDTHS.values()))
    group = (
        f"host time of a Llama with {layers} block{'s' if layers > 1 else ''} of {widths}, "
        f"{BLOCK_TOKENS} tokens, r = {RANK}, {dtype}, {part}"
    )
    form = gated(group, lambda: block_setting(dtype, layers))[rival]
    axes = {"suite": "host block", "tokens": BLOCK_TOKENS, "layers": layers, "rank": RANK, "dtype": dtype}
    form.time(once, part, BLOCKS[layers], group, rival, axes)


# ---------------------------------------------------------------------------------------------------
# generate() on SmolLM2-135M
# ---------------------------------------------------------------------------------------------------

GENERATE_ROUNDS, NEW_TOKENS = pick(quick=3, default=7), pick(quick=16, default=32)
GENERATE = {BARE: nullcontext, MERGED: nullcontext, STOCK: mica.fast.disabled, FAST: nullcontext}
PROMPT_TOKENS = 16


def generated(model, new_tokens):
    """(1, new_tokens), the likeliest ones."""
    ids = models.python_reference_tokens()[None, :PROMPT_TOKENS]
    how = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0)
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return found[:, PROMPT_TOKENS:]


@functools.lru_cache(maxsize=1)
def generate_setting():
    """name -> model; stock PEFT and mica.fast have the same one."""
    torch.manual_seed(0)
    bare = models.smollm2().eval().requires_grad_(False)
    adapted = models.wrap(copy.deepcopy(bare), rank=RANK, targets="all-linear").eval()
    models.randomise(adapted, 0.05)  # with 0.02 some of the tokens are the bare model's, with 0.1 they repeat
    rivals = {BARE: bare, MERGED: copy.deepcopy(adapted).merge_and_unload(), STOCK: adapted, FAST: adapted}
    tokens = {}
    for name, model in rivals.items():
        with GENERATE[name](), counting() as ran:
            tokens[name] = generated(model, NEW_TOKENS)
        assert bool(ran) == (name == FAST), f"{name} ran {dict(ran)}"
        assert tokens[name].shape == (1, NEW_TOKENS), f"{name} stopped after {tokens[name].shape[1]} tokens"
    assert not torch.equal(tokens[STOCK], tokens[BARE]), "the adapter makes no difference"
    for name in (MERGED, FAST):
        assert torch.equal(tokens[name], tokens[STOCK]), f"{name} generates other tokens than stock PEFT"
    return rivals


@pytest.mark.parametrize("rival", GENERATE)
@pytest.mark.parametrize("round_", range(GENERATE_ROUNDS))
def bench_host_generation(once, gated, round_, rival):
    group = f"generate() of {NEW_TOKENS} tokens after {PROMPT_TOKENS}, SmolLM2-135M, r = {RANK}, float32"
    model = gated(group, generate_setting)[rival]
    axes = {"suite": "generation", "model": "SmolLM2-135M", "new tokens": NEW_TOKENS, "rank": RANK}
    with GENERATE[rival]():
        generated(model, 2)  # warms up
        once(partial(generated, model, NEW_TOKENS), group, rival, {**axes, "dtype": "float32"})
