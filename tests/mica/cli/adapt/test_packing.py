"""Blocks against plain lists, which models keep their documents apart, and what is held out: by content,
enough, never on both sides.
"""

import random

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mica.cli.adapt.packing import (
    Blocks,
    document_of,
    keeps_documents_apart,
    split,
    spread,
)
from mica.cli.adapt.tokens import SPAN, Tokens, joined
from mica.errors import UsageError
from tests.support.tiny_cli import tiny_llama


def numbered(*lengths: int, start: int = 0) -> list[list[int]]:
    """Documents of these lengths, of tokens that are all different."""
    ends = np.cumsum(lengths) + start
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths, strict=True)]


def store(*documents: list[int]) -> Tokens:
    """The tokens of a source with these documents."""
    ids = np.array([token for document in documents for token in document], np.uint16)
    lengths = np.array([len(document) for document in documents], np.int64)
    digests = np.array([hash(tuple(document)) % 2**64 for document in documents], np.uint64)
    stores = np.zeros(len(documents), np.int64)
    return Tokens(
        [ids], np.rec.fromarrays([stores, lengths.cumsum() - lengths, lengths, digests], dtype=SPAN)
    )


def packed(documents: list[list[list[int]]], length: int, packing: str = "documents"):
    """Blocks of the documents of several sources."""
    tokens = joined([store(*each) for each in documents])
    return Blocks(tokens.ids, tokens.spans, length, packing)


def test_a_block_is_of_the_document_that_has_most_of_it():
    """Also where it is the whole of a short one, and where blocks were spread."""
    documents = [numbered(5, 2, 13), numbered(9, start=100)]
    a, b, c, d = (hash(tuple(document)) % 2**64 for each in documents for document in each)
    blocks = packed(documents, 4)
    expected = [a, b, c, c, c, d, d]  # the second block has one token of a, two of b, one of c
    assert [document_of(blocks, number) for number in range(7)] == expected
    some = spread(blocks, 3)
    assert [document_of(some, number) for number in range(3)] == [a, c, d]


@pytest.mark.parametrize("length", [2, 3, 7, 16, 45])
@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_blocks_are_the_joined_documents(length, packing):
    documents = [numbered(1, 5, 1, 1, 13, 2), numbered(16, 7, start=100)]
    blocks = packed(documents, length, packing)
    ids = []
    positions = []
    labels = []
    for document in [document for each in documents for document in each]:
        for position, token in enumerate(document):
            positions.append(positions[-1] + 1 if position and len(ids) % length else 0)
            labels.append(token if position or packing == "stream" else -100)
            ids.append(token)
    assert len(blocks) == len(ids) // length
    expected = {"input_ids": ids, "labels": labels}
    if packing == "documents":
        expected["position_ids"] = positions
    for index, item in enumerate(blocks):
        part = slice(index * length, (index + 1) * length)
        assert {name: values.tolist() for name, values in item.items()} == {
            name: values[part] for name, values in expected.items()
        }
        assert all(value.dtype == torch.int64 and value.shape == (length,) for value in item.values())
    assert torch.equal(blocks[-1]["input_ids"], item["input_ids"])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_it_is_measured_which_models_do():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = {"llama": tiny_llama()}
    for kind in ("gpt2", "bloom", "mamba"):
        config = AutoConfig.for_model(kind, bos_token_id=1, eos_token_id=1, **sizes)
        models[kind] = AutoModelForCausalLM.from_config(config)
    models["llama"].train()
    models["gpt2"].eval()
    state = torch.get_rng_state()
    found = {name: keeps_documents_apart(model) for name, model in models.items()}
    assert found == {"llama": True, "gpt2": True, "bloom": False, "mamba": False}
    assert (models["llama"].training, models["gpt2"].training) == (True, False)
    assert torch.equal(torch.get_rng_state(), state)
    for layer in models["llama"].model.layers:  # one that does not react proves nothing
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert not keeps_documents_apart(models["llama"])


