"""MODELLED, not measured: launches and bytes of a training step of a whole model (for ``-m bench.model``).

The adapted layers are those of `bench.kernel_cost`. The rest is the same for every rival: what Hugging Face's
code launches for a decoder without torch.compile, as a dispatch mode sees it (tests/bench/test_step_cost.py
compares), with PyTorch's attention as one kernel each way, the head over all tokens and a loss in fp32.
No gradient checkpointing; the embedding is looked up by the caller, and its output requires a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bench import kernel_cost
from bench.architectures import Architecture, Projections
from bench.kernel_cost import BF16, FP32, Cost, Device, Kernel, Layer, ceil_div, gemm
from bench.results import BARE, FAST, GROUPED, STOCK, STOCK_16, UNGROUPED
from mica.kernels.common import MAX_RANK

# Attention kernels reach this share of the rate of products (FlashAttention's authors report about that much
# for forwards; ASSUMED for both ways), and the backward computes 2.5 times what the forward does.
ATTENTION_SPEED, ATTENTION_BACKWARD = 0.6, 2.5

# Elementwise launches, forward and backward, a word each: a letter for every matrix that one reads or writes,
# "b" with numbers of the base's dtype, "f" fp32, "." for a launch of next to no bytes. Half a matrix read and
# half of one written count as one. A cast, "bf" or "fb", is not there where the base is fp32.
PASSES: dict[str, tuple[str, str]] = {
    # x to fp32, x², mean, + eps, rsqrt, x · that, to bf16, · weight
    "RMSNorm": ("bf ff f . . ff fb bb", "bb bf fff ff f . . . f ff ff fff fff fb"),
    "LayerNorm": ("bb", "bbb"),
    # x · cos, -half, both halves, · sin, +; then the gradient of a transposed view, made contiguous
    "rope": ("bb b bb bb bbb", "bb b bb b bbb bb bbb bb"),
    "copy to the cache of k and v": ("bb", "."),
    "q/k/v of one tensor": ("", "bb"),
    "positions": ("bb", ""),
    "SiLU · up": ("bb bbb", "bbb bbb bbb"),
    "GELU, by tanh": ("bb bb bb bbb bb bb bb bbb", "bbb bbb bbb bb bb bb bb bbb bbb bb bbb"),
    "residual": ("bbb", "bbb"),
    # to fp32, log softmax, negative log likelihood
    "loss": ("bf ff .", "f fff fb"),
}


class Part(NamedTuple):
    """Launches of forward and backward."""

    forward: list[Kernel]
    backward: list[Kernel]

    def seconds(self, device: Device) -> float:
        return sum(kernel.seconds(device) for kernel in (*self.forward, *self.backward))


def passes(name: str, numbers: int, size: int) -> Part:
    """A row of `PASSES` over matrices of ``numbers`` numbers, those of the base of ``size`` bytes."""
    letters = {"b": size, "f": FP32, ".": 0}

    def launches(words: str) -> list[Kernel]:
        there = (word for word in words.split() if size != FP32 or word not in ("bf", "fb"))
        return [Kernel(numbers * sum(letters[letter] for letter in word)) for word in there]

    forward, backward = PASSES[name]
    return Part(launches(forward), launches(backward))


def attention(model: Architecture, tokens: int, sequence: int, size: int) -> Part:
    """Causal: half of all pairs. Scores are never in memory; the backward makes them again."""
    flops = 2.0 * tokens * sequence * model.width  # two products, 2 flops a pair and number, halved
    q, kv = tokens * model.width, tokens * model.kv_width
    unit = "tensor" if size == BF16 else "fp32"
    forward = Kernel(size * (2 * q + 2 * kv), flops, unit, speed=ATTENTION_SPEED)  # q k v, o
    # do o q k v, dq dk dv
    backward = Kernel(size * (4 * q + 4 * kv), ATTENTION_BACKWARD * flops, unit, speed=ATTENTION_SPEED)
    return Part([forward], [backward])


def others(model: Architecture, tokens: int, sequence: int, size: int) -> dict[str, Part]:
    """The launches that no adapter touches, by what they are for."""

    def rows(name: str, width: int, times: int) -> Part:
        once = passes(name, tokens * width, size)
        return Part(once.forward * times, once.backward * times)

    width, layers, kv = model.width, model.layers, model.kv_width
    flash = attention(model, tokens, sequence, size)
    found = {
        "attention": Part(flash.forward * layers, flash.backward * layers),
        "residual": rows("residual", width, 2 * layers),
        "cache": rows("copy to the cache of k and v", kv, 2 * layers),
    }
    if model.gpt2:
        found["norms"] = rows("LayerNorm", width, 2 * layers + 1)
        found["activation"] = rows("GELU, by tanh", model.feed_forward, layers)
        found["q/k/v"] = rows("q/k/v of one tensor", width + 2 * kv, layers)
        found["positions"] = rows("positions", width, 1)
    else:
        found["norms"] = rows("RMSNorm", width, 2 * layers + 1)
        found["activation"] = rows("SiLU · up", model.feed_forward, layers)
        q, k = rows("rope", width, layers), rows("rope", kv, layers)
        found["rope"] = Part(q.forward + k.forward, q.backward + k.backward)
    vocabulary = model.vocabulary
    found["head"] = Part([gemm(tokens, vocabulary, width, size)], [gemm(tokens, width, vocabulary, size)])
    found["loss"] = rows("loss", vocabulary, 1)
    return found


# torch.optim.AdamW as its tensor operations come: p decays, m and v move on, √v, / a number, + eps, p += m/√v
ADAMW_MATRICES = (2, 3, 2, 3, 2, 2, 2, 4)
# Of so many tensors at once where they are on a GPU (four lists of tensors: PyTorch's multi_tensor_apply)
TENSORS_A_LAUNCH = 36


def adamw(model: Architecture, rank: int, size: int, together: bool) -> list[Kernel]:
    """The optimizer's launches for every A, numbers of ``size`` bytes; a tensor each or many ``together``."""
    numbers = trainable(model, rank)
    tensors = sum(model.weights().values())
    launches = ceil_div(tensors, TENSORS_A_LAUNCH) if together else tensors
    return [
        Kernel(size * matrices * numbers // launches) for matrices in ADAMW_MATRICES for _ in range(launches)
    ]


def trainable(model: Architecture, rank: int) -> int:
    """Numbers of all A (rank × in_features)."""
    return sum(count * rank * inner for (_, inner), count in model.weights().items())


@dataclass(frozen=True)
class Rival:
    """``form`` of one layer; ``adapter``: bytes a number of A and its optimizer states (0: there is no A)."""

    form: str
    adapter: int
    grouped: bool = False
    copies: bool = False  # every layer casts x for itself and keeps the copy


def rivals(device: Device, size: int = BF16) -> dict[str, Rival]:
    """Who runs there. On a CPU mica.fast is its PyTorch form; elsewhere it is kernels, for bf16."""
    found = {
        BARE: Rival("bare frozen linear", 0),
        STOCK: Rival(kernel_cost.STOCK, FP32, copies=size != FP32),
        STOCK_16: Rival("stock PEFT, bf16 adapters", size),
    }
    if size == FP32:  # its adapters are in the base dtype already
        del found[STOCK_16]
    if device.target == "cpu":
        return {**found, FAST: Rival("aten reference", FP32)}
    if size != BF16:
        raise ValueError("the kernels are modelled for bf16 only")
    return {**found, UNGROUPED: Rival("split", FP32), GROUPED: Rival("split", FP32, grouped=True)}


def layers_of(group: Projections, tokens: int, rank: int, device: Device, size: int) -> list[Layer]:
    return [
        Layer(tokens, out, group.in_features, rank, device.target, size=size) for out in group.out_features
    ]


def group_cost(group: Projections, rival: Rival, layers: list[Layer]) -> list[Cost]:
    """Layers on one x: together where the rival groups them, else one by one and autograd's sums of dx."""
    shared = len(layers) > 1 and len(layers) * layers[0].rank <= MAX_RANK  # the kernels' own limit
    if rival.grouped and shared:
        return [kernel_cost.grouped(layers)[0]]
    m, k, size = layers[0].m, group.in_features, layers[0].size
    sums = [kernel_cost.elementwise(m * k, size, size, size)] * (len(layers) - 1)
    return [*(kernel_cost.FORMS[rival.form](layer) for layer in layers), Cost([], sums, 0)]


def kept(name: str, group: Projections, rival: Rival, layers: list[Layer]) -> int:
    """Bytes that the adapters keep for the backward beyond what the bare model keeps.

    A copy is kept for every layer. x itself is one tensor for all layers that read it, and none at all where
    the attention has kept it anyway, as its own result.
    """
    if not rival.adapter:
        return 0
    if rival.copies:
        return sum(kernel_cost.FORMS[rival.form](layer).saved for layer in layers)
    return 0 if name in ("o", "attn.c_proj") else layers[0].size * layers[0].m * group.in_features


class Step(NamedTuple):
    """Modelled: seconds of a step and of its adapted layers; bytes kept for the backward, of A, of AdamW."""

    seconds: float
    linear: float
    saved: int
    trainable: int
    optimizer: int
    launches: int


def step_cost(
    model: Architecture, device: Device, tokens: int, sequence: int, rank: int, size: int = BF16
) -> dict[str, Step]:
    """Forward, backward and AdamW on A of every rival, ``tokens`` in sequences of ``sequence``."""
    rest = [*_kernels(others(model, tokens, sequence, size).values())]
    found = {}
    for name, rival in rivals(device, size).items():
        linear, saved = [], 0
        for part, group in model.block().items():
            layers = layers_of(group, tokens, rank, device, size)
            linear += _kernels(group_cost(group, rival, layers))
            saved += kept(part, group, rival, layers)
        linear *= model.layers
        update = adamw(model, rank, rival.adapter, device.target != "cpu") if rival.adapter else []
        bytes_ = trainable(model, rank) * rival.adapter
        seconds = [sum(one.seconds(device) for one in part) for part in (linear, rest, update)]
        launches = len(linear) + len(rest) + len(update)
        found[name] = Step(sum(seconds), seconds[0], saved * model.layers, bytes_, 2 * bytes_, launches)
    return found


def _kernels(parts) -> Iterator[Kernel]:
    for part in parts:
        yield from part[0]
        yield from part[1]
