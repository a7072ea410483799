"""The key of a weight; that each bit counts is tested of the checksums of its rows."""

import pytest
import torch

from mica import row_checksums
from mica.dtypes import FLOATING
from mica.subspace.content_hash import content_hash

on_all_dtypes = pytest.mark.parametrize("dtype", FLOATING)


def bits(weight):
    return weight.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[weight.element_size()])


def with_two_signs_turned(weight):
    yield weight
    for i in range(weight.numel()):
        for j in range(i):
            turned = weight.clone()
            turned.view(-1)[[i, j]] *= -1
            yield turned


def in_another_order_shape_or_dtype(weight):
    first, far = [1, 0, *range(2, 8)], [4, 1, 2, 3, 0, 5, 6, 7]
    yield from (weight, weight.T, weight.T.contiguous(), weight[first], weight[far], weight[:, first])
    yield from (weight[:, far], weight.T[first], weight.T[:, far], -weight)
    yield from (weight.reshape(4, 16), weight.reshape(16, 4))
    zeros = torch.zeros(8, 1, dtype=weight.dtype)
    yield from (torch.cat([weight, zeros], 1), torch.cat([weight, zeros.T]))
    for other in {*FLOATING} - {weight.dtype}:
        yield weight.to(other)
        if other.itemsize == weight.itemsize:
            yield bits(weight).view(other)


DISTINCT = {
    "turned signs": lambda dtype: with_two_signs_turned(torch.randn(1, 24).to(dtype)),
    "order, shape, dtype": lambda dtype: in_another_order_shape_or_dtype(torch.randn(8, 8).to(dtype)),
}


@pytest.mark.whole
@pytest.mark.parametrize("chunk", [2**20, 100])
@pytest.mark.parametrize("kind", DISTINCT)
@on_all_dtypes
def test_other_content_has_another_key(dtype, kind, chunk, monkeypatch):
    monkeypatch.setattr(row_checksums, "_CHUNK_BYTES", chunk)
    keys = []
    for weight in DISTINCT[kind](dtype):
        keys.append(content_hash(weight))
        assert keys[-1] == content_hash(weight)
    assert len(set(keys)) == len(keys) > 1


@pytest.mark.parametrize("transposed", [False, True])
@on_all_dtypes
@pytest.mark.parametrize("columns", [16, 13])
def test_padding_offset_and_strides_are_of_no_account(dtype, columns, transposed):
    buffer = torch.randn(10, 2 * columns + 3).to(dtype)
    weight = buffer[1:, 3::2]
    copies = [weight, weight.contiguous(), weight.repeat(1, 2)[:, :columns]]
    if transposed:
        copies = [copy.T for copy in copies]
    assert len({content_hash(copy) for copy in copies}) == 1
    expanded = weight[:1].T.expand(columns, 4)
    assert content_hash(expanded) == content_hash(expanded.contiguous())


def test_the_key_is_the_same_in_every_process_and_release():
    """A change here is a change of the key: raise ``cache.VERSION``."""
    weight = torch.arange(35, dtype=torch.float32).view(5, 7)
    assert [content_hash(weight), content_hash(weight.T.bfloat16())] == [
        "60f25d77fab8a3cfe9d6aa6507ee5fbb006092978a20b876b4e9455ed41d549c",
        "76f5d57872bf9a0af0472163d3c8a9c8df7811ab5a33d32f48737f5a7e8d890c",
    ]
