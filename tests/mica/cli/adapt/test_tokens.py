"""Exactly the tokens of the text; and never twice the same work."""

import multiprocessing
import os
import re
import signal

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mica.cli.adapt import tokens
from mica.cli.adapt.sources import find
from mica.errors import UsageError
from tests.support.adapt_runs import ROWS, write
from tests.support.faults import FULL, raising
from tests.support.tiny_cli import byte_tokenizer

TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "a.jsonl", ROWS)


def tokenized(path, tokenizer=None, **options) -> tokens.Tokens:
    [source] = find("--text", [path])
    return tokens.tokenize(source, tokenizer or byte_tokenizer(), **options)


def oracle(texts, tokenizer=None) -> list[list[int]]:
    tokenizer = tokenizer or byte_tokenizer()
    every = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id] for ids in every]


def documents(result: tokens.Tokens) -> list[list[int]]:
    return [result.ids[span.store][span.start : span.start + span.length].tolist() for span in result.spans]


def test_tokens_are_those_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 23)
    monkeypatch.setattr(tokens, "BATCH", 5)
    extra = ["", " \n ", TEXTS[3], "", "x" * 23 + " " * 30, " " * 50]  # white space in pieces is text
    path = write(tmp_path / "a.jsonl", [*ROWS, *({"text": text} for text in extra)])
    result = tokenized(path)
    assert documents(result) == oracle([*TEXTS, TEXTS[3], *extra[-2:]])
    assert result.ids[0].dtype == np.uint16
    digests = result.spans.digest
    assert digests.dtype == np.uint64
    assert len(set(digests.tolist())) == 32
    assert digests[3] == digests[30]


def test_more_documents_than_are_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 7)
    first = tokenized(write(tmp_path / "a.jsonl", ROWS))
    assert len(first.ids) == 5
    both = tokens.joined([first, tokenized(write(tmp_path / "b.jsonl", [{"text": ""}, *ROWS[:9]]))])
    assert documents(both) == oracle([*TEXTS, *TEXTS[:9]])


def test_a_tokenizer_without_eos_and_a_large_vocabulary(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(2**16)])
    tokenizer.eos_token = None
    (tmp_path / "a.txt").write_text("ab<65535>c")
    result = tokenized(tmp_path / "a.txt", tokenizer)
    assert (result.ids[0].dtype, result.ids[0].max()) == (np.uint32, 256 + 2**16)
    assert documents(result) == oracle(["ab<65535>c"], tokenizer)


@pytest.mark.parametrize("chunk", [1, 3, 50, 10**6])
def test_how_a_text_comes_in_chunks_is_no_matter(monkeypatch, chunk):
    monkeypatch.setattr(tokens, "PIECE", 20)
    text = "eins\n  zwei\ndrei vier\n" + "漢" * 45 + " fünf sechs sieben\t acht\n\n\n\n" + "x\n  y\n" * 9
    pieces = list(tokens.cut(text[at : at + chunk] for at in range(0, len(text), chunk)))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 20
    assert pieces == list(tokens.cut([text]))
    assert next(tokens.cut(["eins\n zwei drei vier fünf"])) == "eins\n"
    assert next(tokens.cut(["eins\nzwei\n drei vier fünf"])) == "eins\n"  # before what begins with a word
    assert pieces[:5] == ["eins\n  zwei\n", "drei vier\n", "漢" * 20, "漢" * 20, "漢" * 5 + " fünf sechs"]


def test_the_key_is_the_content(tmp_path, path, monkeypatch):
    tokenizer = byte_tokenizer()
    first = documents(tokenized(path, tokenizer))

    with monkeypatch.context() as poisoned:
        poisoned.setattr(PreTrainedTokenizerFast, "__call__", raising(AssertionError("tokenised again")))
        os.utime(path, (1, 1))
        path = path.rename(tmp_path / "b.jsonl")
        tokenizer.backend_tokenizer.enable_padding()  # what a call may have left
        assert documents(tokenized(path, tokenizer)) == first
        other = byte_tokenizer()
        other.add_tokens(["mal"])
        for change in ({"field": "title"}, {"tokenizer": other}):
            with pytest.raises(AssertionError, match="tokenised again"):
                tokenized(path, **change)
    path.write_bytes(path.read_bytes().replace(b"29 mal", b"29 Mal"))
    changed = documents(tokenized(path))
    assert changed[:29] == first[:29]
    assert changed[29] != first[29]


def _half(*_):
    for number in range(3000):
        yield {"ids": np.array([number], np.uint16), "digest": number}
    os.kill(os.getpid(), signal.SIGKILL)


def test_half_a_cache_is_not_used(path, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_rows", _half)
        run = multiprocessing.get_context("fork").Process(target=tokenized, args=(path,))
        run.start()
        run.join()
    assert any("incomplete" in str(file) for file in cache.rglob("*.arrow"))
    assert documents(tokenized(path)) == oracle(TEXTS)


@pytest.mark.parametrize(
    ("rows", "replaced", "message"),
    [
        ([{"text": " "}, {"text": ""}], None, "no text in it"),
        ([{"text": "a"}, {"text": 1}], None, "column 'text' must have strings only"),
        (ROWS, raising(FULL), "tokens cannot be cached in .*: No space left on device"),
    ],
)
def test_what_fails_leaves_nothing(tmp_path, cache, monkeypatch, rows, replaced, message):
    path = write(tmp_path / "a.jsonl", rows)
    if replaced is not None:
        monkeypatch.setattr(tokens, "_rows", replaced)
    with pytest.raises(UsageError, match=f"^--text {re.escape(str(path))}: .*{message}"):
        tokenized(path)
    assert all("incomplete" in str(file) for file in cache.rglob("*.arrow"))
