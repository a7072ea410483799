"""A modelled step: shapes and memory as published and measured, passes as Hugging Face's code makes them."""

from collections import Counter
from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

step_cost = import_module("bench.step_cost")
kernel_cost = import_module("bench.kernel_cost")
architectures = import_module("bench.architectures")
results = import_module("bench.results")

H100 = kernel_cost.DEVICES["h100"]
CPU = kernel_cost.Device("cpu", 1e12, 2e11, 1e10, 2e-6)
TINY = architectures.Architecture(1, 64, 208, 4, 2, 304)
TINY_GPT2 = architectures.Architecture(1, 64, 256, 4, 4, 304, gpt2=True)
SEQUENCES, SEQUENCE = 2, 12
TOKENS = SEQUENCES * SEQUENCE
LARGE = TOKENS * 16  # numbers: less than that is "." in the table; k has TOKENS * 32, a row of it 24


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("gpt2", 124_439_808),
    ],
)
def test_parameters_are_those_published(name, published):
    # norms and biases are left out, and GPT-2's 0.6 % of learnt positions
    assert architectures.ARCHITECTURES[name].parameters == pytest.approx(published, rel=1e-2)
    if name.startswith("llama"):
        width, layers = (getattr(architectures.ARCHITECTURES[name], part) for part in ("width", "layers"))
        assert architectures.ARCHITECTURES[name].parameters == published - (2 * layers + 1) * width


def test_linear_layers_counted_by_hand():
    assert architectures.ARCHITECTURES["smollm2-135m"].weights() == {
        (576, 576): 60,
        (192, 576): 60,
        (1536, 576): 60,
        (576, 1536): 30,
    }
    assert TINY_GPT2.weights() == {(192, 64): 1, (64, 64): 1, (256, 64): 1, (64, 256): 1}


class Launches(TorchDispatchMode):
    """Bytes of every launch but products, attention and positions looked up. What is expanded is small."""

    def __init__(self):
        super().__init__()
        self.bytes = []
        self.products = 0.0
        self.attention = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in ("empty", "detach", "_unsafe_view", "embedding"):
            return result
        operands = [
            one for one in (*_flat(args), *_flat([result])) if one.numel() and one.is_floating_point()
        ]
        sizes = [
            one.element_size() * one.numel()
            for one in operands
            if one.numel() >= LARGE and 0 not in one.stride()
        ]
        if name in ("mm", "addmm"):
            product = args[-2:]
            self.products += 2.0 * product[0].numel() * product[1].shape[1]
        elif name.startswith("_scaled_dot_product"):
            self.attention.append(sum(sizes))
        elif name == "nll_loss_backward":
            self.bytes.append(sizes[-1])  # of the log-probabilities it takes the shape only
        elif name == "nll_loss_forward":
            self.bytes.append(0)  # one of each row
        else:
            self.bytes.append(sum(sizes))
        return result


def _flat(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)


