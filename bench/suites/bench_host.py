"""Host time: a linear layer and a decoder block whose tensors are so small that the code around the products
decides, and `generate()` on a pretrained model, where that decides on a CPU too.

On a GPU the host decides wherever a layer's kernels take less time than the code that launches them: with few
tokens, in small models, in decoding. Here kernels are compiled and handed to a driver that launches nothing
(tests/support/no_launch.py): all of the host's work is timed and none of the device's. Such a result has no
numbers to check; `mica.fast.call_counts` proves that it came from kernels. All other implementations are
checked first, the layer's against `mica.paths.torch_path`. Layer and block run on one thread and are timed by
its CPU time, so that other processes of the machine count little; `generate()` runs on all.
"""

import copy
import functools
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModel, GenerationConfig, LlamaConfig

import mica.fast
from bench.measure.machine import ON_ACCELERATOR, SIZE
from bench.results import names, throughput
from bench.results.names import ATEN, BARE, BOTH, FAST, MERGED, NO_GRADIENT, STOCK
from bench.suites.decoder import LINEAR_LAYERS, RANK, Work, adapted
from bench.suites.harness import build_all, pick, turns
from bench.suites.layer import AtenControl, Form, adapted_module, check_errors, exact, make_layer
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
ROUNDS = pick(default=9, quick=5)
TOKENS, OUT, IN = 16, 64, 64  # of the layer
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}  # of the block
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8}  # no tokens go in
# Relative differences of a block's y, dx and dA from stock PEFT's, whose adapters compute in fp32
BLOCK_GATES = {"float32": 1e-5, "bfloat16": 2e-2}
UNSAVED = SimpleNamespace(save_for_backward=lambda *tensors: None)  # the control, without autograd
# implementation -> context, and whether kernels run, None if it is not mica.fast
WAYS = {BARE: (nullcontext, None), STOCK: (mica.fast.disabled, None), names.PYTORCH: (nullcontext, False)}


@contextmanager
def kernels(backend="triton"):
    """Required: one that is not available is an error, not the PyTorch form."""
    with no_launch.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICA_BACKEND", backend)
        yield


