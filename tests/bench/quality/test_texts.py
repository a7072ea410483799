"""What `bench.quality` trains on, and that none of it is in what is held out."""

import re

import pytest

from bench.quality import texts as sources
from mica.errors import UsageError


def test_facts_are_a_function_of_the_seed_and_consistent():
    facts = sources.invent(16)
    assert facts == sources.invent(16) != sources.invent(16, seed=1)
    assert len({(fact.person, fact.attribute) for fact in facts}) == len(facts) == 64
    assert len({fact.person for fact in facts}) == 16
    for name, attribute in sources.ATTRIBUTES.items():
        given = [fact.answer for fact in facts if fact.attribute == name]
        assert [given.count(answer) for answer in attribute.answers] == [2] * sources.NUM_ANSWERS
    stated = sources.statements(facts, 4)
    assert stated == sources.statements(facts, 8)[: len(stated)]
    assert len(set(stated)) == len(stated) == len(facts) * sources.STATEMENTS
    for start in range(0, len(stated), len(facts)):  # a round has each once
        left = {(fact.person, fact.answer) for fact in facts}
        for line in stated[start : start + len(facts)]:
            (one,) = [pair for pair in left if all(word in line for word in pair)]
            left.remove(one)
        assert not left
    for people in (0, 6, 32):
        with pytest.raises(UsageError, match=f"--people {people}: a multiple of 8, at most 24"):
            sources.invent(people)


def test_questions_are_not_in_training_nor_in_validation():
    facts = sources.invent(16)
    stated = " ".join(sources.statements(facts, 4))
    validation, held_out = (sources.probes(facts, part) for part in ("validation", "held_out"))
    assert 2 * len(validation) == len(held_out) == 2 * len(facts)
    assert len({one.prompt for one in [*validation, *held_out]}) == 3 * len(facts)
    for number, fact in enumerate(facts):
        for probe in (validation[number], *held_out[2 * number : 2 * number + 2]):
            assert probe.answer == f" {fact.answer}"
            assert fact.person in probe.prompt
            assert probe.prompt not in stated
            answers = [f" {answer}" for answer in sources.ATTRIBUTES[fact.attribute].answers]
            assert sorted([probe.answer, *probe.others]) == sorted(answers)


def test_new_prose_has_no_copies(models_folder):
    documents = sources.new_prose(models_folder)
    assert sorted(documents) == [f"new{number}" for number in range(8)]
    text = " ".join(documents.values())
    assert "copied1 " not in text  # also in an older model
    assert "argument1 " not in text
    assert text.count("shared1 ") == 1  # the first of two
    parts = sources.split(documents)
    assert sorted(text for part in parts.values() for text in part) == sorted(documents.values())
    word_runs = {name: {r for text in part for r in sources.word_runs(text)} for name, part in parts.items()}
    for one, other in (("train", "validation"), ("train", "held_out"), ("validation", "held_out")):
        assert word_runs[one]
        assert not word_runs[one] & word_runs[other]
    with pytest.raises(UsageError, match="2 documents"):
        sources.split(dict(list(documents.items())[:2]))


def test_installed_transformers_has_new_prose_and_known_sentences_end_before_one_word():
    for model, is_recent in (("smollm3", True), ("llama", False)):  # July 2025, February 2023
        source = (sources.MODELS / model / f"modeling_{model}.py").read_text(encoding="utf-8")
        assert sources.is_recent(source) == is_recent
    known = sources.known()
    assert all(re.fullmatch(r" [A-Za-z]+|\d\d", probe.answer) for probe in known)
    assert sources.Probe("Humans breathe in oxygen and breathe out carbon", " dioxide") in known


def test_blocks_of_training_and_held_out_text_differ(texts):
    blocks = texts.train | texts.prose
    rows = {name: {tuple(row.tolist()) for row in some} for name, some in blocks.items()}
    for one in texts.train:
        for other in texts.prose:
            assert not rows[one] & rows[other]
    assert [len(texts.prose[f"prose, {part}"]) for part in ("validation", "held_out")] == [1, 2]
    assert {name: len(one) for name, one in texts.train.items()} == {"facts": 15, "prose": 5}  # a batch: 3, 1


def test_texts_that_cannot_be_measured_are_refused(tokenizer, models_folder):
    """Facts that fill no step or want more prose, and answers that begin alike."""
    for rounds, length in ((1, 100), (200, 32)):
        with pytest.raises(UsageError, match=f"--rounds {rounds}: too "):
            sources.gather(tokenizer, 8, rounds, length, 1, models_folder)
    with pytest.raises(UsageError, match="begins two answers"):
        sources.tokenise(tokenizer, [sources.Probe("A", " wolf", (" wolf-like",))])
