"""The data of a run as a whole: sources, weights, held-out and retained text, and what is said about them."""

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
    """Those of a run on ``text``, one source or a list; three times two blocks a step."""
    items = [str(item) for item in (text if isinstance(text, list) else [text])]
    own = {"text": items, "workers": 1, "eval_blocks": 4, "batch_size": 2, "gradient_accumulation_steps": 3}
    return adapt_runs.settings(**own | changes)


def rows(*numbers: int, word: str = "row") -> list[dict]:
    return [{"text": f"{word} {number:03} {number * number}"} for number in numbers]


def texts(blocks) -> str:
    """All text of a set of blocks, documents separated by |."""
    ids = [token for block in blocks for token in block["input_ids"].tolist()]
    return TOKENIZER.decode(ids).replace("<eos>", "|")


def held_out_and_trained(corpus) -> list[set[str]]:
    """The whole rows in both."""
    return [set(re.findall(r"row [^|]+(?=\|)", texts(blocks))) for blocks in (corpus.held_out, corpus.train)]


def test_one_source(tmp_path):
    args = settings(write(tmp_path / "a.jsonl", [*ROWS, {"text": ""}]))
    corpus = gather(args, TOKENIZER)
    total = sum(len(row["text"].encode()) + 1 for row in ROWS)
    assert corpus.held_out_by == "documents"
    assert (len(corpus.held_out), corpus.retain, corpus.retain_fingerprint) == (4, None, None)
    assert (corpus.largest_token_id, corpus.cached) == (256, False)
    assert 0 <= total // 32 - len(corpus.train) - len(corpus.held_out) <= 5
    some = [row["text"] for row in [*ROWS, {"text": ""}]][::16]
    cost = sum(len(text.encode()) for text in some) / sum(len(text.split()) for text in some)
    assert corpus.parts == (Part(args.text[0], total, 30, 1, 0, cost),)
    assert "position_ids" in corpus.train[0]
    again = gather(args, TOKENIZER)
    assert (again.cached, again.fingerprint) == (True, corpus.fingerprint)


def test_small_sources_are_joined(tmp_path):
    files = [write(tmp_path / f"{n}.jsonl", rows(n)) for n in range(20)]
    corpus = gather(settings(files, packing="stream", eval_blocks=1), TOKENIZER)
    assert len(corpus.parts) == 20
    joined = "".join(f"{row['text']}|" for row in rows(*range(20)))
    held_out, trained = held_out_and_trained(corpus)
    assert not held_out & trained
    assert len(texts(corpus.train)) + len(texts(corpus.held_out)) > len(joined) - 2 * 32


def test_weights(tmp_path):
    large = write(tmp_path / "a.jsonl", rows(*range(400)))
    small = write(tmp_path / "b.jsonl", rows(*range(80), word="few"))
    args = settings([large, small], text_weights=[1, 3], held_out=0.4, packing="stream", eval_blocks=8)
    corpus = gather(args, TOKENIZER)

    def count(blocks, *words):
        return sum(all(word in texts([block]) for word in words) for block in blocks)

    assert 2.9 < count(corpus.train, "few") / count(corpus.train, "row") < 3.1
    assert count(corpus.train, "row", "few") == 0
    assert count(corpus.held_out, "row") >= 2
    assert count(corpus.held_out, "few") >= 4
    assert len(corpus.held_out) == 8
    args.text_weights = None
    assert gather(args, TOKENIZER).fingerprint != corpus.fingerprint


@pytest.mark.parametrize("weights", [None, [1, 1]])
def test_a_document_of_two_sources_is_on_one_side(tmp_path, weights):
    first = write(tmp_path / "a.jsonl", rows(*range(200)))
    second = write(tmp_path / "b.jsonl", rows(*range(150, 300)))
    changes = {"text_weights": weights, "packing": "stream", "eval_blocks": 1000, "held_out": 0.3}
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
    expected, measured = (
        "".join(f"{row['text']}|" for row in rows(*numbers)) for numbers in (range(90), range(90, 130))
    )
    assert texts(corpus.train) == expected[: len(expected) // 32 * 32]
    assert texts(corpus.held_out)[:32] == measured[:32]
    assert (len(corpus.held_out), len(corpus.retain)) == (4, 4)
    assert "keep 000" in texts(corpus.retain)
    alone = gather(settings(text, packing="stream"), TOKENIZER)
    assert len({corpus.fingerprint, corpus.retain_fingerprint, alone.fingerprint, None}) == 4


def test_what_is_said(tmp_path):
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "a.jsonl", [*rows(*range(100)), {"text": " "}, *rows(7, 7)])
    (tmp_path / "texts" / "x.png").write_bytes(b"x")
    args = settings(tmp_path / "texts", held_out_text=[str(write(tmp_path / "b.jsonl", rows(*range(1, 9))))])
    corpus = gather(args, TOKENIZER)
    blocks = len(corpus.train)
    amount = corpus.amount(settings("a"), 2)
    rest = blocks % 4
    assert amount.left_out == rest
    blocks_left = f"{rest} block{'s' * (rest > 1)}"
    assert corpus.describe(settings("a"), 2).splitlines() == [
        f"{corpus.parts[0].tokens:,} tokens in 102 documents, {blocks} training blocks of 32; this run sees "
        f"{amount.blocks_after(10) / blocks:.3g} epochs",
        "held out: 2 blocks (--held-out-text)",
        "left out of training: 10 copies of held-out documents",
        *[f"left out of each epoch: {blocks_left} short of a full batch, different ones each time"][
            : bool(rest)
        ],
        f"left out of {args.text[0]}: 1 document without text",
        f"left out of {args.text[0]}: 1 file of other kinds",
    ]
    part = settings("a", steps=None, epochs=2.5)
    amount = corpus.amount(part)
    read = amount.blocks_after(amount.steps(part))
    assert f"this run sees {read / blocks:.3g} epochs" in corpus.describe(part)
    share = 100 * 2 / blocks
    one = settings("a", steps=1, gradient_accumulation_steps=1)
    assert f"this run sees {share:.3g} % of an epoch" in corpus.describe(one)
    assert "(already tokenised)" in gather(args, TOKENIZER).describe(args)


def test_refusals(tmp_path):
    text = write(tmp_path / "a.jsonl", ROWS)
    short = write(tmp_path / "b.jsonl", rows(1))
    missing = str(tmp_path / "missing.txt")
    for changes, message in [
        ({"held_out_text": [missing]}, f"--held-out-text {missing}: no such file"),
        ({"retain": [missing]}, f"--retain {missing}: no such file"),
    ]:
        with pytest.raises(UsageError, match=re.escape(message)):
            check(settings([text, short], **changes))
    for changes, message in [
        ({"text": [str(short)]}, "--text: 10 tokens found, 64 needed: one training and one held-out block"),
        ({"text_weights": [1.0, 1.0]}, f"--text {short}: 10 tokens found, 64 needed"),
        ({"held_out_text": [str(short)]}, "--held-out-text: 10 tokens found, 32 needed: one block of"),
        ({"retain": [str(short)]}, "--retain: 10 tokens found, 32 needed: one block of"),
        ({"held_out_text": [str(text)]}, "--text: 10 tokens are not held out, 32 needed: one training block"),
    ]:
        with pytest.raises(UsageError, match=re.escape(message)):
            gather(settings(**{"text": [text, short], **changes}), TOKENIZER)
