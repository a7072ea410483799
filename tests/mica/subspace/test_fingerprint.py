"""The key of a weight."""

import numpy as np
import pytest
import torch

from mica.subspace import fingerprint as fingerprint_module
from mica.subspace.cache import SubspaceCache
from mica.subspace.fingerprint import fingerprint
from tests.support.subspaces import same, solved

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def cache(tmp_path):
    return SubspaceCache(tmp_path / "cache")


def bits(weight):
    return weight.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[weight.element_size()])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_the_key(dtype, transposed):
    weight = torch.randn(3, 7).to(dtype)
    view = weight.T if transposed else weight
    flat = bits(weight).view(-1)
    keys = {fingerprint(view)}
    for position in range(flat.numel()):
        for bit in range(8 * weight.element_size()):
            mask = torch.tensor(1, dtype=flat.dtype) << bit
            flat[position] ^= mask
            keys.add(fingerprint(view))
            flat[position] ^= mask
    assert len(keys) == 1 + flat.numel() * 8 * weight.element_size()


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_turned_signs_change_the_key(dtype):
    weight = torch.randn(2, 24).to(dtype)
    keys = {fingerprint(weight)}
    for i in range(24):
        for j in range(i):
            turned = weight.clone()
            turned[0, [i, j]] *= -1
            keys.add(fingerprint(turned))
    assert len(keys) == 1 + 24 * 23 // 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_shape_and_dtype_are_in_the_key(dtype):
    weight = torch.randn(8, 8).to(dtype)
    first = [1, 0, *range(2, 8)]
    far = [4, 1, 2, 3, 0, 5, 6, 7]
    others = [
        weight,
        weight.T,
        weight.T.contiguous(),
        weight[first],
        weight[far],
        weight[:, first],
        weight[:, far],
        weight.T[first],
        weight.T[:, far],
        weight.reshape(4, 16),
        weight.reshape(16, 4),
        torch.cat([weight, torch.zeros(8, 1, dtype=dtype)], 1),
        torch.cat([weight, torch.zeros(1, 8, dtype=dtype)]),
        -weight,
        *(
            bits(weight).view(other)
            for other in DTYPES
            if other.itemsize == dtype.itemsize and other != dtype
        ),
        *(weight.to(other) for other in DTYPES if other != dtype),
    ]
    assert len({fingerprint(other) for other in others}) == len(others)


def test_zeros_at_the_end_of_a_row_are_content():
    assert len({fingerprint(torch.zeros(2, columns).half()) for columns in range(1, 10)}) == 9


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_either_sign_and_not_a_number(dtype):
    weight = torch.randn(5, 6).to(dtype)
    keys = [fingerprint(weight)]
    for value in (0.0, -0.0, torch.inf, torch.nan):
        weight[2, 3] = value
        keys.append(fingerprint(weight))
        assert keys[-1] == fingerprint(weight.clone())
    bits(weight)[2, 3] ^= 5  # another NaN
    assert weight[2, 3].isnan()
    keys.append(fingerprint(weight))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 13])
def test_padding_offset_and_strides_are_of_no_account(cache, dtype, columns, transposed):
    weight = torch.randn(9, columns).to(dtype)
    copies = [weight.clone()]
    for offset, step, pad in ((0, 1, 3), (1, 1, 0), (4, 1, 8), (3, 2, 1), (0, 4, 0)):
        buffer = torch.full((9 * (columns * step + pad) + offset,), torch.nan, dtype=dtype)
        copy = buffer.as_strided(weight.shape, (columns * step + pad, step), offset)
        copies.append(copy.copy_(weight))
    if transposed:
        copies = [copy.T for copy in copies]
    assert len({fingerprint(copy) for copy in copies}) == 1
    subspace = solved(copies[0], 3)
    cache.put(copies[0], subspace)
    assert all(same(cache.get(copy, 3), subspace) for copy in copies)


def test_memory_that_starts_anywhere():
    """As in a mapped file."""
    weight = torch.randn(3, 8).half()
    for start in range(8):
        memory = bytearray(start) + bytes(16) + weight.numpy().tobytes() + bytes(16)
        flat = torch.frombuffer(memory, dtype=torch.uint8, offset=start)
        for skipped in range(8):
            whole = torch.frombuffer(memory, dtype=torch.half, offset=start)[skipped : skipped + 24]
            assert fingerprint(whole.view(3, 8)) == fingerprint(whole.clone().view(3, 8))
        assert fingerprint(flat[16:64].view(torch.half).view(3, 8)) == fingerprint(weight)


