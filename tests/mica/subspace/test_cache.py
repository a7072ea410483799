"""Of the cache: what comes back, what is checked before, what is kept, and its settings."""

import dataclasses
import logging
import math

import pytest
import torch
from huggingface_hub import constants

from mica import minor_subspace
from mica.dtypes import FLOATING
from mica.subspace import cache as cache_module
from mica.subspace.cache import SubspaceCache, default_cache
from mica.subspace.fingerprint import fingerprint
from tests.support import spectra
from tests.support.subspaces import only_file, put, quietly_solved, same, solved

# What is stored comes back


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", [(24, 30), (30, 24), (7, 5), (1, 9), (9, 1)])
def test_round_trip(cache, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    rank = min(4, *shape)
    assert cache.get(weight, rank) is None
    subspace = put(cache, weight, rank)
    for reader in (cache, SubspaceCache(str(cache.folder))):
        loaded = reader.get(weight.clone(), rank)
        assert loaded is not subspace
        assert loaded.basis.dtype == loaded.singular_values.dtype == subspace.basis.dtype
        assert loaded.basis.is_contiguous()
        assert same(loaded, subspace)
    assert cache.get(torch.randn(shape).to(dtype), rank) is None


def test_of_a_parameter_and_of_a_view_of_an_embedding(cache):
    parameter = torch.nn.Parameter(torch.randn(40, 12))
    subspace = solved(parameter.detach().T, 3)
    cache.put(parameter.T, subspace)
    assert same(cache.get(parameter.T, 3), subspace)
    assert not cache.get(parameter.T, 3).basis.requires_grad


def test_results_outlive_their_file(cache, weight):
    subspace = put(cache, weight)
    loaded = cache.get(weight, 4)
    path = only_file(cache.folder)
    path.write_bytes(bytes(path.stat().st_size))
    path.unlink()
    loaded.basis.mul_(1)  # writable
    assert same(loaded, subspace)


def test_a_key_computed_once_is_enough(cache, weight, monkeypatch):
    key = fingerprint(weight)
    monkeypatch.setattr(cache_module, "fingerprint", None)
    subspace = put(cache, weight, key=key)
    assert same(cache.get(weight, 4, key=key), subspace)


@pytest.mark.parametrize("shape", [(150, 170), (170, 150), (200, 60), (60, 200), (40, 64)])
def test_what_is_stored_for_one_rank_answers_no_other(cache, shape):
    """The last columns of a larger rank's basis span the subspace too, but their bits are others."""
    weight = torch.randn(shape)
    results = {rank: minor_subspace(weight, rank) for rank in (4, 8)}
    cache.put(weight, results[8])
    for rank in (4, 0, -1, 9, 1000):
        assert cache.get(weight, rank) is None
    cache.put(weight, results[4])
    for rank, result in results.items():
        assert same(cache.get(weight, rank), result)
        assert same(cache.get(weight, rank), minor_subspace(weight, rank))


def test_a_result_replaces_the_one_of_its_rank(cache, weight):
    put(cache, weight)
    newer = put(cache, weight, method="gram")
    assert same(cache.get(weight, 4), newer)
    only_file(cache.folder)


def graded(*values):
    """A wide diagonal weight with these singular values; the solved basis holds unit vectors."""
    weight = torch.zeros(len(values), len(values) + 3)
    weight.diagonal().copy_(torch.tensor(values))
    return weight


def test_singular_values_below_the_resolution_are_served(cache):
    for weight in (graded(9.0, 8.0, 0.0, 0.0), graded(1.0, 1e-9, 1e-10, 1e-12), torch.zeros(3, 5)):
        assert cache.get(weight, 2) is None
        assert same(put(cache, weight, 2), cache.get(weight, 2))


# What is read is checked against the weight


def rotated(basis):
    return torch.linalg.qr(basis @ torch.randn(4, 4))[0]


@pytest.mark.parametrize("shape", [(24, 30), (30, 24)])
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("not orthonormal", lambda basis, values: {"basis": torch.full_like(basis, torch.nan)}),
        ("not orthonormal", lambda basis, values: {"basis": torch.zeros_like(basis)}),
        ("not orthonormal", lambda basis, values: {"basis": basis * (1 + 1e-5)}),
        ("not the weight's", lambda basis, values: {"basis": torch.linalg.qr(torch.randn_like(basis))[0]}),
        ("not the weight's", lambda basis, values: {"basis": rotated(basis)}),
        ("not the weight's", lambda basis, values: {"basis": basis.flip(1)}),
        ("not the weight's", lambda basis, values: {"singular_values": values * (1 + 1e-3)}),
        ("numbers are not", lambda basis, values: {"singular_values": values * torch.nan}),
        ("not in descending", lambda basis, values: {"singular_values": values.flip(0)}),
        ("not the weight's", lambda basis, values: {"resolution": 1e3, "singular_values": 0 * values}),
        ("numbers are not", lambda basis, values: {"resolution": math.inf}),
        ("numbers are not", lambda basis, values: {"energy_excess": math.nan}),
    ],
)
def test_a_checksum_that_fits_is_not_enough(cache, shape, what, change, caplog):
    weight = torch.randn(shape)
    result = minor_subspace(weight, 4)
    cache.put(weight, result)
    forged = dataclasses.replace(result, **change(result.basis, result.singular_values))
    only_file(cache.folder).write_bytes(cache_module.encoded(fingerprint(weight), forged))
    with caplog.at_level(logging.WARNING, "mica"):
        assert cache.get(weight, 4) is None
    (record,) = caplog.records
    assert what in record.getMessage()
    cache.put(weight, result)
    assert same(cache.get(weight, 4), result)


