"""The data of a run as a whole: sources, held-out and retained text, and what is said about them."""

import re

import datasets
import pytest

from mica.cli.adapt.corpus import Part, check, gather
from mica.errors import UsageError
from tests.support import adapt_runs
from tests.support.adapt_runs import ROWS, write
from tests.support.tiny_cli import byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


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


def held_out_and_trained(corpus) -> list[set[str]]:
    """The rows in each of the two that no edge of a block cuts in half."""
    return [set(re.findall(r"row [^|]+(?=\|)", texts(blocks))) for blocks in (corpus.held_out, corpus.train)]


@pytest.fixture
def one_source(tmp_path):
    """Settings of a run on a single file, whose last document has no text."""
    return settings(write(tmp_path / "a.jsonl", [*ROWS, {"text": ""}]))


def test_one_source_is_divided_into_training_and_held_out_blocks(one_source):
    corpus = gather(one_source, TOKENIZER)
    assert corpus.held_out_by == "documents"
    assert (len(corpus.held_out), corpus.retain, corpus.retain_fingerprint) == (4, None, None)
    # Lost are the ends, shorter than a block, and held-out blocks beyond the four that are measured
    assert 0 <= corpus.parts[0].tokens // 32 - len(corpus.train) - len(corpus.held_out) <= 5
    assert corpus.largest_token_id == TOKENIZER.eos_token_id
    assert "position_ids" in corpus.train[0]


def test_a_part_says_what_its_source_holds(one_source):
    (part,) = gather(one_source, TOKENIZER).parts
    tokens = sum(len(row["text"].encode()) + 1 for row in ROWS)  # one for each byte, and an EOS
    expected = {"tokens": tokens, "documents": 30, "empty": 1, "skipped": 0}
    assert part._replace(tokens_per_word=0) == Part(name=one_source.text[0], **expected, tokens_per_word=0)
    words = sum(len(row["text"].split()) for row in ROWS)
    assert part.tokens_per_word == pytest.approx((tokens - 30) / words, rel=0.1)  # by a sample


def test_the_same_text_is_tokenised_only_once(one_source):
    first, again = gather(one_source, TOKENIZER), gather(one_source, TOKENIZER)
    assert (first.cached, again.cached) == (False, True)
    assert "(already tokenised)" in again.describe(one_source)
    assert again.fingerprint == first.fingerprint


def test_small_sources_are_joined(tmp_path):
    """Each of the twenty is shorter than a block; of them all, less than a block is lost on either side."""
    files = [write(tmp_path / f"{n}.jsonl", rows(n)) for n in range(20)]
    corpus = gather(settings(files, packing="stream", eval_blocks=1), TOKENIZER)
    assert len(corpus.parts) == 20
    held_out, trained = held_out_and_trained(corpus)
    assert not held_out & trained
    kept = len(texts(corpus.train)) + len(texts(corpus.held_out))
    assert kept > len(joined(rows(*range(20)))) - 2 * 32


def test_a_source_that_is_given_twice_has_twice_its_share(tmp_path):
    large = write(tmp_path / "a.jsonl", rows(*range(400)))
    small = write(tmp_path / "b.jsonl", rows(*range(80), word="few"))
    corpus = gather(settings([large, small, small], packing="stream"), TOKENIZER)
    trained = texts(corpus.train)
    assert {trained.count(f"few {number:03} ") for number in range(75)} == {0, 2}
    held_out = texts(corpus.held_out)
    assert not any(f"few {number:03} " in held_out for number in range(75) if f"few {number:03} " in trained)


def test_a_document_of_two_sources_is_on_one_side(tmp_path):
    first = write(tmp_path / "a.jsonl", rows(*range(200)))
    second = write(tmp_path / "b.jsonl", rows(*range(150, 300)))
    changes = {"packing": "stream", "eval_blocks": 1000, "held_out": 0.3}
    corpus = gather(settings([first, second], **changes), TOKENIZER)
    held_out, trained = held_out_and_trained(corpus)
    assert len(held_out) > 50
    assert not held_out & trained
    assert corpus.dropped > 0


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


@pytest.fixture
def folder_source(tmp_path):
    """Settings of a run on a folder with something of each kind that is left out."""
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "a.jsonl", [*rows(*range(100)), {"text": " "}, *rows(7, 7)])
    (tmp_path / "texts" / "x.png").write_bytes(b"x")
    held_out = write(tmp_path / "b.jsonl", rows(*range(1, 9)))
    return settings(tmp_path / "texts", held_out_text=[str(held_out)])


def test_what_is_left_out_is_said(folder_source):
    corpus = gather(folder_source, TOKENIZER)
    blocks, amount = len(corpus.train), corpus.amount(folder_source, 5)
    rest = blocks % 10  # five processes read two blocks each
    assert amount.left_out == rest > 1
    assert corpus.describe(folder_source, 5).splitlines() == [
        f"{corpus.parts[0].tokens:,} tokens in 102 documents, {blocks} training blocks of 32; this run sees "
        f"{amount.blocks_after(10) / blocks:.3g} epochs",
        "held out: 2 blocks (--held-out-text)",
        "left out of training: 10 copies of held-out documents",
        f"left out of each epoch: {rest} blocks short of a full batch, different ones each time",
        f"left out of {folder_source.text[0]}: 1 document without text",
        f"left out of {folder_source.text[0]}: 1 file of other kinds",
    ]


def test_nothing_is_said_of_what_has_nothing_left_out(tmp_path):
    only_text = settings(write(tmp_path / "a.jsonl", rows(*range(100))))
    described = gather(only_text, TOKENIZER).describe(only_text)
    assert "left out of training" not in described
    assert "without text" not in described


def test_a_missing_file_is_refused_before_anything_is_read(tmp_path):
    text, missing = write(tmp_path / "a.jsonl", ROWS), str(tmp_path / "missing.txt")
    for name, option in {"held_out_text": "--held-out-text", "retain": "--retain"}.items():
        with pytest.raises(UsageError, match=re.escape(f"{option} {missing}: no such file")):
            check(settings(text, **{name: [missing]}))


def test_too_little_text_is_refused(tmp_path):
    text = write(tmp_path / "a.jsonl", ROWS)
    short = write(tmp_path / "b.jsonl", rows(1))
    for changes, message in [
        ({"text": [str(short)]}, "--text: 10 tokens found, 64 needed: one training and one held-out block"),
        ({"held_out_text": [str(short)]}, "--held-out-text: 10 tokens found, 32 needed: one block of"),
        ({"retain": [str(short)]}, "--retain: 10 tokens found, 32 needed: one block of"),
        ({"held_out_text": [str(text)]}, "--text: 10 tokens are not held out, 32 needed: one training block"),
    ]:
        with pytest.raises(UsageError, match=re.escape(message)):
            gather(settings(**{"text": [text, short], **changes}), TOKENIZER)