def test_expanded_and_flipped_weights_have_keys():
    row = torch.randn(1, 6)
    assert fingerprint(row.expand(4, 6)) != fingerprint(row.expand(5, 6))
    assert fingerprint(row.T.expand(6, 4)) == fingerprint(row.T.expand(6, 4).contiguous())


def linear_digest(words):
    """(digest, forged): Σ b_j mix(a_j x_j) mod 2^64 of a row x of int64, with mix(y) = y xor (y >> 32) and

    known a, b; and a function that gives a row the target one by changing its last word.
    """

    def numbers(count, seed):
        state = (np.arange(count, dtype=np.uint64) + np.uint64(seed << 40)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (state ^ (state >> np.uint64(31))) | np.uint64(1)

    first, second = (numbers(words, seed) for seed in (1, 2))

    def digest(row):
        product = row.numpy()[0].view(np.uint64) * first
        return ((product ^ (product >> np.uint64(32))) * second).sum()

    def forged(row, target):
        row = row.clone()
        row[0, -1] = 0
        rest = (int(target) - int(digest(row))) * pow(int(second[-1]), -1, 2**64) % 2**64
        word = (rest ^ (rest >> 32)) * pow(int(first[-1]), -1, 2**64) % 2**64
        row[0, -1] = torch.from_numpy(np.array([word], dtype=np.uint64).view(np.int64))[0]
        assert digest(row) == target
        return row

    return digest, forged


def test_a_weight_cannot_be_made_to_have_another_one_s_key():
    """As it could when rows had digests that are linear in known constants."""
    weight, other = torch.randn(1, 48), torch.randn(1, 48)
    digest, forged = linear_digest(24)
    twin = forged(other.view(torch.int64), digest(weight.view(torch.int64))).view(torch.float32)
    assert not torch.equal(twin, weight)
    assert fingerprint(twin) != fingerprint(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_show(monkeypatch, dtype):
    monkeypatch.setattr(fingerprint_module, "CHUNK_BYTES", 1000)
    weights = [torch.randn(50, 33).to(dtype), torch.randn(33, 52).to(dtype).T, torch.randn(2, 3000).to(dtype)]
    keys = [fingerprint(weight) for weight in weights]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert [fingerprint(weight) for weight in weights] == keys
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_rows_cannot_move_from_one_block_to_another(monkeypatch):
    monkeypatch.setattr(fingerprint_module, "CHUNK_BYTES", 100)
    weight = torch.randn(20, 10)
    swapped = torch.cat([weight[2:4], weight[:2], weight[4:]])
    assert len({fingerprint(weight), fingerprint(swapped), fingerprint(weight.roll(1, 0))}) == 3


def test_the_key_is_the_same_in_every_process_and_release():
    """A change here is a change of the key: raise ``cache.VERSION``."""
    weight = torch.arange(35, dtype=torch.float32).view(5, 7)
    assert [fingerprint(weight), fingerprint(weight.T.bfloat16())] == [
        "d64aa2a156b765f6434cf0fd4d82be86ae306448119e4befa2b0185fb0227316",
        "58fc0b5e58e7ebd449258402768afa8f80fc70302d1ff35e8dfa3fe627bc03c1",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda(cache, dtype):
    weight = torch.randn(40, 31).to(dtype)
    for view in (weight, weight.T, weight[:, 1:], weight[:, ::2]):
        assert fingerprint(view) == fingerprint(view.cuda())
    subspace = solved(weight, 4)
    cache.put(weight.cuda(), subspace)
    loaded = cache.get(weight.cuda(), 4)
    assert loaded.basis.is_cuda
    assert loaded.singular_values.is_cuda
    assert torch.equal(loaded.basis.cpu(), subspace.basis)


@pytest.mark.parametrize(
    "unsuited",
    [
        torch.randn(2, 5, 6),
        torch.randn(6),
        torch.zeros(0, 4),
        torch.ones(4, 4, dtype=torch.int8),
        torch.empty(4, 4, device="meta"),
    ],
    ids=["stack", "vector", "empty", "int8", "meta"],
)
def test_what_is_no_weight_is_never_found(cache, unsuited):
    with pytest.raises(ValueError, match="2-D"):
        fingerprint(unsuited)
    cache.put(unsuited, solved(torch.randn(5, 6), 2))
    assert cache.get(unsuited, 2) is None
    assert not cache.folder.exists()
