"""The counts that are published are those of ``mica fits``."""

import pytest

from bench import fits, pages
from mica.cli.fits import tokens_that_fit

# Counted for Llama-3.1-8B by another script, with bitsandbytes' own layers: tokens that fit 24 GiB without
# checkpointing, and how many of 32 layers 4096 tokens need checkpointed
IN_24_GIB = {
    "LoRA, PEFT's default": (2045, 17),
    "LoRA, PEFT's best setting": (3293, 7),
    "LoRA, here": (6194, 0),
}


def test_llama_8b_is_as_it_was_counted_elsewhere():
    """Where this backend keeps less than it did, its row may differ: then state the new count here."""
    found = pages.raw("fits")
    rows = found["models"]["Llama-3.1-8B"][pages.NF4]
    counted = {}
    for row in rows:
        if row["name"] in IN_24_GIB and not row["checkpointing"]:
            fewest = row["fewest_checkpointed"]["24"]
            counted[row["name"]] = tokens_that_fit(row, found["tokens"], 24), fewest
    assert counted == {name: pytest.approx(figures, rel=0.02) for name, figures in IN_24_GIB.items()}


@pytest.mark.slow
@pytest.mark.parametrize("how", fits.HOWS)
def test_published_counts_are_counted_again(how, monkeypatch):
    monkeypatch.setattr("mica.ops.recompute.MIN_NUMBERS", 2**17)
    assert fits.counted("Llama-3.2-1B", how) == pages.raw("fits")["models"]["Llama-3.2-1B"][how]