# What is held out.


def document(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(1000), k=length))


def alike(count: int, length: int) -> list[tuple[int, ...]]:
    """Documents of one length, each another."""
    return [document(length, seed) for seed in range(count)]


def parts(documents, share=0.1, length=10, limit=100):
    """The spans of training and of held-out text as tuples of tokens, how they were made, and `dropped`."""
    tokens = store(*documents)
    result = split(tokens.spans, share, length, limit, "--text")
    assert len(Blocks(tokens.ids, result.held_out, length, "stream")) >= 1
    train, held_out = (
        [tuple(tokens.ids[0][start : start + size].tolist()) for _, start, size, _ in each.tolist()]
        for each in (result.train, result.held_out)
    )
    return train, held_out, result.how, result.dropped


def test_documents_are_chosen_by_content():
    documents = [document(5 + n % 7, seed=n) for n in range(200)]
    _, held_out, how, dropped = parts(documents)
    assert (how, dropped) == ("documents", 0)
    total = sum(map(len, documents))
    assert total * 0.1 <= sum(map(len, held_out)) < total * 0.1 + 12
    random.Random(1).shuffle(documents)
    assert set(parts(documents)[1]) == set(held_out)
    more = parts([*documents, *(document(8, seed=n) for n in range(200, 210))], share=0.095)[1]
    assert len(set(more) & set(held_out)) >= len(held_out) - 6  # most stay


@pytest.mark.parametrize("longer", [[], *([long] for long in alike(10, length=5000))])
def test_no_more_than_is_measured(longer):
    """Nor where the first by its digest is the longest: it is not taken whole."""
    _, held_out, how, _ = parts([*alike(500, length=8), *longer], share=0.5, limit=3)
    assert how == "documents"
    assert 30 <= sum(map(len, held_out)) < 38


def test_the_end_of_long_documents():
    documents = [document(1005, seed=1), document(503, seed=2), document(1005, seed=1), document(4, seed=3)]
    first, second, third, fourth = documents
    train = [first[:-100], second[:-50], third[:-100], fourth]
    assert parts(documents) == (train, [first[-100:], second[-50:]], "ends of documents", 0)
    train, held_out, *_ = parts(alike(100, length=400), limit=20)  # evenly
    assert [len(each) for each in held_out] == [10] * 20
    assert [len(each) for each in train] == ([400] * 4 + [390]) * 20


def test_little_text():
    with pytest.raises(UsageError, match="--text: 19 tokens found, copies not counted, too little for one"):
        parts(alike(1, length=19))
    assert parts(alike(5, length=7))[2] == "documents"
    least = tuple(range(20))
    assert parts([least], share=0.01) == ([least[:10]], [least[10:]], "ends of documents", 0)


@pytest.mark.parametrize("seed", range(40))
def test_never_on_both_sides(seed):
    """Random documents, with copies among them: no held-out stretch of a block's length is trained on."""
    chance = random.Random(seed)
    longest = chance.choice([6, 30, 300])
    kinds = [document(chance.randint(1, longest), seed=n) for n in range(chance.randint(1, 30))]
    documents = [chance.choice(kinds) for _ in range(chance.randint(1, 60))]
    share = chance.choice([0.01, 0.1, 0.5])
    limit = chance.choice([1, 5, 100])
    try:
        train, held_out, how, dropped = parts(documents, share, limit=limit)
    except UsageError:
        return
    if how == "documents":  # each once, and none of its copies is trained on
        assert held_out == list(dict.fromkeys(each for each in documents if each in set(held_out)))
        assert train == [each for each in documents if each not in set(held_out)]
        assert dropped == len(documents) - len(train) - len(held_out)
    for stretch in held_out:
        assert stretch not in train
        for each in train:
            if len(stretch) >= 10:
                assert not any(each[at : at + len(stretch)] == stretch for at in range(len(each)))
    assert sum(map(len, train)) >= 10
    assert all(train + held_out)
