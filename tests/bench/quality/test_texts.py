"""What `bench.quality` trains on, and that nothing of it is in what is held out."""

from pathlib import Path

import pytest

from bench import quality_text
from mica.errors import UsageError


def test_facts_are_a_function_of_the_seed_and_consistent():
    facts = quality_text.invent(16)
    assert facts == quality_text.invent(16) != quality_text.invent(16, seed=1)
    assert len({(fact.person, fact.attribute) for fact in facts}) == len(facts) == 64
    names = {fact.person for fact in facts}
    assert len(names) == 16
    for attribute, answers in quality_text.ANSWERS.items():
        given = [fact.answer for fact in facts if fact.attribute == attribute]
        assert {given.count(answer) for answer in answers} == {2}
    stated = quality_text.statements(facts, 4)
    assert stated == quality_text.statements(facts, 8)[: len(stated)]
    assert len(set(stated)) == len(stated) == len(facts) * quality_text.STATEMENTS
    for start in range(0, len(stated), len(facts)):  # a round has each once
        found = {(fact.person, fact.answer) for fact in facts}
        for line in stated[start : start + len(facts)]:
            (one,) = [pair for pair in found if all(word in line for word in pair)]
            found.remove(one)
        assert not found
    for fact in facts:
        answers = quality_text.ANSWERS[fact.attribute]
        about = [line for line in stated if fact.person in line and any(a in line for a in answers)]
        assert sum(fact.answer in line for line in about) == quality_text.STATEMENTS
    for people in (0, 6, 32):
        with pytest.raises(UsageError, match=f"--people {people}: a multiple of 8, at most 24"):
            quality_text.invent(people)


def test_questions_are_not_in_training_nor_in_validation():
    facts = quality_text.invent(16)
    stated = " ".join(quality_text.statements(facts, 4))
    validation, held_out = (quality_text.probes(facts, part) for part in ("validation", "held_out"))
    assert 2 * len(validation) == len(held_out) == 2 * len(facts)
    assert len({one.prompt for one in [*validation, *held_out]}) == 3 * len(facts)
    for number, fact in enumerate(facts):
        for probe in (validation[number], *held_out[2 * number : 2 * number + 2]):
            assert probe.answer == f" {fact.answer}"
            assert fact.person in probe.prompt
            assert probe.prompt not in stated
            assert {probe.answer, *probe.others} == {f" {a}" for a in quality_text.ANSWERS[fact.attribute]}
            assert len(probe.others) == 7


def test_new_prose_has_no_copies(models_folder):
    documents = quality_text.new_prose(models_folder)
    assert sorted(documents) == [f"new{number}" for number in range(8)]
    text = " ".join(documents.values())
    assert "copied1 " not in text  # also in an older model
    assert "argument1 " not in text
    assert text.count("shared1 ") == 1  # the first of two
    parts = quality_text.split(documents)
    assert sorted(text for part in parts.values() for text in part) == sorted(documents.values())
    found = {name: {r for text in part for r in quality_text.word_runs(text)} for name, part in parts.items()}
    for one, other in (("train", "validation"), ("train", "held_out"), ("validation", "held_out")):
        assert found[one]
        assert not found[one] & found[other]
    with pytest.raises(UsageError, match="2 documents"):
        quality_text.split(dict(list(documents.items())[:2]))


def test_installed_transformers_has_new_prose():
    import transformers.models

    folder = Path(transformers.models.__path__[0])
    source = (folder / "smollm3" / "modeling_smollm3.py").read_text(encoding="utf-8")  # July 2025
    assert quality_text.is_recent(source)
    source = (folder / "llama" / "modeling_llama.py").read_text(encoding="utf-8")
    assert not quality_text.is_recent(source)


def test_blocks_of_training_and_held_out_text_differ(texts):
    rows = {
        name: {tuple(row.tolist()) for row in blocks}
        for name, blocks in {**texts.train, **texts.prose}.items()
    }
    for one in texts.train:
        for other in texts.prose:
            assert not rows[one] & rows[other]
    assert len(texts.prose["prose, validation"]) == 1
    assert len(texts.prose["prose, held_out"]) == 2


def test_answers_that_begin_alike_are_refused(tokenizer):
    with pytest.raises(UsageError, match="begins two answers"):
        quality_text.ask(tokenizer, [quality_text.Probe("A", " wolf", (" wolf-like",))])
