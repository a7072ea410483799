"""Host time: a linear layer and a decoder block whose tensors are so small that the code around the products
decides, and `generate()` on a pretrained model, where that decides on a CPU too.

On a GPU the host decides wherever a layer's kernels take less time than the code that launches them: with few
tokens, in small models, in decoding. Here kernels are compiled and handed to a driver that launches nothing
(tests/support/no_launch.py): all of the host's work is timed and none of the device's. Such a result has no
numbers to check; `mica.fast.call_counts` proves that it came from kernels. All other implementations are
checked first, the layer's against `mica.paths.torch_path`. Layer and block run on one thread, `generate()`
on all.
"""

import copy
import functools
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, GenerationConfig, LlamaConfig

import mica.fast
from bench.measure.machine import ON_ACCELERATOR, SIZE
from bench.results import names
from bench.results.names import ATEN, BARE, BOTH, BY_HAND, FAST, MERGED, STOCK
from bench.suites.decoder import LINEAR_LAYERS, RANK, Work, adapted
from bench.suites.harness import build_all, pick
from bench.suites.layer import AtenControl, Form, adapted_module, by_hand, check_errors, exact, make_layer
from bench.suites.steps import Step, check_all, counting, operators
from mica.paths.products import has_native
from tests.support import models
from tests.support.tolerances import RELATIVE

no_launch = pytest.importorskip("tests.support.no_launch")  # imports Triton
pytestmark = pytest.mark.skipif(
    ON_ACCELERATOR, reason="on a CPU: Triton's driver is replaced for the whole process"
)

DTYPES = {"float32": torch.float32}
if has_native(torch.bfloat16):
    DTYPES["bfloat16"] = torch.bfloat16
PARTS = (names.NO_GRADIENT, BOTH)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def kernels():
    """Required: one that is not available is an error, not the PyTorch form."""
    with no_launch.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICA_BACKEND", "triton")
        yield


def sample(once, step: Step, part: str, calls: int, group: str, implementation: str, axes: dict) -> None:
    """Without a gradient the operators choose which kernels they launch, if any."""
    launches, has_gradient = no_launch.launches, part == BOTH
    with torch.set_grad_enabled(has_gradient):
        call = None if has_gradient else step.form.forward
        runs = step.time(once, group, implementation, {**axes, "call": part}, calls, call)
    once.note(launches=(no_launch.launches - launches) / runs)


# In all three parts the implementation is the innermost loop: implementations take turns within a round.
# ---------------------------------------------------------------------------------------------------
# one linear layer
# ---------------------------------------------------------------------------------------------------

LAYER_ROUNDS = pick(default=9, quick=5, full=15)
LAYER_CALLS = {names.NO_GRADIENT: 1000, BOTH: 300}  # in a sample: 10 ms of the quickest implementation
TOKENS, OUT, IN = 4, 32, 32
UNSAVED = SimpleNamespace(save_for_backward=lambda *tensors: None)  # the control, without autograd


def layer_implementations(dtype):
    """name -> (dtype of the adapter, context, whether kernels run or None if it is not mica.fast)."""
    stock, pytorch, on_kernels = (mica.fast.disabled, None), (nullcontext, False), (kernels, True)
    ways = {STOCK: stock, names.PYTORCH: pytorch, names.KERNELS: on_kernels}
    wide = {name: (torch.float32, *way) for name, way in ways.items()}
    if dtype == "float32":  # the adapters' default dtype is the base's
        return wide
    ways = {names.STOCK_16: stock, names.PYTORCH_16: pytorch, names.KERNELS_16: on_kernels}
    return wide | {name: (DTYPES[dtype], *way) for name, way in ways.items()}


