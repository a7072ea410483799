"""Blocks against plain lists, and that transformers keeps the documents in them apart."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from mica.cli.adapt.packing import Blocks, Spans, keeps_documents_apart, mix, spread
from tests.support.adapt_texts import store
from tests.support.tiny_cli import tiny_llama


def numbered(*lengths: int, start: int = 0) -> list[list[int]]:
    """Documents of these lengths, of tokens that are all different."""
    ends = np.cumsum(lengths) + start
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths, strict=True)]


def packed(documents: list[list[list[int]]], length: int, packing: str = "documents") -> Blocks:
    """Blocks of all documents of several stores."""
    stores = [store(*each) for each in documents]
    return Blocks(stores, Spans.of(stores), length, packing)


@pytest.mark.parametrize("length", [2, 3, 7, 16, 45])
@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_blocks_are_the_joined_documents(length, packing):
    documents = [numbered(1, 5, 1, 1, 13, 2), numbered(16, 7, start=100)]
    blocks = packed(documents, length, packing)
    ids, positions, is_first = [], [], []
    for document in [document for each in documents for document in each]:
        for position, token in enumerate(document):
            at_start = not len(ids) % length
            ids.append(token)
            is_first.append(position == 0)
            positions.append(0 if at_start or position == 0 else positions[-1] + 1)
    assert len(blocks) == len(ids) // length
    for index in range(len(blocks)):
        part = slice(index * length, (index + 1) * length)
        item = blocks[index]
        assert item["input_ids"].tolist() == ids[part]
        assert all(value.dtype == torch.int64 and value.shape == (length,) for value in item.values())
        if packing == "stream":
            assert item.keys() == {"input_ids", "labels"}
            assert item["labels"].tolist() == ids[part]
        else:
            assert item["position_ids"].tolist() == positions[part]
            assert item["labels"].tolist() == [
                -100 if first else token for token, first in zip(ids[part], is_first[part], strict=True)
            ]
    assert blocks[-1]["input_ids"].tolist() == blocks[len(blocks) - 1]["input_ids"].tolist()
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_chosen_and_cut_spans():
    stores = [store(*numbered(4, 6, 3))]
    chosen = Spans.of(stores)[np.array([0, 2])]
    assert Blocks(stores, chosen, 7, "stream")[0]["input_ids"].tolist() == [0, 1, 2, 3, 10, 11, 12]
    heads, tails = Spans.of(stores).cut(np.array([4, 1, 0]))
    assert Blocks(stores, heads, 5, "stream")[0]["input_ids"].tolist() == [0, 1, 2, 3, 4]
    assert Blocks(stores, tails, 8, "stream")[0]["input_ids"].tolist() == list(range(5, 13))
    assert len(Blocks(stores, chosen[:0], 7, "stream")) == 0


def test_blocks_are_pickled_and_collated():
    blocks = packed([numbered(9, 9)], 4)
    [batch] = DataLoader(pickle.loads(pickle.dumps(blocks)), batch_size=4)
    assert batch["input_ids"].flatten().tolist() == list(range(16))


def test_spread_keeps_first_and_last():
    blocks = packed([numbered(100)], 2)
    assert spread(blocks, 50) is blocks
    assert [item["input_ids"][0].item() for item in spread(blocks, 3)] == [0, 48, 98]
    assert [item["input_ids"][0].item() for item in spread(blocks, 1)] == [0]


def test_weights_are_shares_of_an_epoch():
    parts = [packed([numbered(20 * 2)], 2), packed([numbered(8 * 2, start=1000)], 2)]

    def epoch(weights, seed=0):
        return [item["input_ids"][0].item() for item in mix(parts, weights, seed)]

    for weights in ([1, 1], [2, 2]):
        seen = epoch(weights)
        assert (sum(token < 1000 for token in seen), sum(token >= 1000 for token in seen)) == (20, 20)
        assert {seen.count(token) for token in range(0, 40, 2)} == {1}
        assert {seen.count(token) for token in range(1000, 1016, 2)} == {2, 3}
    assert epoch([1, 1]) == epoch([1, 1])
    assert epoch([1, 1]) != epoch([1, 1], seed=1)
    assert len(epoch([1, 100])) == 20 + 2000
    seen = epoch([5, 1])
    assert (sum(token < 1000 for token in seen), sum(token >= 1000 for token in seen)) == (40, 8)
    assert {seen.count(token) for token in seen} == {1, 2}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_keeps_documents_apart(attention):
    """What it is about: the logits and losses of a document in a block are those of the document alone."""
    model = tiny_llama(attn_implementation=attention).eval()
    first, second = numbered(7, 9)
    [item] = packed([[first, second]], 16)
    together = model(**{name: value[None] for name, value in item.items()}, use_cache=False)
    apart = [torch.tensor([document]) for document in (first, second)]
    alone = [model(input_ids=ids, labels=ids) for ids in apart]
    torch.testing.assert_close(together.logits[0, :7], alone[0].logits[0])
    torch.testing.assert_close(together.logits[0, 7:], alone[1].logits[0])
    torch.testing.assert_close(together.loss, (alone[0].loss * 6 + alone[1].loss * 8) / 14)


def test_it_is_measured_which_models_do():
    sizes = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    models = {
        "llama": tiny_llama(),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, **sizes)),
        "bloom": BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, **sizes)),
        "mamba": MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, **sizes)),
    }
    models["llama"].train()
    models["gpt2"].eval()
    state = torch.get_rng_state()
    found = {name: keeps_documents_apart(model) for name, model in models.items()}
    assert found == {"llama": True, "gpt2": True, "bloom": False, "mamba": False}
    assert (models["llama"].training, models["gpt2"].training) == (True, False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_does_not_react_proves_nothing():
    model = tiny_llama()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert not keeps_documents_apart(model)
