"""Blocks: what is held out, and that it is never trained on."""

import pytest
import torch

from mica.cli.adapt.text import pack, spread
from mica.errors import UsageError


def test_held_out_tokens_are_never_trained_on():
    first, second = list(range(1000)), list(range(2000, 2505))
    train, held_out = pack([first, second], 10, 0.1, separator=-1)
    assert held_out.flatten().tolist() == [*range(900, 1000), *range(2455, 2505)]
    assert train.flatten().tolist() == [*range(900), -1, *range(2000, 2449)]
    assert not set(train.flatten().tolist()) & set(held_out.flatten().tolist())


def test_short_files_are_split_as_one():
    documents = [list(range(start, start + 7)) for start in range(0, 70, 7)]
    train, held_out = pack(documents, 10, 0.2)
    assert train.flatten().tolist() == list(range(60))
    assert held_out.tolist() == [list(range(60, 70))]


def test_least_text_gives_one_block_each():
    train, held_out = pack([list(range(20))], 10, 0.01)
    assert (train.tolist(), held_out.tolist()) == ([list(range(10))], [list(range(10, 20))])
    with pytest.raises(UsageError, match="19 tokens found, 20 needed"):
        pack([list(range(19))], 10, 0.01)


def test_spread_keeps_first_and_last():
    blocks = torch.arange(100).view(50, 2)
    assert spread(blocks, 50) is blocks
    assert spread(blocks, 3)[:, 0].tolist() == [0, 48, 98]
