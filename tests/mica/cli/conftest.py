import functools
import re
import signal

import jinja2
import pytest

from tests.support.tiny_cli import TEXT, byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def output(tmp_path):
    """Where a command writes; there is no such folder yet."""
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """Nothing is fetched, and tokens are kept for this run of the tests only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(autouse=True)
def ctrl_c():
    """A shell's background jobs ignore SIGINT, and the tests may be run by one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def refused(capsys):
    """``refused(status, part, ...)``: a command was, in one line, its last, with all parts in it.

    Returns all that it has printed.
    """

    def refused(status, *parts):
        said = "".join(capsys.readouterr())
        *before, line = re.split(r"[\r\n]+", said.rstrip())
        assert status == 2
        assert re.match(r"mica \w+: error: ", line)
        assert [text for text in before if "error: " in text or "Traceback" in text] == []
        assert [part for part in map(str, parts) if part not in line] == []
        return said

    return refused


@pytest.fixture(scope="module", autouse=True)
def _quick_runs(one_thread):
    """Without what most of a tiny training is, and no test can see.

    PEFT compiles its template of a model card at each checkpoint, and files wait for the disk.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jinja2.Environment.compile", functools.cache(jinja2.Environment.compile))
        patch.setattr("os.fsync", lambda descriptor: None)
        yield
