"""Checksums of rows: an accident to the bits of a row changes its number, and nothing else does."""

import itertools

import pytest
import torch

from mica import row_checksums as module
from mica.dtypes import FLOATING
from mica.row_checksums import row_checksums

on_all_dtypes = pytest.mark.parametrize("dtype", FLOATING)
# Rows that are read as words of 8 bytes, and rows that no such words fill
on_whole_words_and_others = pytest.mark.parametrize(
    "shape", [(12, 20), (7, 9), (1, 20), (1, 9)], ids=["whole words", "odd", "one row", "one odd row"]
)


@on_all_dtypes
@pytest.mark.parametrize("dim", [0, 1])
@on_whole_words_and_others
def test_values_at_other_places_are_seen(dtype, dim, shape):
    """Every exchange of two rows or columns."""
    matrix = torch.randn(shape, dtype=dtype)
    expected = row_checksums(matrix)
    assert expected.shape == matrix.shape[:1]
    for first, second in itertools.combinations(range(matrix.shape[dim]), 2):
        order = list(range(matrix.shape[dim]))
        order[first], order[second] = second, first
        moved = matrix.index_select(dim, torch.tensor(order))
        assert not torch.equal(row_checksums(moved), expected)


@on_all_dtypes
@on_whole_words_and_others
def test_one_bit_changes_the_number_of_its_row_and_no_other(dtype, shape):
    matrix = torch.randn(shape, dtype=dtype)
    expected = row_checksums(matrix)
    bits_of_an_entry = 8 * matrix.element_size()
    for place in itertools.product(*map(range, shape)):
        for bit in (0, bits_of_an_entry // 2, bits_of_an_entry - 1):
            flipped = matrix.clone()
            words = flipped.view(module.WORDS[matrix.element_size()])
            words[place] ^= torch.tensor(1, dtype=words.dtype) << bit
            changed = row_checksums(flipped) != expected
            assert changed.nonzero().flatten().tolist() == [place[0]]


@pytest.mark.whole
@on_all_dtypes
@on_whole_words_and_others
def test_a_matrix_is_told_from_its_negative(dtype, shape):
    """The sign is the uppermost bit: in words of 8 bytes, changes of two of them cancel, modulo 2^64."""
    matrix = torch.randn(shape, dtype=dtype)
    assert (row_checksums(-matrix) != row_checksums(matrix)).all()


@on_all_dtypes
@on_whole_words_and_others
def test_where_it_lies_in_memory_is_of_no_account(dtype, shape):
    matrix = torch.randn(shape, dtype=dtype)
    expected = row_checksums(matrix)
    rows, columns = shape
    # Where it starts, the distance of columns, and the gap between rows
    for offset, step, pad in ((1, 1, 0), (3, 1, 0), (0, 1, 3), (1, 2, 1), (4, 1, 8)):
        stride = columns * step + pad
        memory = torch.full((rows * stride + offset,), torch.nan, dtype=dtype)
        copy = memory.as_strided(shape, (stride, step), offset)
        copy.copy_(matrix)
        assert torch.equal(row_checksums(copy), expected)
    assert torch.equal(row_checksums(matrix.T.contiguous().T), expected)


@on_all_dtypes
def test_an_expanded_row_is_as_its_copies(dtype):
    row = torch.randn(1, 20, dtype=dtype)
    assert torch.equal(row_checksums(row.expand(5, 20)), row_checksums(row).expand(5))


@on_all_dtypes
@on_whole_words_and_others
def test_how_many_rows_are_summed_at_a_time_is_of_no_account(dtype, shape, monkeypatch):
    matrix = torch.randn(shape, dtype=dtype)
    expected = row_checksums(matrix)
    for size in (1, 100, 500):  # bytes: less than a row, up to all rows
        monkeypatch.setattr(module, "_CHUNK_BYTES", size)
        assert torch.equal(row_checksums(matrix), expected)


def test_it_is_the_same_in_every_process_and_takes_no_random_numbers():
    matrix = torch.randn(5, 16)
    found = []
    for seed in (1, 2):
        module.odd_numbers.cache_clear()  # as in another process
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(row_checksums(matrix))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)


def test_factors_made_in_inference_mode_are_the_same_outside():
    """The odd numbers that words are multiplied by are cached at the first call."""
    module.odd_numbers.cache_clear()
    matrix = torch.randn(5, 8)
    with torch.inference_mode():
        inside = row_checksums(matrix).clone()
    assert torch.equal(row_checksums(matrix), inside)
    module.odd_numbers.cache_clear()
    assert torch.equal(row_checksums(matrix), inside)
