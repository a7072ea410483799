"""Every kind of text gives the same documents, and what is none is refused in one line."""

import ast
import json
import os
import re
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from mica.cli.adapt.sources import find
from mica.errors import UsageError
from tests.support.adapt_runs import PACK, ROWS, write
from tests.support.tables import rows

TEXTS = [row["text"] for row in ROWS]


def read(item, field=None, config=None) -> list[str]:
    [source] = find("--text", [item], config)
    return ["".join(document) for document in source.documents(field)]


# The last are patterns and addresses to some libraries
NAMES = """
a.jsonl a.ndjson a.json a.csv a.tsv a.parquet a.jsonl.gz a.json.xz a.csv.bz2 a.tsv.zst A.JSONL
[a]*.csv [a]*.parquet x::a.jsonl zip:.csv simplecache::zip:.parquet
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_rows_are_documents(tmp_path, name):
    assert read(write(tmp_path / name, ROWS)) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "README", "a.txt.gz"])
def test_a_text_file_is_one_document(tmp_path, name):
    text = "".join(TEXTS) * 2000  # several chunks; characters of several bytes at their ends
    data = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(PACK[".gz"](data) if name.endswith("gz") else data)
    assert read(tmp_path / name) == [text.replace("\r\n", "\n")]


def test_a_folder_is_read_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "rows.jsonl", ROWS[:2])
    write(tmp_path / "c.csv", ROWS[2:4])
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert read(tmp_path) == ["first", *TEXTS[:4]]
    assert find("--text", [tmp_path])[0].skipped == 1


@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: datasets.DatasetDict(train=it, test=it)])
def test_a_saved_dataset(tmp_path, wrap):
    wrap(datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == TEXTS
    [one, two] = find("--text", [tmp_path / "saved"] * 2)
    assert one.digest() == two.digest()


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), None])
def test_every_kind_of_strings_in_parquet(kind, tmp_path):
    """None: a dictionary of strings, as of pandas' categories."""
    strings = pyarrow.array(["x", None, "y"], kind)
    if kind is None:
        strings = strings.dictionary_encode()
    columns = {"n": [1, 2, 3], "a.b": strings, "m": [[1], [], None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["x", "", "y"]


def test_a_column_that_pandas_takes_for_an_index(tmp_path):
    pandas.DataFrame({"text": TEXTS, "n": 1}).set_index("text").to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == TEXTS


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_is_read_to_its_end_or_refused(suffix, tmp_path):
    path = tmp_path / f"a.txt{suffix}"
    text = "".join(str(number) for number in range(100_000))
    packed = PACK[suffix](text.encode())
    path.write_bytes(packed + PACK[suffix](b"end"))  # in two parts, as tools for several processors write it
    assert read(path) == [text + "end"]
    for end in (len(packed) // 2, len(packed) - 1):
        path.write_bytes(packed[:end])
        with pytest.raises(UsageError, match=f"^--text {path}: cannot be read: "):
            read(path)


def test_a_folder_that_cannot_be_read_is_no_folder_without_text(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "shut").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(
        UsageError, match=f"--text {tmp_path}: a folder in it cannot be read: Permission denied"
    ):
        find("--text", [tmp_path])


def test_a_dataset_of_the_hub(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("someone/texts", config="de") == TEXTS
    assert asked == [(("someone/texts", "de"), {"split": "train"})]


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    rows("""
{"a": "x", "text": "y"} =>  => y
{"content": "y", "a": "x"} =>  => y
{"n": 1, "only": "y"} =>  => y
{"a": "x", "text": "y"} => a => x
{"text": null, "a": "x"} =>  =>
{"text": "2020-01-01"} =>  => 2020-01-01
"""),
)
def test_the_column(tmp_path, row, field, expected):
    for name in ("a.jsonl", "a.parquet"):
        assert read(write(tmp_path / name, [json.loads(row)] * 2), field or None) == [expected] * 2


def content(text: str) -> bytes:
    """That of a file, which ``text`` says as Python writes it."""
    return ast.literal_eval(f"b'''{text}'''")


# Name, content, and the documents with | between them; pandas writes a series as the fifth file
COLUMNS = r"""
a.csv => text,n\n007,1\nNA,2\n,3\n1 a,4\n => 007|NA||1 a
a.csv => n,text\n1,a\n2\n => a|
a.csv => id;text\n1;"a;b"\n2;c, d\n => a;b|c, d
a.csv => "id"\t"text"\n1\ta,b\n => a,b
a.csv => ,text\n0,a b\n1,c\n => a b|c
a.jsonl => {}\n{"id": "x"}\n{"id": "y", "text": "a"}\n => ||a
a.jsonl => {"text": "a", "m": null}\n\n{"m": {"x": [1]}, "text": "b"}\n{"n": 1}\n => a|b|
"""
LATE = ("a.jsonl", '{"text": "a"}\\n' * 1000 + '{"new": 1}', "a|" * 1000)


@pytest.mark.parametrize(("name", "data", "expected"), [*rows(COLUMNS), LATE])
def test_other_columns_do_not_matter_and_csv_is_text(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(content(data))
    assert read(tmp_path / name) == expected.split("|")


# Name, content as Python writes it, the column, and what the line says
CONTENTS = r"""
a.jsonl => {"text": "a"}\n{"text": "b"\n =>  => cannot be read: line 2 is not JSON: Expecting
a.jsonl => {"text": "a"}\n{"text": 3}\n =>  => column 'text' must have strings only
a.jsonl => {"text": "a"}\n{"text": "\xff"}\n =>  => cannot be read: 'utf-8' codec can't decode byte
a.jsonl => \n{"text": "a"}\n{"text": "a\\ud83d"}\n =>  => cannot be read: 'utf-8' codec can't encode character '\ud83d' in position 1
a.csv => 1,First text.\n2,And so on\n =>  => has no column 'text', only 1, First text. (by its line 1): name one with --text-field
a.jsonl => ["b"]\n =>  => cannot be read: every row must be an object, not str
a.jsonl => {"a": "", "b": ""}\n =>  => has no column 'text', only a, b: name one with --text-field
a.jsonl => {"title": "a"}\n => body => has no column 'body', only title: name one with --text-field
a.json => [{"text": "a"},\n{"text" 1}] =>  => cannot be read: Expecting ':' delimiter: line 2
a.csv => text\n"a\n =>  => cannot be read: Error tokenizing data. C error: EOF inside string
a.txt => abc\0 =>  => not text: it contains a NUL character
a.txt.gz => abc =>  => cannot be read: Not a gzipped file
a.parquet => abc =>  => cannot be read: Parquet file size is 3 bytes
"""  # noqa: E501
CASES = [
    *((name, content(data), *more) for name, data, *more in rows(CONTENTS)),
    ("a.txt", b"abc" * 2**19 + b"\xc3", "", "cannot be read: 'utf-8' codec can't decode byte"),
    ("a.parquet", [{"text": 1}], "", "column 'text' must have strings only"),
]


@pytest.mark.parametrize(("name", "data", "field", "message"), CASES)
def test_bad_contents_are_refused(tmp_path, name, data, field, message):
    path = tmp_path / name
    path.write_bytes(data) if isinstance(data, bytes) else write(path, data)
    with pytest.raises(UsageError, match=re.escape(f"--text {path}: {message}")) as caught:
        read(path, field or None)
    assert "\n" not in str(caught.value)


def test_pipes_and_devices_are_refused_and_not_read(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    os.mkfifo(tmp_path / "pipe.txt")
    reader, writer = os.pipe()  # as of `--text <(zcat corpus.gz)`
    for path in (tmp_path / "pipe.txt", f"/dev/fd/{reader}"):
        with pytest.raises(UsageError, match=f"^--retain {path}: a pipe or device, but texts are read more"):
            find("--retain", [path])
    os.close(reader), os.close(writer)
    [source] = find("--text", [tmp_path])
    assert ([path.name for path in source.files], source.skipped) == (["a.jsonl"], 1)  # which the run prints


def test_bad_names_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("a.docx", "a.gz", "folder/a.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty.txt").touch()
    for name, message in rows("""
empty.txt => the file is empty
a.docx => unsupported file type '.docx'; supported: .txt
a.gz => unsupported file type '.gz'
folder => no text files in this folder
"""):
        with pytest.raises(UsageError, match=re.escape(message)):
            find("--retain", [tmp_path / name])


def test_datasets_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what = "no such file or folder, and it cannot be loaded from the Hub: "
    with pytest.raises(UsageError, match=f"--text nobody/nothing: {what}") as caught:
        read("nobody/nothing")
    assert "\n" not in str(caught.value)
    datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)).save_to_disk("saved")
    with pytest.raises(UsageError, match="--text saved: has no split 'train', only test"):
        read("saved")