@pytest.mark.parametrize("name", ["gaussian", "graded to 1e-7", "tail x 1e-6", "rank 5", "flat"])
@pytest.mark.parametrize("dtype", FLOATING)
def test_what_the_solver_certifies_passes(cache, dtype, name, caplog):
    kept = 0
    for shape in ((64, 80), (80, 64), (140, 200), (200, 140)):
        weight = (3 * spectra.weight(name, *shape)).to(dtype)
        result = quietly_solved(weight, 8)
        cache.put(weight, result)
        if result.certified and not result.null_count:
            kept += 1
            assert same(cache.get(weight, 8), result)
    assert kept
    assert not caplog.records


# What is not worth keeping


@pytest.mark.parametrize(
    "changes",
    [
        {"certified": False},
        {"null_count": 1},
        {"energy_excess": math.nan},
        {"energy_excess": math.inf},
        {"resolution": math.inf},
        {"resolution": torch.finfo(torch.float64).tiny},  # of an fp64 weight whose squares are zero
        {"singular_values": torch.tensor([3.0, 2.0, 1.0])},
        {"basis": torch.eye(25, 4)},
        {"basis": torch.eye(24, 4).double()},
    ],
)
def test_not_stored(cache, weight, changes):
    put(cache, weight, **changes)
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


# The environment


@pytest.mark.parametrize(
    ("setting", "folder"),
    [
        *((off, None) for off in ("0", "", "off", "OFF", "False", "no", " 0 ")),
        *((on, "hub/mica") for on in (None, "1", "on", "True", "YES")),
        ("{}/a b", "a b"),
        ("~/c", "c"),
    ],
)
def test_its_folder_is_read_at_call_time(monkeypatch, tmp_path, weight, setting, folder):
    """Next to the hub by default."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    if setting is None:
        monkeypatch.delenv("MICA_CACHE", raising=False)
    else:
        monkeypatch.setenv("MICA_CACHE", setting.format(tmp_path))
    if folder is None:
        assert default_cache() is None
        return
    assert default_cache().folder == tmp_path / folder
    assert not list(tmp_path.iterdir())
    put(default_cache(), weight)
    assert default_cache().get(weight, 4) is not None
    assert (tmp_path / folder).is_dir()


def test_a_folder_of_nobody(monkeypatch, weight):
    monkeypatch.setenv("MICA_CACHE", "~nobody-of-that-name/d")
    assert default_cache().get(weight, 2) is None


@pytest.mark.parametrize(
    ("setting", "size"),
    [
        (None, 10 << 30),
        ("", 10 << 30),
        ("0", 0),
        ("12345", 12345),
        (" 500 MB ", 500_000_000),
        ("1.5gib", 3 << 29),
        ("2G", 2 * 10**9),
        ("1KiB", 1024),
        *((bad, None) for bad in ("much", "-1", "1 PB", "1e9", "GB")),
    ],
)
def test_its_size(monkeypatch, tmp_path, setting, size):
    monkeypatch.setenv("MICA_CACHE", str(tmp_path))
    if setting is not None:
        monkeypatch.setenv("MICA_CACHE_SIZE", setting)
    if size is not None:
        assert default_cache().size == size
        return
    with pytest.raises(ValueError, match=f"^MICA_CACHE_SIZE must be a number of bytes.*{setting}"):
        default_cache()
    monkeypatch.setenv("MICA_CACHE", "0")
    assert default_cache() is None
