"""One weight's minor subspace: `mica.minor_subspace` of several ranks against a full fp32 `torch.linalg.svd`.

Gaussian weights of the shapes that models have, and SmolLM2's embedding. No time is reported of a result that
is not certified. ``peak_extra`` is the growth of the process's peak memory over the fp32 size of the weight.
"""

from functools import partial
from pathlib import Path

import models
import pytest
import torch

from mica import minor_subspace

RANKS = (16, 64, 128)
ROUNDS = {(11008, 4096): 2, (4096, 11008): 2, (4096, 4096): 3}  # 5 elsewhere
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (2048, 2048), (1024, 4096), (576, 49152)]
RIVALS = {
    "torch.linalg.svd": lambda weight: torch.linalg.svd(weight, full_matrices=False).U,
    **{f"minor_subspace, r = {rank}": partial(minor_subspace, rank=rank) for rank in RANKS},
}
CASES = [(shape, round_) for shape in SHAPES for round_ in range(ROUNDS.get(shape, 5))]


def weight_of(shape):
    if shape == (576, 49152):
        return models.smollm2().get_input_embeddings().weight.detach().T
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def peak_bytes(reset=False):
    """Peak resident memory of this process since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("shape", "round_"), CASES)
def bench_subspace(once, shape, round_, rival):
    weight = weight_of(shape)
    minor_subspace(torch.randn(700, 700), 16)  # libraries and their threads are there
    extra = {}
    if Path("/proc/self/clear_refs").exists():
        before = peak_bytes(reset=True)
        result = RIVALS[rival](weight)
        extra["peak_extra"] = (peak_bytes() - before) / (4 * weight.numel())
        if rival.startswith("minor_subspace"):
            assert result.certified, "no timing of an unproven result"
    once(lambda: RIVALS[rival](weight), f"minor subspace, {shape[0]} x {shape[1]}", rival, **extra)