def layer_builds(dtype, layer):
    """name -> what makes its `Step`, with separate modules, since `mica.fast` learns about each."""
    flat, dy = layer.x, layer.grad_output
    x = flat.detach()[None].requires_grad_()  # (1, tokens, features), as in a model
    lora_A = layer.lora_A.detach().to(DTYPES[dtype]).requires_grad_()
    operands = layer.weight, lora_A, layer.lora_B.to(DTYPES[dtype]), layer.scaling

    def aten():
        control = AtenControl.apply if torch.is_grad_enabled() else partial(AtenControl.forward, UNSAVED)
        return control(flat, *operands)

    def module(adapter_dtype, context, on_kernels):
        adapted, trained = adapted_module(layer, adapter_dtype, init="mica")
        ran = {} if on_kernels is None else operators(1, on_kernels=on_kernels)
        return Step(Form(partial(adapted, x), (x, trained), context, adapted), dy[None], operators=ran)

    bare = adapted_module(layer, DTYPES[dtype])[0].base_layer
    return {
        BARE: lambda: Step(Form(partial(bare, x), (x,)), dy[None]),
        ATEN: lambda: Step(Form(aten, (flat, lora_A)), dy),
        BY_HAND: lambda: Step(Form(partial(by_hand, flat, *operands), (flat, lora_A)), dy),
        **{name: partial(module, *how) for name, how in layer_implementations(dtype).items()},
    }


def checked_layer(name, build, truth, limit):
    step = build()
    form = step.form
    if form.context is kernels:
        return step  # no numbers
    with form.context():
        errors = form.errors(step.grad_output, truth)
    check_errors(name, errors, limit)
    return step


@functools.lru_cache(maxsize=1)
def layer_setting(dtype, group):
    layer = make_layer(TOKENS, OUT, IN, RANK, DTYPES[dtype], "cpu")
    truth, limit = exact(layer), RELATIVE[DTYPES[dtype]]
    builds = layer_builds(dtype, layer)
    return build_all(group, builds, lambda name: checked_layer(name, builds[name], truth, limit))


LAYER_CASES = [
    (dtype, part, round_, name)
    for dtype, part, round_ in product(DTYPES, PARTS, range(LAYER_ROUNDS))
    for name in (BARE, ATEN, BY_HAND, *layer_implementations(dtype))
]


@pytest.mark.parametrize(("dtype", "part", "round_", "implementation"), LAYER_CASES)
def bench_host_layer(once, gated, one_thread, dtype, part, round_, implementation):
    cell = f"host time of a layer, {TOKENS} tokens, {OUT} x {IN}, r = {RANK}, {dtype}"
    step = gated(f"{cell}, {part}", lambda: layer_setting(dtype, cell), implementation)[implementation]
    axes = {"suite": "host layer", "tokens": TOKENS, "out": OUT, "in": IN, "rank": RANK, "dtype": dtype}
    sample(once, step, part, LAYER_CALLS[part], f"{cell}, {part}", implementation, axes)


# ---------------------------------------------------------------------------------------------------
# a decoder block of Llama's shape
# ---------------------------------------------------------------------------------------------------

BLOCK_ROUNDS = pick(default=9, quick=5)
# One block is timed with the rest of a model (masks, rotary embedding, norm, PEFT's wrapper); with four that
# is a smaller share.
BLOCKS = pick(quick={1: 30}, default={1: 50}, full={1: 50, 4: 20})  # number of layers: calls in a sample
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


def block_implementations(dtype):
    """name -> (context, operators of one block). Adapters are fp32, PEFT's default, except `STOCK_16`'s."""
    others = {BARE: (nullcontext, {}), STOCK: (mica.fast.disabled, {})}
    if dtype != "float32":
        others[names.STOCK_16] = (mica.fast.disabled, {})
    return others | {
        names.PYTORCH: (nullcontext, operators(LINEAR_LAYERS)),
        names.KERNELS: (kernels, operators(LINEAR_LAYERS, on_kernels=True)),
    }


