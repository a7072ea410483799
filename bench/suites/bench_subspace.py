"""One weight's minor subspace: `mica.minor_subspace` against the full fp32 SVD that stock PEFT takes.

Gaussian weights of the shapes that models have, and SmolLM2's embedding. Rivals: the SVD as it stands, the
SVD of the tall view (a wide weight's ``W.T``: what one line would gain), and the solver's methods. No time is
reported of a result whose certificate the solver could not give. ``peak_extra`` is the growth of memory at
its highest point over the fp32 size of the weight, for weights of 16 MB and more.
"""

import functools
import time

import pytest
import torch

from bench.results.names import SVD, SVD_TALL
from bench.suites.harness import DEVICE, iterations, peak_growth, pick
from mica import minor_subspace
from tests.support import models

EMBEDDING = (576, 49152)
# Rounds of each shape (out x in).
SHAPES = pick(
    quick={(576, 576): 5, (1024, 1024): 5, (2048, 2048): 2},
    default={
        (512, 512): 8,
        (576, 576): 8,
        (1536, 576): 8,
        (1024, 1024): 6,
        (1024, 4096): 5,
        (4096, 1024): 5,
        (2048, 2048): 3,
        (4096, 4096): 2,
        EMBEDDING: 3,
    },
    full={
        (512, 512): 8,
        (576, 576): 8,
        (1024, 1024): 8,
        (1024, 4096): 5,
        (2048, 2048): 5,
        (4096, 4096): 3,
        (4096, 11008): 2,
        (11008, 4096): 2,
        EMBEDDING: 5,
    },
)
METHODS = {
    "auto, r = 16": ("auto", 16),
    "auto, r = 64": ("auto", 64),
    "auto, r = 128": ("auto", 128),
    "krylov, r = 16": ("krylov", 16),
    "gram, r = 16": ("gram", 16),
}


def weight_of(shape):
    if shape == EMBEDDING:
        return models.smollm2().get_input_embeddings().weight.detach().T.to(DEVICE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def rivals(shape, weight):
    found = {SVD: lambda: torch.linalg.svd(weight, full_matrices=False).U}
    if shape[0] < shape[1]:
        found[SVD_TALL] = lambda: torch.linalg.svd(weight.T, full_matrices=False).Vh.T
    for name, (method, rank) in METHODS.items():
        found[f"minor_subspace, {name}"] = functools.partial(minor_subspace, weight, rank, method=method)
    return found


@functools.lru_cache(maxsize=1)
def setting(shape):
    weight = weight_of(shape)
    minor_subspace(torch.randn(700, 700), 16)  # libraries and their threads are there
    found = rivals(shape, weight)
    seconds = {}
    for name, (_, rank) in METHODS.items():
        rival = f"minor_subspace, {name}"
        start = time.perf_counter()
        result = found[rival]()
        seconds[rival] = time.perf_counter() - start
        assert result.certified, f"{rival}: not certified"
        error = float((result.basis.T @ result.basis - torch.eye(rank)).abs().max())
        assert error <= 1e-6, f"{rival}: BᵀB is off by {error:.1e}"
    return found, iterations(min(seconds.values()))


def names(shape):
    tall = [SVD_TALL] if shape[0] < shape[1] else []
    return [SVD, *tall, *(f"minor_subspace, {name}" for name in METHODS)]


CASES = [
    (shape, round_, rival)
    for shape, rounds in SHAPES.items()
    for round_ in range(rounds)
    for rival in names(shape)
]


@pytest.mark.parametrize(("shape", "round_", "rival"), CASES)
def bench_subspace(once, gated, shape, round_, rival):
    group = f"minor subspace, {shape[0]} x {shape[1]}"
    calls, count = gated(group, lambda: setting(shape))
    axes = {"suite": "subspace", "out": shape[0], "in": shape[1]}
    with peak_growth() as growth:
        once(calls[rival], group, rival, axes, count)
    if growth() is not None and shape[0] * shape[1] >= 2**22:
        once.note(peak_extra=growth() / (4 * shape[0] * shape[1]))
