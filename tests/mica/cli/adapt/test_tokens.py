"""Exactly the tokens of the text, whatever the number of threads; and never twice the same work."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mica.cli.adapt import tokens
from mica.cli.adapt.sources import find
from mica.errors import UsageError
from tests.support.adapt_runs import ROWS, write
from tests.support.processes import ROOT
from tests.support.tiny_cli import byte_tokenizer

TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "mica-tokens"


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "a.jsonl", ROWS)


def tokenized(path, tokenizer=None, **options) -> tokens.Tokens:
    [result] = tokens.tokenize(find("--text", [path]), tokenizer or byte_tokenizer(), **options)
    return result


def oracle(texts, tokenizer=None) -> list[list[int]]:
    tokenizer = tokenizer or byte_tokenizer()
    every = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id] for ids in every]


def documents(result: tokens.Tokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(result.ids, result.lengths.cumsum()[:-1])]


def finished(cache) -> list[str]:
    return sorted(entry.name for entry in cache.iterdir() if entry.is_dir())


def test_tokens_are_those_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 23)
    monkeypatch.setattr(tokens, "BATCH", 101)
    extra = ["", " \n ", TEXTS[3], "", "x" * 23 + " " * 30, " " * 50]  # white space in pieces is text
    path = write(tmp_path / "a.jsonl", [*ROWS, *({"text": text} for text in extra)])
    result = tokenized(path)
    assert documents(result) == oracle([*TEXTS, TEXTS[3], *extra[-2:]])
    assert (result.empty, result.largest, result.cached, result.ids.dtype) == (3, 256, False, np.uint16)
    assert result.digests.dtype == np.uint64
    assert len(set(result.digests.tolist())) == 32
    assert result.digests[3] == result.digests[30]
    assert {file.name for file in result.folder.iterdir()} == {"facts.npz", "tokens.bin"}


def test_a_tokenizer_without_eos_and_a_large_vocabulary(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(2**16)])
    tokenizer.eos_token = None
    (tmp_path / "a.txt").write_text("ab<65535>c", encoding="utf-8")
    result = tokenized(tmp_path / "a.txt", tokenizer)
    assert (result.ids.dtype, result.largest) == (np.uint32, 256 + 2**16)
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
    assert pieces[:5] == ["eins\n  zwei\n", "drei vier\n", "漢" * 20, "漢" * 20, "漢" * 5 + " fünf sechs"]


def test_cuts_at_lines_change_no_token(tmp_path, monkeypatch):
    """With the expression by which GPT-2 and most models after it find words."""
    monkeypatch.setattr(tokens, "PIECE", 60)
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    text = "def f(x):\n\n    return x  # 12\n\n\nclass A:\n    pass\n" * 20
    split = pre_tokenizers.Split(Regex(words), "isolated")
    vocabulary = sorted({"<unk>", *(word for word, _ in split.pre_tokenize_str(text))})
    vocabulary = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert documents(tokenized(tmp_path / "a.txt", fast)) == oracle([text], fast)


def test_the_key_is_the_content(tmp_path, path, cache, monkeypatch):
    tokenizer = byte_tokenizer()
    first = tokenized(path, tokenizer)

    def call(self, *args, **options):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as poisoned:
        poisoned.setattr(PreTrainedTokenizerFast, "__call__", call)
        os.utime(path, (1, 1))
        path = path.rename(tmp_path / "b.jsonl")
        tokenizer.backend_tokenizer.enable_padding()  # what a call may have left
        for again in (tokenized(path, tokenizer), tokenized(path, workers=2)):
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
    assert finished(cache) == sorted([first.folder.name, changed.folder.name])


def test_half_a_cache_is_not_used(path, cache):
    first = tokenized(path)
    partial = cache / f".{first.folder.name}.partial"  # as kill -9 leaves it
    shutil.move(first.folder, partial)
    (partial / "facts.npz").unlink()
    again = tokenized(path)
    assert not again.cached
    assert not partial.exists()
    assert documents(again) == oracle(TEXTS)


def _run(path, cache, barrier, results):
    datasets.config.HF_DATASETS_CACHE = cache
    barrier.wait()
    result = tokenized(path)
    results.put((result.cached, documents(result)))


def test_two_runs_at_once(path, cache):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    results = context.Queue()
    runs = [context.Process(target=_run, args=(path, cache, barrier, results)) for _ in range(2)]
    for run in runs:
        run.start()
    found = [results.get(timeout=60) for _ in runs]
    for run in runs:
        run.join()
    assert sorted(cached for cached, _ in found) == [False, True]
    assert found[0][1] == found[1][1] == oracle(TEXTS)


def _full(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("rows", "replaced", "message"),
    [
        ([{"text": " "}, {"text": ""}], {}, "no text in it (2 empty documents)"),
        ([{"text": "a"}, {"text": 1}], {}, "row 2"),
        (ROWS, {"_tokenised": _full}, "No space left on device"),
        (
            ROWS,
            {"_build": lambda source, *_: source.files[0].write_text("x")},
            "changed while it was being read",
        ),
    ],
)
def test_what_fails_leaves_nothing(tmp_path, cache, monkeypatch, rows, replaced, message):
    path = write(tmp_path / "a.jsonl", rows)
    for name, by in replaced.items():
        monkeypatch.setattr(tokens, name, by)
    with pytest.raises(UsageError, match=f"^--text {path}: .*{re.escape(message)}"):
        tokenized(path)
    assert not finished(cache)


@pytest.mark.slow
def test_workers_are_threads_of_the_tokenizer(tmp_path):
    code = """
import sys
from pathlib import Path
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
import datasets
from mica.cli.adapt import tokens
from mica.cli.adapt.sources import find
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
datasets.config.HF_DATASETS_CACHE = sys.argv[1] + "/cache"
threads = lambda: len(list(Path("/proc/self/task").iterdir()))
before = threads()
[made] = tokens.tokenize(find("--text", [sys.argv[1] + "/a.txt"]), tokenizer, workers=7)
print(len(made.ids), 7 <= threads() - before <= 9)
"""
    (tmp_path / "a.txt").write_text("a" * 50_000)
    own = {"TOKENIZERS_PARALLELISM": "true", "TQDM_DISABLE": "1"}  # the other tests have none
    command = [sys.executable, "-c", code, tmp_path]
    options = {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, **options)
    assert done.stdout == "50000 True\n", done.stderr
