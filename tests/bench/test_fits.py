"""The counts that are published are those of ``mica fits``."""

import pytest

from bench import fits, pages

GIB = 2**30
# Counted for Llama-3.1-8B by another script, before there was a command: GiB that a step keeps
KEPT = {
    "without adapter": 19.07,
    "LoRA, PEFT's default": 38.12,
    "MiCA, PEFT's default": 38.07,
    "MiCA, here": 13.57,
    "MiCA, here, norms saved": 17.57,
}


def test_llama_8b_is_as_it_was_counted_elsewhere():
    rows = pages.raw("fits")["models"]["Llama-3.1-8B"]
    kept = {row["name"]: row["kept_bytes"] / GIB for row in rows if not row["checkpointing"]}
    assert {name: kept[name] for name in KEPT} == pytest.approx(KEPT, rel=5e-3)


@pytest.mark.slow
def test_published_counts_are_counted_again(monkeypatch):
    monkeypatch.setattr("mica.ops.kept.SMALL", 2**17)
    assert fits.counted("Llama-3.2-1B") == pages.raw("fits")["models"]["Llama-3.2-1B"]
