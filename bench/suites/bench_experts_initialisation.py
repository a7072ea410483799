"""A MiCA adapter on a stack of experts: `get_peft_model` against a loop of SVDs over the same experts.

Stock PEFT has no MiCA there; the loop is what its initialisation of a linear layer would do for each expert.
Gaussian experts of 768 x 2048 in fp32 (the down projection of Qwen3-30B-A3B, stored as PyTorch stores a
linear layer), r = 16. A basis that is not certified refuses the number.
"""

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import mica.fast  # noqa: F401  (so that PEFT initialises experts)
from bench.measure.machine import DEVICE
from bench.results.names import FAST, SVD
from bench.suites.harness import build_all, pick
from mica.fast.forward.expert_params import lora_B_of

OUT, INNER, RANK = pick(default=(768, 2048, 16), dry=(48, 64, 4))
EXPERTS = pick(default=32, quick=8, full=128, cuda=128, dry=3)
ROUNDS = pick(default=3, quick=2, full=2, cuda=2, dry=1)
GROUP = f"experts init, {EXPERTS} experts of {OUT} x {INNER}"
AXES = {"suite": "experts init", "experts": EXPERTS, "out": OUT, "in": INNER, "rank": RANK}


class Experts(nn.Module):
    def __init__(self, stack: Tensor):
        super().__init__()
        self.down_proj = nn.Parameter(stack, requires_grad=False)


def adapted(stack: Tensor):
    """The layer around a new adapter of the stack (experts, out, in)."""
    config = LoraConfig(
        init_lora_weights="mica", r=RANK, target_parameters=["experts.down_proj"], target_modules=[]
    )
    model = get_peft_model(nn.ModuleDict({"experts": Experts(stack)}), config)
    return model.base_model.model["experts"]


def loop(stack: Tensor) -> list[Tensor]:
    return [torch.linalg.svd(weight, full_matrices=False).U[:, -RANK:] for weight in stack]


def energy(stack: Tensor, basis: Tensor) -> Tensor:
    """‖BᵀW‖² of each expert: larger for any other subspace."""
    return (basis.mT @ stack).square().sum((1, 2))


@functools.cache
def setting() -> dict[str, Callable]:
    stack = torch.randn(EXPERTS, OUT, INNER, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch.linalg.svd(stack[0, :64, :64])  # loads libraries

    def build(name: str) -> Callable:
        if name == SVD:
            return lambda: loop(stack)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what is not certified is said in a warning
            bases = lora_B_of(adapted(stack), "default").detach()
        error = float((bases.mT @ bases - torch.eye(RANK, device=DEVICE)).abs().max())
        assert error <= 1e-5, f"BᵀB is off by {error:.1e}"
        few = stack[:2]
        excess = float((energy(few, bases[:2]) / energy(few, torch.stack(loop(few))) - 1).abs().max())
        assert excess <= 1e-3, f"‖BᵀW‖² differs from the SVD's by {excess:.1e}"
        return lambda: adapted(stack)

    return build_all(GROUP, [SVD, FAST], build)


@pytest.mark.parametrize("implementation", [SVD, FAST])
@pytest.mark.parametrize("round_", range(ROUNDS))
def bench_experts_initialisation(once, gated, round_, implementation):
    calls = gated(GROUP, setting, implementation)
    once(calls[implementation], GROUP, implementation, AXES)
