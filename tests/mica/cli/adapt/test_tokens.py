"""Exactly the tokens of the text, whatever the number of processes; and never twice the same work."""

import multiprocessing
import os
import pickle
import re
import shutil

import datasets
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mica.cli.adapt import tokens
from mica.cli.adapt.sources import find
from mica.errors import UsageError
from tests.support.adapt_texts import ROWS, write
from tests.support.tiny_cli import byte_tokenizer

TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def tokenized(path, tokenizer=None, **options) -> tokens.Tokens:
    [result] = tokens.tokenize(find("--text", [path]), tokenizer or byte_tokenizer(), **options)
    return result


def oracle(texts, tokenizer) -> list[list[int]]:
    return [
        tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts
    ]


def documents(result: tokens.Tokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(result.ids, result.lengths.cumsum()[:-1])]


@pytest.mark.parametrize("workers", [1, 2])
def test_tokens_are_those_of_the_text(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(tokens, "PIECE", 23)
    monkeypatch.setattr(tokens, "BATCH", 7)
    monkeypatch.setattr(tokens, "SMALL", 0)
    monkeypatch.setattr(tokens, "_CHARACTERS", 101)
    rows = [*ROWS, {"text": " \n "}, ROWS[3], {"text": ""}, {"text": "x" * 23 + " " * 30}]
    result = tokenized(write(tmp_path / "a.jsonl", rows), workers=workers)
    assert documents(result) == oracle([*TEXTS, TEXTS[3], "x" * 23 + " " * 30], byte_tokenizer())
    assert (result.empty, result.largest, result.cached, result.ids.dtype) == (2, 256, False, np.uint16)
    assert result.digests.dtype == np.uint64
    assert len(set(result.digests.tolist())) == 31
    assert result.digests[3] == result.digests[30]
    assert sorted(file.name for file in result.folder.iterdir()) == [
        "digests.npy",
        "facts.json",
        "lengths.npy",
        "tokens.bin",
    ]
    again = pickle.loads(pickle.dumps(result))
    assert (again.ids == result.ids).all()


def test_a_tokenizer_without_eos_and_a_large_vocabulary(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(2**16)])
    tokenizer.eos_token = None
    (tmp_path / "a.txt").write_text("ab<65535>c", encoding="utf-8")
    result = tokenized(tmp_path / "a.txt", tokenizer)
    assert result.ids.dtype == np.uint32
    assert documents(result) == [tokenizer("ab<65535>c")["input_ids"]]
    assert result.largest == 256 + 2**16


@pytest.mark.parametrize("chunk", [1, 3, 50, 10**6])
def test_how_a_text_comes_in_chunks_is_no_matter(monkeypatch, chunk):
    monkeypatch.setattr(tokens, "PIECE", 20)
    text = "eins\n  zwei\ndrei vier\n" + "漢" * 45 + " fünf sechs sieben\t acht\n\n\n\n" + "x\n  y\n" * 9
    pieces = list(tokens.cut(text[at : at + chunk] for at in range(0, len(text), chunk)))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 20
    assert pieces == list(tokens.cut([text]))
    assert pieces[:5] == ["eins\n  zwei\n", "drei vier\n", "漢" * 20, "漢" * 20, "漢" * 5 + " fünf sechs"]


def test_cuts_at_lines_change_no_token(tmp_path, monkeypatch):
    """With the expression by which GPT-2 and most models after it find words."""
    monkeypatch.setattr(tokens, "PIECE", 60)
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    text = "def f(x):\n\n    return x  # 12\n\n\nclass A:\n    pass\n" * 20
    split = pre_tokenizers.Split(Regex(words), "isolated")
    vocabulary = {word: index for index, (word, _) in enumerate(split.pre_tokenize_str(text))}
    vocabulary = {word: index for index, word in enumerate(sorted({*vocabulary, "<unk>"}))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert documents(tokenized(tmp_path / "a.txt", fast)) == oracle([text], fast)


def test_the_key_is_the_content(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)
    tokenizer = byte_tokenizer()
    first = tokenized(path, tokenizer)

    def call(self, *args, **options):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as poisoned:
        poisoned.setattr(PreTrainedTokenizerFast, "__call__", call)
        os.utime(path, (1, 1))
        path = path.rename(tmp_path / "b.jsonl")
        tokenizer.backend_tokenizer.enable_padding()  # what a call may have left
        for again in (tokenized(path, tokenizer), tokenized(path, byte_tokenizer(), workers=2)):
            assert again.cached
            assert documents(again) == documents(first)
        other = byte_tokenizer()
        other.add_tokens(["mal"])
        for change in ({"field": "title"}, {"tokenizer": other}):
            with pytest.raises(AssertionError, match="tokenised again"):
                tokenized(path, **change)
        path.write_bytes(path.read_bytes().replace(b"29 mal", b"29 Mal"))
        with pytest.raises(AssertionError, match="tokenised again"):
            tokenized(path)
        monkeypatch.setattr(tokens, "VERSION", tokens.VERSION + 1)
    changed = tokenized(path)
    assert documents(changed)[:29] == documents(first)[:29]
    assert documents(changed)[29] != documents(first)[29]
    left = [entry.name for entry in (cache / "mica-tokens").iterdir() if entry.is_dir()]
    assert sorted(left) == sorted([first.key, changed.key])


def test_half_a_cache_is_not_used(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", ROWS)
    first = tokenized(path)
    partial = cache / "mica-tokens" / f".{first.key}.partial"  # as kill -9 leaves it
    shutil.move(first.folder, partial)
    (partial / "facts.json").unlink()
    again = tokenized(path)
    assert not again.cached
    assert not partial.exists()
    assert documents(again) == oracle(TEXTS, byte_tokenizer())


def _run(path, cache, barrier, results):
    datasets.config.HF_DATASETS_CACHE = cache
    barrier.wait()
    result = tokenized(path)
    results.put((result.cached, documents(result)))


def test_two_runs_at_once(tmp_path, cache):
    context = multiprocessing.get_context("fork")
    path, barrier, results = write(tmp_path / "a.jsonl", ROWS), context.Barrier(2), context.Queue()
    runs = [context.Process(target=_run, args=(path, cache, barrier, results)) for _ in range(2)]
    for run in runs:
        run.start()
    found = [results.get(timeout=60) for _ in runs]
    for run in runs:
        run.join()
    assert sorted(cached for cached, _ in found) == [False, True]
    assert found[0][1] == found[1][1] == oracle(TEXTS, byte_tokenizer())


def test_a_file_that_changes_meanwhile(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)
    build = tokens._build
    monkeypatch.setattr(tokens, "_build", lambda *args: (build(*args), path.open("ab").write(b"\n")))
    with pytest.raises(UsageError, match=re.escape(f"--text {path}: changed while it was read")):
        tokenized(path)
    assert not [entry for entry in (cache / "mica-tokens").iterdir() if entry.is_dir()]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": " "}, {"text": ""}], "no text in it (2 empty documents)"),
        ([{"text": "a"}, {"text": 1}], "line 2"),
    ],
)
def test_no_text(tmp_path, cache, rows, message):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match=re.escape(message)):
        tokenized(path)
    assert not [entry for entry in (cache / "mica-tokens").iterdir() if entry.is_dir()]


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens, "_write_arrays", full)
    with pytest.raises(UsageError, match=r"cannot be tokenised below .*: No space left on device"):
        tokenized(write(tmp_path / "a.jsonl", ROWS))


def test_default_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert tokens.default_workers() == 16
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert tokens.default_workers() == 3