@functools.lru_cache(maxsize=1)
def block_setting(dtype, layers, group):
    """name -> Step, each with its own model."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, **CONFIG)
    bare = AutoModel.from_config(config, dtype=DTYPES[dtype]).train().requires_grad_(False)
    x, dy = torch.randn(2, 1, BLOCK_TOKENS, config.hidden_size, dtype=DTYPES[dtype]).unbind()
    work, gate = Work(bare, adapted(bare, 0.02), x, dy), BLOCK_GATES[dtype]

    def build(name):
        context, ran = block_implementations(dtype)[name]
        return work.step(name, context, {operator: layers * count for operator, count in ran.items()})

    gates = dict.fromkeys(("y", "dx", "dA"), gate)
    return check_all(group, block_implementations(dtype), build, gates, (BARE, names.KERNELS))


BLOCK_CASES = [
    (dtype, layers, part, round_, name)
    for dtype, layers, part, round_ in product(DTYPES, BLOCKS, PARTS, range(BLOCK_ROUNDS))
    for name in block_implementations(dtype)
]


@pytest.mark.parametrize(("dtype", "layers", "part", "round_", "implementation"), BLOCK_CASES)
def bench_host_block(once, gated, one_thread, dtype, layers, part, round_, implementation):
    widths = " / ".join(map(str, WIDTHS.values()))
    cell = (
        f"host time of a Llama with {layers} block{'s' if layers > 1 else ''} of {widths}, "
        f"{BLOCK_TOKENS} tokens, r = {RANK}, {dtype}"
    )
    step = gated(f"{cell}, {part}", lambda: block_setting(dtype, layers, cell), implementation)[
        implementation
    ]
    axes = {"suite": "host block", "tokens": BLOCK_TOKENS, "layers": layers, "rank": RANK, "dtype": dtype}
    sample(once, step, part, BLOCKS[layers], f"{cell}, {part}", implementation, axes)


# ---------------------------------------------------------------------------------------------------
# generate() on SmolLM2-135M
# ---------------------------------------------------------------------------------------------------

GENERATE_ROUNDS, NEW_TOKENS = 7, 32
GENERATE = {BARE: nullcontext, MERGED: nullcontext, STOCK: mica.fast.disabled, FAST: nullcontext}
PROMPT_TOKENS = 16


def generated(model, new_tokens):
    """(1, new_tokens), the likeliest ones."""
    ids = models.python_reference_tokens()[None, :PROMPT_TOKENS]
    how = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0)
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return tokens[:, PROMPT_TOKENS:]


@functools.lru_cache(maxsize=1)
def generate_setting(group):
    """name -> model; stock PEFT and mica.fast have the same one."""
    torch.manual_seed(0)
    bare = models.smollm2().eval().requires_grad_(False)
    # with a scale of 0.02 some of the tokens are the bare model's, with 0.1 they repeat
    model = adapted(bare, 0.05).eval()
    implementations = {BARE: bare, MERGED: copy.deepcopy(model).merge_and_unload(), STOCK: model, FAST: model}

    def tokens_of(name):
        with GENERATE[name](), counting() as ran:
            tokens = generated(implementations[name], NEW_TOKENS)
        assert bool(ran) == (name == FAST), f"{name} ran {dict(ran)}"
        assert tokens.shape == (1, NEW_TOKENS), f"{name} stopped after {tokens.shape[1]} tokens"
        return tokens

    expected = tokens_of(STOCK)
    assert not torch.equal(tokens_of(BARE), expected), "the adapter makes no difference"

    def checked_model(name):
        if name in (MERGED, FAST):
            assert torch.equal(tokens_of(name), expected), f"{name} generates other tokens than stock PEFT"
        return implementations[name]

    return build_all(group, implementations, checked_model)


@pytest.mark.skipif(SIZE != "full", reason="part of --full")  # half a minute to set up
@pytest.mark.parametrize("implementation", GENERATE)
@pytest.mark.parametrize("round_", range(GENERATE_ROUNDS))
def bench_host_generation(once, gated, round_, implementation):
    group = f"generate() of {NEW_TOKENS} tokens after {PROMPT_TOKENS}, SmolLM2-135M, r = {RANK}, float32"
    model = gated(group, lambda: generate_setting(group), implementation)[implementation]
    axes = {"suite": "generation", "model": "SmolLM2-135M", "new tokens": NEW_TOKENS, "rank": RANK}
    with GENERATE[implementation]():
        generated(model, 2)  # warms up
        once(partial(generated, model, NEW_TOKENS), group, implementation, {**axes, "dtype": "float32"})
