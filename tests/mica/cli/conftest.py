import gc
import signal

import pytest

from tests.support.tiny_cli import TEXT, byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Asked for by every test of this folder."""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def cache_of_tokens(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, cache_of_tokens):
    """Tokens are kept for this run of the tests only."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache_of_tokens)


@pytest.fixture(autouse=True)
def ctrl_c():
    """A shell's background jobs ignore SIGINT, and the tests may be run by one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """The Trainer collects garbage after each training: most of a tiny one, with all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()