@contextmanager
def in_process_group():
    """As under DDP: B must not be prepared again in each call."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with kernels():
            yield
    finally:
        dist.destroy_process_group()


WAYS |= {names.KERNELS: (kernels, True), names.IN_GROUP: (in_process_group, True)}
# Small layers of one dtype leave kernels out. Timed in fp32: a CPU takes 10 µs to set up a 16-bit product.
WAYS |= {names.BY_DEFAULT: (partial(kernels, "auto"), False)}


@contextmanager
def within(context, autocast):
    with context(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        yield


class Cell(NamedTuple):
    """A linear layer, or a Llama of so many blocks; ``calls`` in a sample, without a gradient and with one.

    One block is timed with the rest of a model (masks, rotary embedding, norm, PEFT's wrapper); with four
    that is a smaller share.
    """

    dtype: str
    autocast: bool = False  # to bfloat16, as in `Trainer(bf16=True)`
    blocks: int = 0
    calls: tuple[int, int] = (1000, 300)  # 10 ms of the quickest implementation

    @property
    def key(self) -> str:
        """For ``-k``."""
        return f"{'block' if self.blocks else 'layer'}-{self.dtype}{'-autocast' if self.autocast else ''}"

    @property
    def name(self) -> str:
        what = f"a layer, {TOKENS} tokens, {OUT} x {IN}"
        if self.blocks:
            widths, plural = " / ".join(map(str, WIDTHS.values())), "s" if self.blocks > 1 else ""
            what = f"a Llama with {self.blocks} block{plural} of {widths}, {TOKENS} tokens"
        return f"host time of {what}, r = {RANK}, {self.dtype}{', autocast' if self.autocast else ''}"

    @property
    def axes(self) -> dict[str, str | int]:
        shape = {"layers": self.blocks} if self.blocks else {"out": OUT, "in": IN}
        suite = "host block" if self.blocks else "host layer"
        autocast = {"autocast": "bfloat16"} if self.autocast else {}
        return {"suite": suite, "tokens": TOKENS, **shape, "rank": RANK, "dtype": self.dtype, **autocast}

    @property
    def implementations(self) -> dict[str, tuple]:
        """name -> (dtype of the adapter, context, whether kernels run). fp32 is PEFT's default."""
        left_out = {names.IN_GROUP} if self.blocks else set()
        left_out |= {names.BY_DEFAULT} if self.dtype != "float32" else set()
        wide = {
            name: (torch.float32, partial(within, context, self.autocast), on_kernels)
            for name, (context, on_kernels) in WAYS.items()
            if name not in left_out
        }
        same = {names.STOCK_16: STOCK, names.PYTORCH_16: names.PYTORCH, names.KERNELS_16: names.KERNELS}
        if self.dtype == "float32":
            return wide
        of_base = {name: (DTYPES[self.dtype], *wide[way][1:]) for name, way in same.items()}
        return wide | ({names.STOCK_16: of_base[names.STOCK_16]} if self.blocks else of_base)

    @property
    def on_kernels(self) -> list[str]:
        """Whose results have no numbers."""
        return [name for name, (_, _, on_kernels) in self.implementations.items() if on_kernels]

    @property
    def names(self) -> list[str]:
        return [*self.implementations, *(() if self.blocks or self.autocast else (ATEN,))]


def layer_steps(cell: Cell) -> dict[str, Step]:
    """With separate modules, since `mica.fast` learns about each."""
    dtype = DTYPES[cell.dtype]
    layer = make_layer(TOKENS, OUT, IN, RANK, dtype, "cpu")
    flat, dy, truth = layer.x, layer.grad_output, exact(layer)
    x = flat.detach()[None].requires_grad_()  # (1, tokens, features), as in a model
    lora_A = layer.lora_A.detach().to(dtype).requires_grad_()
    operands = layer.weight, lora_A, layer.lora_B.to(dtype), layer.scaling

    def aten():
        control = AtenControl.apply if torch.is_grad_enabled() else partial(AtenControl.forward, UNSAVED)
        return control(flat, *operands)

    def build(name: str) -> Step:
        if name == ATEN:
            step = Step(Form(aten, (flat, lora_A)), dy)
        else:
            adapter_dtype, context, on_kernels = cell.implementations[name]
            module, trained = adapted_module(layer, adapter_dtype, init="mica")
            ran = {} if on_kernels is None else operators(1, on_kernels=on_kernels)
            called, inputs = (module.base_layer, (x,)) if name == BARE else (module, (x, trained))
            step = Step(Form(partial(called, x), inputs, context, module), dy[None], operators=ran)
        if name not in cell.on_kernels:
            with step.form.context():
                check_errors(name, step.form.errors(step.grad_output, truth), RELATIVE[dtype])
        return step

    return build_all(cell.name, cell.names, build)


def block_steps(cell: Cell) -> dict[str, Step]:
    """Each with its own model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=cell.blocks, bos_token_id=None, eos_token_id=None, **WIDTHS, **CONFIG
    )
    bare = AutoModel.from_config(config, dtype=DTYPES[cell.dtype]).train().requires_grad_(False)
    x, dy = torch.randn(2, 1, TOKENS, config.hidden_size, dtype=DTYPES[cell.dtype]).unbind()
    work = Work(bare, adapted(bare, 0.02), x, dy)

    def build(name: str) -> Step:
        _, context, on_kernels = cell.implementations[name]
        linear = LINEAR_LAYERS * cell.blocks
        ran = {} if on_kernels is None else operators(linear, on_kernels=on_kernels)
        return work.step(name, context, ran)

    gates = dict.fromkeys(("y", "dx", "dA"), BLOCK_GATES[cell.dtype])
    return check_all(cell.name, cell.names, build, gates, (BARE, *cell.on_kernels))


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> dict[str, Step]:
    return block_steps(cell) if cell.blocks else layer_steps(cell)


BLOCKS = pick(quick={1: 30}, default={1: 50}, full={1: 50, 4: 20})  # -> calls in a sample
SETTINGS = [(dtype, False) for dtype in DTYPES] + [(dtype, True) for dtype in DTYPES if dtype == "bfloat16"]
CELLS = [Cell(*setting) for setting in SETTINGS]
CELLS += [Cell(*setting, blocks, (calls, calls)) for setting in SETTINGS for blocks, calls in BLOCKS.items()]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.thread_time)
@turns(CELLS, (NO_GRADIENT, BOTH), lambda cell: ROUNDS, lambda cell, part: cell.names)
def bench_host(once, gated, one_thread, cell, round_, part, implementation):
    """Without a gradient the operators choose which kernels they launch, if any."""
    group, axes = f"{cell.name}, {part}", {**cell.axes, "call": part}
    step = gated(group, lambda: setting(cell), implementation)[implementation]
    launches, has_gradient = no_launch.launches, part == BOTH
    with torch.set_grad_enabled(has_gradient):
        call = None if has_gradient else step.form.forward
        # no work: what launches nothing has no throughput
        runs = step.time(once, group, implementation, axes, cell.calls[has_gradient], call, work={})
    once.note(launches=(no_launch.launches - launches) / runs)


GENERATE_ROUNDS, NEW_TOKENS, PROMPT_TOKENS = 7, 32, 16
GENERATE = {BARE: nullcontext, MERGED: nullcontext, STOCK: mica.fast.disabled, FAST: nullcontext}


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
    axes["dtype"] = "float32"
    call = partial(generated, model, NEW_TOKENS)
    with GENERATE[implementation]():
        once(call, group, implementation, axes, work={throughput.TOKENS: NEW_TOKENS})
