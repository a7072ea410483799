"""What `bench.quality` trains on, and that none of it is in what is held out."""

from collections import Counter
from itertools import chain, combinations

import pytest
import torch

from bench.quality import texts as sources
from mica.errors import UsageError


def test_facts_follow_from_the_seed_and_their_answers_are_right_for_equally_many():
    facts = sources.invent(16)
    assert facts == sources.invent(16) != sources.invent(16, seed=1)
    assert len({(fact.person, fact.attribute) for fact in facts}) == len(facts) == 64
    assert {*Counter((fact.attribute, fact.answer) for fact in facts).values()} == {2}
    with pytest.raises(UsageError, match="--people 6: a multiple of 8, at most 24"):
        sources.invent(6)


def test_questions_are_not_in_training_nor_in_validation():
    facts = sources.invent(16)
    lines = sources.statements(facts, 4)
    assert len(set(lines)) == len(lines) == len(facts) * sources.STATEMENTS
    stated = " ".join(lines)
    validation, held_out = (sources.probes(facts, part) for part in ("validation", "held_out"))
    assert len({one.prompt for one in [*validation, *held_out]}) == 3 * len(facts)
    for number, fact in enumerate(facts):
        answers = [f" {answer}" for answer in sources.ATTRIBUTES[fact.attribute].answers]
        for probe in (validation[number], *held_out[2 * number : 2 * number + 2]):
            assert probe.answer == f" {fact.answer}"
            assert fact.person in probe.prompt
            assert probe.prompt not in stated
            assert sorted([probe.answer, *probe.others]) == sorted(answers)


def test_new_prose_has_no_copies(models_folder):
    documents = sources.new_prose(models_folder)
    assert sorted(documents) == [f"new{number}" for number in range(8)]
    text = " ".join(documents.values())
    assert "copied1 " not in text  # also in an older model
    assert "argument1 " not in text
    assert text.count("shared1 ") == 1  # the first of two
    parts = sources.split(documents)
    assert sorted(chain(*parts.values())) == sorted(documents.values())
    runs = [{run for text in part for run in sources.word_runs(text)} for part in parts.values()]
    assert all(runs)
    assert not any(one & other for one, other in combinations(runs, 2))


def test_blocks_of_training_and_held_out_text_differ(texts):
    trained, held_out = (torch.cat([*part.values()]).tolist() for part in (texts.train, texts.prose))
    assert not [block for block in trained if block in held_out]
    assert [len(texts.prose[f"prose, {part}"]) for part in ("validation", "held_out")] == [1, 2]
    assert {name: len(one) for name, one in texts.train.items()} == {"facts": 15, "prose": 5}  # a batch: 3, 1
