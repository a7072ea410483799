"""CONTRIBUTING's routes of an x and of a W: calls pass the named functions, in their order."""

import re
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mica import native
from mica.fast.forward import fast
from tests.support.models import tiny_llama
from tests.support.pages import read


def route(title: str) -> list[str]:
    _, _, text = read("CONTRIBUTING.md").partition(f"### {title}\n")
    return re.findall(r"`(mica\.[\w.]+)`", text.partition("\n##")[0])


def passed(call) -> list[str]:
    """Functions of this package, in the order of their first calls; a class by its `__call__`."""
    seen = {}

    def note(frame, event, _):
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("mica."):
            name, _, _ = frame.f_code.co_qualname.partition(".<locals>")
            seen.setdefault(f"{module}.{name}".removesuffix(".__call__"))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(seen)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no qualified names")
def test_calls_pass_the_named_functions(monkeypatch):
    monkeypatch.setenv("MICA_CACHE", "0")
    monkeypatch.setattr(native, "module", lambda: None)
    monkeypatch.setattr(fast, "_function", None)
    model = tiny_llama()
    config = LoraConfig(r=4, init_lora_weights="mica", target_modules=["down_proj"])
    ids = torch.arange(8)[None]
    created = passed(lambda: get_peft_model(model, config))
    stepped = passed(lambda: model(input_ids=ids, labels=ids).loss.backward())
    for title, functions in (("The route of a W", created), ("The route of an x", stepped)):
        named = route(title)
        assert len(named) >= 8
        assert [name for name in functions if name in named] == named
