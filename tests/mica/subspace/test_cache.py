"""What the cache gives back, what it checks before, what it keeps, and its settings."""

import dataclasses
import logging
import math

import pytest
import torch
from huggingface_hub import constants

from mica import minor_subspace
from mica.dtypes import FLOATING
from mica.subspace import cache as cache_module
from mica.subspace import krylov
from mica.subspace.cache import SubspaceCache, default_cache
from mica.subspace.content_hash import content_hash
from tests.mica.subspace.subspaces import only_file, put, quietly_solved, same
from tests.support import spectra

# What is stored comes back


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", [(24, 30), (30, 24), (7, 5), (1, 9), (9, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_round_trip(cache, shape, dtype, transposed, monkeypatch):
    """For a parameter and for a view of one, by its key too; a result outlives its file and its successor."""
    weight, other = (torch.nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(2))
    weight, rank = weight.T if transposed else weight, min(4, *shape)
    assert cache.get(weight, rank) is None
    put(cache, weight, rank, method="gram")
    subspace = put(cache, weight, rank)
    loaded = [reader.get(weight.clone(), rank) for reader in (cache, SubspaceCache(str(cache.folder)))]
    assert cache.get(other, rank) is None
    key = content_hash(weight)
    monkeypatch.setattr(cache_module, "content_hash", None)
    loaded.append(cache.get(weight, rank, key=key))
    path = only_file(cache.folder)
    path.write_bytes(bytes(path.stat().st_size))
    path.unlink()
    for result in loaded:
        assert result is not subspace
        assert result.basis.dtype == result.singular_values.dtype == subspace.basis.dtype
        assert result.basis.is_contiguous()
        assert not result.basis.requires_grad
        result.basis.mul_(1)  # writable
        assert same(result, subspace)
    cache.put(weight, subspace, key=key)
    assert same(cache.get(weight, rank, key=key), subspace)


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


def diagonal(*values):
    """A wide weight with these singular values; the solved basis holds unit vectors."""
    return torch.diag(torch.tensor(values)) @ torch.eye(len(values), len(values) + 3)


def test_singular_values_below_the_resolution_are_served_but_no_null_directions_of_a_tall_weight(cache):
    for weight in (diagonal(9.0, 8.0, 0.0, 0.0), diagonal(1.0, 1e-9, 1e-10, 1e-12), torch.zeros(3, 5)):
        assert cache.get(weight, 2) is None
        assert same(put(cache, weight, 2), cache.get(weight, 2))
    wide = diagonal(9.0, 8.0, 1.0, 0.0)
    for _ in range(2):  # they are warned of each time
        assert cache.get(wide.T, 2) is None
        with pytest.warns(UserWarning, match="null"):
            cache.put(wide.T, minor_subspace(wide.T, 2))
    cache.put(wide, minor_subspace(wide, 2))  # determined
    assert cache.get(wide, 2) is not None


# What is read is checked against the weight


def turned(basis):
    return torch.linalg.qr(basis @ torch.randn(4, 4))[0]


@pytest.mark.parametrize("shape", [(24, 30), (30, 24)])
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("not orthonormal", lambda basis, values: {"basis": torch.full_like(basis, torch.nan)}),
        ("not orthonormal", lambda basis, values: {"basis": torch.zeros_like(basis)}),
        ("not orthonormal", lambda basis, values: {"basis": basis * (1 + 1e-5)}),
        ("not the weight's", lambda basis, values: {"basis": torch.linalg.qr(torch.randn_like(basis))[0]}),
        ("not the weight's", lambda basis, values: {"basis": turned(basis)}),
        ("not the weight's", lambda basis, values: {"basis": basis.flip(1)}),
        ("not the weight's", lambda basis, values: {"singular_values": values * (1 + 1e-3)}),
        ("not the weight's", lambda basis, values: {"singular_values": values * torch.nan}),
        ("not the weight's", lambda basis, values: {"singular_values": values.flip(0)}),
    ],
)
def test_a_checksum_that_fits_is_not_enough(cache, shape, what, change, caplog):
    weight = torch.randn(shape)
    result = minor_subspace(weight, 4)
    cache.put(weight, result)
    forged = dataclasses.replace(result, **change(result.basis, result.singular_values))
    only_file(cache.folder).write_bytes(cache_module._encode(forged))
    with caplog.at_level(logging.WARNING, "mica"):
        assert cache.get(weight, 4) is None
    (message,) = caplog.messages
    assert what in message
    cache.put(weight, result)
    assert same(cache.get(weight, 4), result)


@pytest.mark.parametrize(("resolutions", "passes"), [(7.5, True), (8.5, False)])
def test_a_square_is_off_by_at_most_twice_the_resolution_for_each_vector(cache, resolutions, passes):
    weight = torch.zeros(6, 9, dtype=torch.float64)
    weight.fill_diagonal_(1.0)
    limit = krylov.resolution(6, 1.0)
    weight[2:] *= math.sqrt(resolutions * limit)
    put(cache, weight, 4, singular_values=torch.zeros(4, dtype=torch.float64), resolution=limit)
    assert (cache.get(weight, 4) is not None) == passes


@pytest.mark.parametrize("seed", range(20))
def test_all_the_energy_of_a_weight_may_be_in_one_direction(cache, seed, caplog):
    """Then ‖C‖ is the weight's squared norm, which is computed in another precision."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 1, generator=generator) @ torch.randn(1, 30, generator=generator)
    subspace = quietly_solved(weight, 4)
    cache.put(weight, subspace)
    assert same(cache.get(weight, 4), subspace)
    assert not caplog.records


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


@pytest.mark.parametrize("changes", [{"certified": False}, {"null_count": 1}])
def test_what_is_not_worth_keeping(cache, changes):
    weight = torch.randn(24, 30)
    put(cache, weight, **changes)
    assert not cache.folder.exists()
    assert cache.get(weight, 4) is None


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
def test_its_folder_is_read_at_call_time(monkeypatch, tmp_path, setting, folder):
    """Next to the hub by default."""
    weight = torch.randn(24, 30)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MICA_CACHE", "~nobody-of-that-name/d")
    assert default_cache().get(weight, 2) is None
    if setting is None:
        monkeypatch.delenv("MICA_CACHE")
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


SIZES = {
    **dict.fromkeys([None, ""], 10 << 30),
    **{"0": 0, "12345": 12345, " 500 MB ": 500_000_000, "1.5gib": 3 << 29, "2G": 2 * 10**9, "1KiB": 1024},
    **dict.fromkeys(["much", "-1", "1 PB", "1e9", "GB"]),
}


@pytest.mark.parametrize(("setting", "size"), SIZES.items())
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
