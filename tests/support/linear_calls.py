"""The forward and backward of a layer or of a stack of experts through an operator, on the tested device."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mica.ops import embedding as embeddings
from mica.ops import mica_experts_linear, mica_linear
from mica.ops.linear import linear
from tests.support.kernel_cases import DEVICE
from tests.support.oracle import Problem
from tests.support.tolerances import RELATIVE, error

# how 16-bit matrices are multiplied (`mica.paths.products`); what a layer runs on
OWN, _, IN_CHUNKS = WAYS = ("PyTorch's own", "through fp32", "through fp32 in chunks")
NATIVE = "PyTorch's own, from C++"
PATHS = ("triton",) if DEVICE != "cpu" else (NATIVE, *WAYS, "triton")


def on_device(p: Problem) -> Problem:
    tensors = {name: value.to(DEVICE) for name, value in vars(p).items() if isinstance(value, torch.Tensor)}
    return replace(p, **tensors)


def tensors_of(p: Problem) -> list[torch.Tensor]:
    return [value for value in vars(p).values() if isinstance(value, torch.Tensor)]


def adapted(y, x, lora_A, lora_B, scaling=1.0, *, compute_dtype=None, dropout_p=0.0, seed=None):
    """y + s·(drop(x) Aᵀ) Bᵀ, where y is what the base layer has returned."""
    numbers = scaling, None, compute_dtype, dropout_p, seed, None, lora_B.requires_grad
    return linear(x, None, lora_A, lora_B, *numbers, y)


def embedding(indices, lora_A, lora_B, scaling=1.0, *, padding_idx=None):
    return embeddings.embedding(indices, lora_A, lora_B, scaling, padding_idx, None)


def by_call(x, weight, lora_A, lora_B, scaling=1.0, bias=None, **options):
    """What `mica_linear` computes, where the base layer is called."""
    return adapted(F.linear(x, weight, bias), x, lora_A, lora_B, scaling, **options)


def contiguous(p: Problem) -> Problem:
    names = ("x", "weight", "lora_A", "lora_B", "grad_output")
    return on_device(replace(p, **{name: getattr(p, name).contiguous() for name in names}))


def trained_of(p: Problem) -> list[torch.Tensor]:
    return [p.x, p.lora_A, p.lora_B] if p.lora_B.requires_grad else [p.x, p.lora_A]


def leaves(p: Problem, needs=(True, True, True)) -> tuple[torch.Tensor, ...]:
    """x, A and, of LoRA, B, each in memory of its own, that need gradients."""
    copies = [tensor.detach().clone() for tensor in trained_of(p)]
    return tuple(map(torch.Tensor.requires_grad_, copies, needs))


def call(p: Problem, function, x, lora_A, lora_B=None, **options) -> torch.Tensor:
    """With the other operands of a layer, or of a stack of experts."""
    offsets = [] if p.offsets is None else [p.offsets]
    lora_B = p.lora_B if lora_B is None else lora_B
    return function(x, *offsets, p.weight, lora_A, lora_B, p.scaling, p.bias, **options)


def run(p: Problem, compute_dtype=None, function=None, **options) -> dict:
    """y, dx, dA and, of LoRA, dB of ``function``, by default `mica_linear` or `mica_experts_linear`."""
    function = function or (mica_linear if p.offsets is None else mica_experts_linear)
    trained = [tensor.detach().requires_grad_() for tensor in trained_of(p)]  # in their own memory
    y = call(p, function, *trained, compute_dtype=compute_dtype, **options)
    y.backward(p.grad_output)
    names = ("grad_x", "grad_A", "grad_B")[: len(trained)]
    return {"y": y, **{name: tensor.grad for name, tensor in zip(names, trained, strict=True)}}


def kept_by(function) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What it saves for the backward, and its result."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = function()
    return kept, result


def saved_by(function) -> tuple[set[int], torch.Tensor]:
    """The addresses of what it saves for the backward, and its result."""
    kept, result = kept_by(function)
    return addresses(*kept), result


def addresses(*tensors) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors if tensor is not None}


def agree(actual: dict, expected: dict, dtype) -> None:
    for name, value in actual.items():
        assert error(value, expected[name]) <= RELATIVE[dtype], name


def same_bits(actual: dict, expected: dict) -> None:
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


class Marked(torch.autograd.Function):
    """Triples its input in place and gives a second output, which PyTorch refuses of a view."""

    @staticmethod
    def forward(ctx, y):
        ctx.mark_dirty(y)
        y.mul_(3)
        return y, y.sum()

    @staticmethod
    def backward(ctx, grad, _):
        return 3 * grad


class Seen(TorchDispatchMode):
    """What PyTorch computes in it, without views: the operators, and how large the results are."""

    def __init__(self):
        super().__init__()
        self.names, self.results = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.names.append(function._schema.name)
            self.results += [(t.dtype, t.numel()) for t in (result,) if isinstance(t, torch.Tensor)]
        return result

    def largest(self, dtype: torch.dtype) -> int:
        return max((numel for own, numel in self.results if own == dtype), default=0)


class SeenFunctions(TorchFunctionMode):
    """The functions of PyTorch that are called in it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def arguments() -> dict[str, tuple]:
    """Those of every operator, all matrices contiguous."""
    x, W, A, B, b = (torch.randn(*shape) for shape in ((6, 16), (24, 16), (4, 16), (24, 4), (24,)))
    dy, h, indices = torch.randn(6, 24), torch.randn(6, 4), torch.randint(0, 16, (6,))
    experts, offsets = [torch.randn(2, *t.shape) for t in (W, A, B, b)], torch.tensor([2, 5])
    both, fp32 = [True, True], torch.float32
    return {
        "linear": (x, W, A, B, 0.5, b, None),
        "grad_b": (dy, h, fp32, None, 16),
        "linear_backward": (dy, x, both, W, A, B, 0.5, None, fp32),
        "embedding": (indices, A, B, 0.5, None, None),
        "embedding_backward": (dy, indices, A, B, 0.5, 3),
        "experts_linear": (x, offsets, *experts[:3], 0.5, experts[3], None),
        "experts_grad_b": (dy, h, offsets, fp32),
        "experts_linear_backward": (dy, x, offsets, both, *experts[:3], 0.5, None, fp32),
    }


def of_users(warned) -> list[str]:
    """The messages of recorded warnings, without NumPy's deprecations in Triton 3.6's interpreter."""
    return [str(each.message) for each in warned if Path(each.filename).name != "interpreter.py"]
