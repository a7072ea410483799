"""Minor subspaces by their definition, without the solver, and their comparison."""

import dataclasses
import math
import warnings
from contextlib import contextmanager

import pytest
import torch

from mica.subspace import MinorSubspace, methods, minor_subspace, solver
from mica.subspace.content_hash import content_hash

# Tall, wide, square; small sides without and (from 128 on: conftest) with room for Krylov subspaces.
SHAPES = [(120, 40), (40, 120), (60, 60), (200, 140), (140, 200), (150, 150)]


def solved(weight, rank, **changes):
    """The solver's result by its definition, on its own: fp64 SVD, excess of the basis as rounded."""
    exact = weight.detach().double()
    left, values, _ = torch.linalg.svd(exact, full_matrices=False)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    basis = left[:, -rank:].to(dtype).contiguous()
    least = values[-rank:].square().sum().item()
    resolution = 4 * math.sqrt(min(weight.shape)) * torch.finfo(torch.float64).eps * values[0].item() ** 2
    reference = max(least, rank * resolution)
    excess = max(0.0, (exact.T @ basis.double()).square().sum().item() - least)
    proven = {"certified": True, "energy_excess": excess / reference if reference else 0.0}
    result = MinorSubspace(basis, values[-rank:].to(dtype), method="svd", resolution=resolution, **proven)
    return dataclasses.replace(result, **changes)


@contextmanager
def beginning_with(method):
    """On the host the solver tries this method first; "auto": as it does."""
    names = list(methods.BY)
    with pytest.MonkeyPatch.context() as patch:
        if method != "auto":
            patch.setattr(solver, "chain", lambda size, rank: names[names.index(method) :])
        yield


def solved_by(method, weight, rank):
    with beginning_with(method):
        return minor_subspace(weight, rank)


def quietly_solved(weight, rank, method="auto"):
    """The solver's result, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return solved_by(method, weight, rank)


def put(cache, weight, rank=4, **changes):
    """``solved`` kept by a cache."""
    subspace = solved(weight, rank, **changes)
    cache.put(content_hash(weight), subspace)
    return subspace


def get(cache, weight, rank=4):
    return cache.get(content_hash(weight), rank)


def same(first, second):
    return all(
        torch.equal(value, vars(second)[name]) if torch.is_tensor(value) else value == vars(second)[name]
        for name, value in vars(first).items()
    )


def only_file(folder):
    (path,) = folder.iterdir()
    return path
