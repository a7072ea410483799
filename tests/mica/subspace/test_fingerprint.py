"""Of the cache: the key of a weight."""

import pytest
import torch
from subspaces import same, solved

from mica.subspace import cache as cache_module
from mica.subspace.cache import SubspaceCache, fingerprint

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
    """Topmost bits of 64-bit words: a plain sum of multiples of the words does not see two of them."""
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
    """A row's last word is filled up with zeros."""
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_do_not_show(monkeypatch, dtype):
    weights = [torch.randn(50, 33).to(dtype), torch.randn(33, 52).to(dtype).T, torch.randn(2, 3000).to(dtype)]
    keys = [fingerprint(weight) for weight in weights]
    for size in (1, 1000, 5000):
        monkeypatch.setattr(cache_module, "_CPU_BUFFER", size)
        assert [fingerprint(weight) for weight in weights] == keys


def test_the_key_is_the_same_in_every_process_and_release():
    """A change here is a change of the key: raise VERSION."""
    weight = torch.arange(35, dtype=torch.float32).view(5, 7)
    assert cache_module.VERSION == 1
    assert fingerprint(weight) == "ef4399557f5048b066389ed96d329ced17c5fac6"
    assert fingerprint(weight.T.bfloat16()) == "07118f79a0be9289de2638bb99f1d5276773ab09"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda(cache, dtype):
    weight = torch.randn(40, 31).to(dtype)
    for view in (weight, weight.T, weight[:, 1:], weight[:, ::2]):
        assert fingerprint(view) == fingerprint(view.cuda())
    subspace = solved(weight, 4)
    cache.put(weight.cuda(), subspace)
    found = cache.get(weight.cuda(), 4)
    assert found.basis.is_cuda
    assert found.singular_values.is_cuda
    assert torch.equal(found.basis.cpu(), subspace.basis)


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