CONFIGS = {
    "llama": (
        TINY,
        LlamaConfig(
            hidden_size=64,
            intermediate_size=208,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=1,
            vocab_size=304,
        ),
    ),
    "gpt2": (
        TINY_GPT2,
        GPT2Config(n_embd=64, n_head=4, n_layer=1, vocab_size=304, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_passes_are_those_of_hugging_faces_code(name, dtype):
    model, config = CONFIGS[name]
    size = dtype.itemsize
    network = AutoModelForCausalLM.from_config(config, dtype=dtype).train().requires_grad_(False)
    ids = torch.randint(0, 304, (SEQUENCES, SEQUENCE))
    embedded = network.get_input_embeddings()(ids).detach().requires_grad_()
    forward, backward = Launches(), Launches()
    with forward:
        loss = network(inputs_embeds=embedded, labels=ids).loss
    with backward:
        loss.backward()
    parts = step_cost.others(model, TOKENS, SEQUENCE, size)
    for way, seen in (("forward", forward), ("backward", backward)):
        attention = [kernel.bytes for kernel in getattr(parts["attention"], way)]
        # PyTorch also keeps a number a row and head
        assert len(seen.attention) == 1
        assert seen.attention[0] == pytest.approx(attention[0], rel=0.05)
        counted = [
            kernel.bytes
            for part, launches in parts.items()
            if part not in ("attention", "head")
            for kernel in getattr(launches, way)
        ]
        # autograd's sums of dx in a group are those of the adapted layers
        sums = [3 * size * TOKENS * 64] * (3 if way == "backward" and not model.gpt2 else 0)
        large = Counter(bytes_ for bytes_ in seen.bytes if bytes_)
        # where half of q or k is read and all of it written, twice, the table has a "bb" and a "b"
        expected = Counter(bytes_ for bytes_ in [*counted, *sums] if bytes_)
        assert large.total() == pytest.approx(expected.total(), abs=2)
        assert sum(seen.bytes) == pytest.approx(sum(counted) + sum(sums), rel=0.02)
    linear = sum(2.0 * TOKENS * out * inner * count for (out, inner), count in model.weights().items())
    head = 2.0 * TOKENS * 64 * 304
    assert forward.products == backward.products == linear + head
    assert [kernel.flops for way in parts["head"] for kernel in way] == [head, head]


def test_attention_counted_by_hand():
    part = step_cost.attention(TINY, TOKENS, SEQUENCE, 2)
    q, kv = 24 * 64, 24 * 32
    # q kᵀ and p v: 4 heads, 12 x 12 pairs of which half, 2 flops for each of 16 numbers, 2 sequences
    flops = 2 * (4 * 12 * 12 / 2 * 2 * 16) * 2
    assert part.forward == [kernel_cost.Kernel(2 * (2 * q + 2 * kv), flops, speed=0.6)]
    assert part.backward == [kernel_cost.Kernel(2 * (4 * q + 4 * kv), 2.5 * flops, speed=0.6)]


def test_optimizer_counted_by_hand():
    # A of q, k, v, o, gate, up: 3 x 64; of down: 3 x 208
    numbers = 6 * 3 * 64 + 3 * 208
    assert step_cost.trainable(TINY, 3) == numbers
    together, alone = (step_cost.adamw(TINY, 3, 4, flag) for flag in (True, False))
    assert (len(together), len(alone)) == (8, 8 * 7)
    # w: r w; m: r m g, w m; v: r w; v: r v g, w v; √: r w; /: r w; + eps: r w; w: r w m √v, w w
    assert sum(kernel.bytes for kernel in together) == 4 * 20 * numbers
    assert sum(kernel.bytes for kernel in alone) == pytest.approx(4 * 20 * numbers, abs=56)


def test_memory_is_what_has_been_measured():
    """Bytes kept for the backward of SmolLM2-135M on 2 x 512 tokens, beyond the bare model's: bench_step."""
    model = architectures.ARCHITECTURES["smollm2-135m"]
    kept = {size: step_cost.step_cost(model, CPU, 1024, 512, 16, size) for size in (2, 4)}
    bf16 = {name: step.saved / 1e6 for name, step in kept[2].items()}
    fp32 = {name: step.saved / 1e6 for name, step in kept[4].items()}
    assert bf16 == pytest.approx(
        {results.BARE: 0, results.STOCK: 1338 - 724.2, results.STOCK_16: 165.2, results.FAST: 889.4 - 724.2},
        abs=1,
    )
    assert fp32 == pytest.approx(
        {results.BARE: 0, results.STOCK: 1432 - 1102, results.FAST: 1432 - 1102}, abs=1
    )


def test_memory_counted_by_hand():
    steps = step_cost.step_cost(TINY, H100, 24, 12, 3)
    x, down = 24 * 64, 24 * 208
    saved = {name: step.saved for name, step in steps.items()}
    assert saved == {
        results.BARE: 0,
        results.STOCK: 4 * (6 * x + down),  # a copy for each of q, k, v, o, gate, up and down
        results.STOCK_16: 2 * (2 * x + down),  # x of q/k/v and of gate/up; o's is attention's result
        results.UNGROUPED: 2 * (2 * x + down),
        results.GROUPED: 2 * (2 * x + down),
    }
    numbers = 6 * 3 * 64 + 3 * 208
    assert {name: (step.trainable, step.optimizer) for name, step in steps.items()} == {
        results.BARE: (0, 0),
        results.STOCK: (4 * numbers, 8 * numbers),
        results.STOCK_16: (2 * numbers, 4 * numbers),
        results.UNGROUPED: (4 * numbers, 8 * numbers),
        results.GROUPED: (4 * numbers, 8 * numbers),
    }


def test_a_step_is_the_sum_of_its_layers_and_the_rest():
    """Of the bare model and of the grouped form, put together here launch by launch."""
    model, m = TINY._replace(layers=3), 24
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (208, 64), (208, 64), (64, 208)]
    layers = [kernel_cost.Layer(m, n, k, 3, "sm_90") for n, k in shapes]
    sums = [kernel_cost.elementwise(m * 64, 2, 2, 2)] * 3
    bare = [*sums, *(kernel for layer in layers for part in kernel_cost.bare(layer)[:2] for kernel in part)]
    costs = [
        kernel_cost.grouped(layers[:3])[0],
        kernel_cost.ours(layers[3], fused=False),
        kernel_cost.grouped(layers[4:6])[0],
        kernel_cost.ours(layers[6], fused=False),
    ]
    grouped = [kernel for cost in costs for part in cost[:2] for kernel in part]
    rest = sum(part.seconds(H100) for part in step_cost.others(model, 24, 12, 2).values())
    update = sum(kernel.seconds(H100) for kernel in step_cost.adamw(model, 3, 4, True))
    steps = step_cost.step_cost(model, H100, 24, 12, 3)
    assert steps[results.BARE].seconds == pytest.approx(
        3 * sum(kernel.seconds(H100) for kernel in bare) + rest
    )
    assert steps[results.GROUPED].seconds == pytest.approx(
        3 * sum(kernel.seconds(H100) for kernel in grouped) + rest + update
    )
    assert steps[results.STOCK].seconds > steps[results.UNGROUPED].seconds > steps[results.GROUPED].seconds


def test_a_group_wider_than_the_kernels_runs_layer_by_layer():
    steps = step_cost.step_cost(TINY, H100, 24, 12, 200)
    assert steps[results.GROUPED] == steps[results.UNGROUPED]


def test_kernels_are_not_modelled_in_fp32():
    with pytest.raises(ValueError, match="bf16 only"):
        step_cost.step_cost(TINY, H100, 24, 12, 3, 4)
