"""What is held out: by content, enough, never on both sides."""

import random
import re

import numpy as np
import pytest

from mica.cli.adapt.packing import Blocks, Spans
from mica.cli.adapt.splitting import split
from mica.errors import UsageError
from tests.support.adapt_texts import store


def document(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


def parts(documents, share=0.1, length=10, limit=100):
    """The spans of training and of held-out text as lists of tokens, and how they were made."""
    stores = [store(*documents)]
    result = split(Spans.of(stores), share, length, limit, "--text")
    texts = [
        [
            tuple(stores[0].ids[start : start + size].tolist())
            for start, size in zip(each.start, each.length, strict=True)
        ]
        for each in (result.train, result.held_out)
    ]
    blocks = Blocks(stores, result.held_out, length, "stream")
    assert len(blocks) >= 1
    return *texts, result.how, result.dropped


def test_documents_are_chosen_by_content():
    documents = [document(5 + n % 7, seed=n) for n in range(200)]
    train, held_out, how, dropped = parts(documents)
    assert (how, dropped) == ("documents", 0)
    assert sorted([*train, *held_out]) == sorted(map(tuple, documents))
    total = sum(map(len, documents))
    assert total * 0.1 <= sum(map(len, held_out)) < total * 0.1 + 12
    assert train == [each for each in map(tuple, documents) if each in set(train)]  # in their order
    random.Random(1).shuffle(documents)
    assert set(parts(documents)[1]) == set(held_out)
    more = parts([*documents, *(document(8, seed=n) for n in range(200, 210))], share=0.095)[1]
    assert len(set(more) & set(held_out)) >= len(held_out) - 6  # most stay


def test_no_more_than_is_measured():
    documents = [document(8, seed=n) for n in range(500)]
    held_out = parts(documents, share=0.5, limit=3)[1]
    assert 30 <= sum(map(len, held_out)) < 38


def test_copies_are_never_on_both_sides():
    documents = [document(8, seed=n % 50) for n in range(200)]
    train, held_out, how, dropped = parts(documents)
    assert how == "documents"
    assert not set(train) & set(held_out)
    assert len(set(held_out)) == len(held_out)
    assert dropped == 3 * len(held_out)
    assert len(train) + len(held_out) + dropped == 200


def test_the_end_of_long_documents():
    documents = [document(1005, seed=1), document(503, seed=2), document(1005, seed=1), document(4, seed=3)]
    train, held_out, how, _ = parts(documents)
    assert how == "ends of documents"
    first, second, third, fourth = map(tuple, documents)
    assert train == [first[:-100], second[:-50], third[:-100], fourth]
    assert held_out == [first[-100:], second[-50:]]


def test_the_ends_of_many_documents_are_taken_evenly():
    documents = [document(400, seed=n) for n in range(100)]
    train, held_out, how, _ = parts(documents, limit=20)
    assert how == "ends of documents"
    assert [len(each) for each in held_out] == [10] * 20
    assert [len(each) for each in train] == ([400] * 4 + [390]) * 20


def test_one_long_document_does_not_decide():
    """The first by its digest may be the longest: it is not taken whole."""
    documents = [document(8, seed=n) for n in range(100)]
    for seed in range(200, 210):
        held_out, how = parts([*documents, document(5000, seed=seed)], limit=4)[1:3]
        assert how == "documents"
        assert 40 <= sum(map(len, held_out)) < 48


def test_short_documents_are_joined():
    documents = [document(7, seed=n) for n in range(3)]
    train, held_out, how, dropped = parts(documents, share=0.01)
    assert (how, dropped) == ("end of the text", 0)
    first, second, third = map(tuple, documents)
    assert train == [first, second[:4]]
    assert held_out == [second[4:], third]


def test_the_least_text():
    [train], [held_out], how, _ = parts([list(range(20))], share=0.01)
    assert (list(train), list(held_out), how) == (list(range(10)), list(range(10, 20)), "ends of documents")
    with pytest.raises(
        UsageError, match=re.escape("--text: 19 tokens found, 20 needed: one training and one held-out")
    ):
        parts([list(range(19))])


def test_copies_are_no_text():
    same = document(7, seed=0)
    with pytest.raises(
        UsageError, match=re.escape("28 tokens found (7 of them in different documents), 20 needed")
    ):
        parts([same] * 4)


@pytest.mark.parametrize("seed", range(40))
def test_never_on_both_sides(seed):
    """Of random documents, copies among them: no held-out stretch of a block's length is trained on."""
    chance = random.Random(seed)
    longest = chance.choice([6, 30, 300])
    kinds = [document(chance.randint(1, longest), seed=n) for n in range(chance.randint(1, 30))]
    documents = [chance.choice(kinds) for _ in range(chance.randint(1, 60))]
    try:
        train, held_out, _, _ = parts(
            documents, chance.choice([0.01, 0.1, 0.5]), limit=chance.choice([1, 5, 100])
        )
    except UsageError:
        return
    whole = {tuple(each) for each in documents}
    for stretch in held_out:
        assert stretch not in train
        for each in train:
            if len(stretch) >= 10:
                assert not any(each[at : at + len(stretch)] == stretch for at in range(len(each)))
            assert not (stretch in whole and each == stretch)
    assert sum(map(len, train)) >= 10
    assert np.all([len(each) > 0 for each in train + held_out])
