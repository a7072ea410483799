"""The data of a run as a whole: sources, held-out and retained text, and what is said about them."""

import re

import pytest

from mica.cli.adapt.corpus import Part, gather
from mica.errors import UsageError
from tests.support import adapt_runs
from tests.support.adapt_runs import ROWS, write
from tests.support.tiny_cli import byte_tokenizer

TOKENIZER = byte_tokenizer()


def settings(text, **changes):
    """Settings of a run on ``text``, one source or a list; a step reads three batches of two blocks."""
    items = [str(item) for item in (text if isinstance(text, list) else [text])]
    own = {"text": items, "eval_blocks": 4, "batch_size": 2, "gradient_accumulation_steps": 3}
    return adapt_runs.settings(**own | changes)


def rows(*numbers: int, word: str = "row") -> list[dict]:
    """One short document for each number; the same number and word make the same document."""
    return [{"text": f"{word} {number:03} {number * number}"} for number in numbers]


def joined(documents: list[dict]) -> str:
    return "".join(f"{row['text']}|" for row in documents)


def texts(blocks) -> str:
    """All text of a set of blocks, a | after each document, as by `joined`."""
    ids = [token for block in blocks for token in block["input_ids"].tolist()]
    return TOKENIZER.decode(ids).replace("<eos>", "|")


def test_one_source_is_divided_into_training_and_held_out_blocks(tmp_path):
    text = write(tmp_path / "a.jsonl", [*ROWS, {"text": ""}])
    corpus = gather(settings(text), TOKENIZER)
    assert corpus.held_out_by == "documents"
    assert (len(corpus.held_out), corpus.retain, corpus.retain_fingerprint) == (4, None, None)
    tokens = sum(len(row["text"].encode()) + 1 for row in ROWS)  # one for each byte, and an EOS
    assert corpus.parts == (Part(name=str(text), tokens=tokens, documents=30, skipped=0),)
    # Lost are the ends, shorter than a block, and held-out blocks beyond the four that are measured
    assert 0 <= tokens // 32 - len(corpus.train) - len(corpus.held_out) <= 5
    assert corpus.largest_token_id == TOKENIZER.eos_token_id
    assert "position_ids" in corpus.train[0]
    assert gather(settings(text), TOKENIZER).fingerprint == corpus.fingerprint


def test_a_document_of_two_sources_is_on_one_side(tmp_path):
    first = write(tmp_path / "a.jsonl", rows(*range(200)))
    second = write(tmp_path / "b.jsonl", rows(*range(150, 300)))
    corpus = gather(settings([first, second], eval_blocks=1000, held_out=0.3), TOKENIZER)
    assert corpus.dropped > 0  # though neither source has a document twice


def test_a_held_out_set_of_its_own(tmp_path):
    text = write(tmp_path / "a.jsonl", rows(*range(100)))
    held_out = write(tmp_path / "b.csv", rows(*range(90, 130)))
    retain = write(tmp_path / "c.parquet", rows(*range(50), word="keep"))
    args = settings(text, held_out_text=[str(held_out)], retain=[str(retain)], packing="stream")
    corpus = gather(args, TOKENIZER)
    assert (corpus.parts[0].documents, corpus.dropped, corpus.held_out_by) == (100, 10, "--held-out-text")
    trained = joined(rows(*range(90)))
    assert texts(corpus.train) == trained[: len(trained) // 32 * 32]
    assert texts(corpus.held_out)[:32] == joined(rows(*range(90, 130)))[:32]
    assert (len(corpus.held_out), len(corpus.retain)) == (4, 4)
    assert "keep 000" in texts(corpus.retain)
    alone = gather(settings(text, packing="stream"), TOKENIZER)
    # All three differ, and none is None
    assert len({corpus.fingerprint, corpus.retain_fingerprint, alone.fingerprint, None}) == 4


def test_what_is_left_out_is_said(tmp_path):
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "a.jsonl", [*rows(*range(100)), {"text": " "}, *rows(7, 7)])
    (tmp_path / "texts" / "x.png").write_bytes(b"x")
    args = settings(tmp_path / "texts", held_out_text=[str(write(tmp_path / "b.jsonl", rows(*range(1, 9))))])
    corpus = gather(args, TOKENIZER)
    assert corpus.describe().splitlines() == [
        f"tokens: {corpus.parts[0].tokens:,}, documents: 102",
        f"blocks of 32: {len(corpus.train)} for training, 2 held out (--held-out-text)",
        "left out of training, as copies of held-out documents: 10",
        f"left out of {args.text[0]}, files of other kinds: 1",
    ]
    only_text = settings(write(tmp_path / "c.jsonl", rows(*range(100))))
    assert "left out" not in gather(only_text, TOKENIZER).describe()


def test_too_little_text_is_refused(tmp_path):
    text = write(tmp_path / "a.jsonl", ROWS)
    short = write(tmp_path / "b.jsonl", rows(1))
    for changes, message in [
        (
            {"text": [str(short)]},
            "--text: 10 tokens found, copies not counted, too little for one training and one held-out",
        ),
        ({"held_out_text": [str(short)]}, "--held-out-text: 10 tokens found, too little for one block of"),
        (
            {"held_out_text": [str(text)]},
            "--text: 10 tokens are not held out, too little for one training block",
        ),
    ]:
        with pytest.raises(UsageError, match=re.escape(message)):
            gather(settings(**{"text": [text, short], **changes}), TOKENIZER)
