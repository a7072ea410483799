import dataclasses
import math

import pytest
import torch
from huggingface_hub import constants
from subspaces import same, solved

from mica import minor_subspace
from mica.subspace import cache as cache_module
from mica.subspace.cache import SubspaceCache, default_cache, fingerprint

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def only_file(folder):
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def weight():
    return torch.randn(24, 30)


@pytest.fixture
def cache(tmp_path):
    return SubspaceCache(tmp_path / "not" / "there yet")


# What is stored comes back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 30), (30, 24), (7, 5), (1, 9), (9, 1)])
def test_round_trip(cache, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    rank = min(4, *shape)
    subspace = solved(weight, rank)
    assert cache.get(weight, rank) is None
    cache.put(weight, subspace)
    for reader in (cache, SubspaceCache(str(cache.folder))):
        found = reader.get(weight.clone(), rank)
        assert found is not subspace
        assert found.basis.dtype == found.singular_values.dtype == subspace.basis.dtype
        assert found.basis.is_contiguous()
        assert same(found, subspace)
    assert cache.get(torch.randn(shape).to(dtype), rank) is None


def test_of_a_parameter_and_of_a_view_of_an_embedding(cache):
    parameter = torch.nn.Parameter(torch.randn(40, 12))
    subspace = solved(parameter.detach().T, 3)
    cache.put(parameter.T, subspace)
    assert same(cache.get(parameter.T, 3), subspace)
    assert not cache.get(parameter.T, 3).basis.requires_grad


def test_results_outlive_their_file(cache, weight):
    subspace = solved(weight, 4)
    cache.put(weight, subspace)
    found = cache.get(weight, 4)
    path = only_file(cache.folder)
    path.write_bytes(bytes(path.stat().st_size))
    path.unlink()
    found.basis.mul_(1)  # writable
    assert same(found, subspace)


def test_a_key_computed_once_is_enough(cache, weight, monkeypatch):
    key = fingerprint(weight)
    monkeypatch.setattr(cache_module, "fingerprint", None)
    subspace = solved(weight, 4)
    cache.put(weight, subspace, key=key)
    assert same(cache.get(weight, 4, key=key), subspace)


# Ranks


@pytest.mark.parametrize("shape", [(24, 30), (30, 24), (40, 64)])
def test_smaller_ranks_take_the_last_columns_and_are_certified(cache, shape):
    weight = torch.randn(shape)
    whole = solved(weight, 8)
    cache.put(weight, whole)
    for rank in range(1, 8):
        found = cache.get(weight, rank)
        assert torch.equal(found.basis, whole.basis[:, -rank:])
        assert torch.equal(found.singular_values, whole.singular_values[-rank:])
        assert found.basis.is_contiguous()
        assert (found.method, found.certified, found.resolution) == ("svd", True, whole.resolution)
        actual = solved(weight, rank).energy_excess
        assert actual <= found.energy_excess + 1e-12
        assert found.energy_excess <= 1e-5
    for rank in (0, -1, 9, 1000):
        assert cache.get(weight, rank) is None


def graded(*values):
    """A wide diagonal weight with these singular values; the solved basis holds unit vectors."""
    weight = torch.zeros(len(values), len(values) + 3)
    weight.diagonal().copy_(torch.tensor(values))
    return weight


def test_a_smaller_rank_must_be_certified_by_the_whole_excess(cache):
    weight = graded(9.0, 8.0, 1.0, 0.1)
    # Absolute: 5e-8 · (64 + 1 + 0.01) = 3.3e-6. That is 3.2e-6 of the two smallest, 3.3e-4 of the smallest.
    cache.put(weight, solved(weight, 3, energy_excess=5e-8))
    assert cache.get(weight, 3).energy_excess == 5e-8
    assert cache.get(weight, 2).energy_excess == pytest.approx(5e-8 * 65.01 / 1.01, rel=1e-4)
    assert cache.get(weight, 1) is None


def test_norms_of_dropped_columns_count(cache):
    """Columns that rounding has shortened hide an excess of the others."""
    weight = graded(9.0, 8.0, 1.0)
    subspace = solved(weight, 2, energy_excess=0.0)
    shortened = subspace.basis.clone()
    shortened[:, 0] *= 1 - 1e-6  # of its energy of 64, 1.3e-4 is missing
    cache.put(weight, dataclasses.replace(subspace, basis=shortened))
    assert cache.get(weight, 2).energy_excess == 0.0
    assert cache.get(weight, 1) is None


def test_singular_values_below_the_resolution_are_served(cache):
    weight = graded(9.0, 8.0, 0.0, 0.0)
    resolution = solved(weight, 3).resolution
    cache.put(weight, solved(weight, 2, energy_excess=0.3))  # times 2 resolutions
    assert cache.get(weight, 1).energy_excess == pytest.approx(0.6)
    cache.put(weight, solved(weight, 3, energy_excess=2 * resolution / 64))
    assert cache.get(weight, 1) is None  # two resolutions, one is allowed
    assert cache.get(torch.zeros(3, 5), 1) is None
    cache.put(torch.zeros(3, 5), solved(torch.zeros(3, 5), 2))
    assert cache.get(torch.zeros(3, 5), 1).energy_excess == 0.0
    assert cache.get(torch.zeros(3, 5), 0) is None


def test_a_larger_rank_is_missed_and_replaces(cache, weight):
    small, large = solved(weight, 3), solved(weight, 6)
    cache.put(weight, small)
    assert cache.get(weight, 6) is None
    cache.put(weight, large)
    assert same(cache.get(weight, 6), large)
    only_file(cache.folder)


@pytest.mark.parametrize("rank", [3, 6])
def test_no_larger_a_rank_leaves_the_file_alone(cache, weight, rank):
    large = solved(weight, 6)
    cache.put(weight, large)
    cache.put(weight, solved(weight, rank, method="gram"))
    assert same(cache.get(weight, 6), large)


# What is not worth keeping


@pytest.mark.parametrize(
    "changes",
    [
        {"certified": False},
        {"null_count": 1},
        {"energy_excess": math.nan},
        {"energy_excess": math.inf},
        {"resolution": math.inf},
        {"singular_values": torch.tensor([3.0, 2.0, 1.0])},
        {"basis": torch.eye(25, 4)},
        {"basis": torch.eye(24, 4).double()},
    ],
)
def test_not_stored(cache, weight, changes):
    cache.put(weight, solved(weight, 4, **changes))
    assert not cache.folder.exists()
    assert cache.get(weight, 4) is None


def test_null_directions_of_a_tall_weight_are_warned_of_each_time(cache):
    wide = graded(9.0, 8.0, 1.0, 0.0)
    for _ in range(2):
        assert cache.get(wide.T, 2) is None
        with pytest.warns(UserWarning, match="null"):
            cache.put(wide.T, minor_subspace(wide.T, 2))
    cache.put(wide, minor_subspace(wide, 2))  # determined
    assert cache.get(wide, 2) is not None


@pytest.mark.parametrize("shape", [(150, 170), (170, 150), (200, 60), (60, 200)])
def test_results_of_the_solver(cache, shape):
    weight = torch.randn(shape)
    subspace = minor_subspace(weight, 8)
    cache.put(weight, subspace)
    assert same(cache.get(weight, 8), subspace)
    assert cache.get(weight, 4).certified


# The environment


@pytest.mark.parametrize("setting", ["0", "", "off", "OFF", "False", "no", " 0 "])
def test_turned_off(monkeypatch, setting):
    monkeypatch.setenv("MICA_CACHE", setting)
    assert default_cache() is None


@pytest.mark.parametrize("setting", [None, "1", "on", "True", "YES"])
def test_beside_the_hub_by_default(monkeypatch, tmp_path, setting):
    if setting is None:
        monkeypatch.delenv("MICA_CACHE", raising=False)
    else:
        monkeypatch.setenv("MICA_CACHE", setting)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    assert default_cache().folder == tmp_path / "hub" / "mica"
    assert not (tmp_path / "hub").exists()


def test_a_folder_of_ones_own_read_at_call_time(monkeypatch, tmp_path, weight):
    monkeypatch.setenv("HOME", str(tmp_path))
    for setting, folder in ((str(tmp_path / "a b"), tmp_path / "a b"), ("~/c", tmp_path / "c")):
        monkeypatch.setenv("MICA_CACHE", setting)
        assert default_cache().folder == folder
        default_cache().put(weight, solved(weight, 2))
        assert default_cache().get(weight, 2) is not None
        assert folder.is_dir()
    monkeypatch.setenv("MICA_CACHE", "~nobody-of-that-name/d")
    assert default_cache().get(weight, 2) is None
