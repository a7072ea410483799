"""What kinds of models keep: the counts that are published are counted again, and bear out README's claim."""

import pytest

import mica.fast
from bench import kinds, pages

ENCODERS = {"BERT": 1.02, "ViT": 1.02}  # at most, over the bare model; of all others 0.9
MORE_WITH_DORA = {"Phi", "GPT-NeoX", *ENCODERS}  # than bare


def test_no_kind_keeps_more_than_the_page_says():
    for name, found in pages.raw("kinds").items():
        bare = found[pages.WITHOUT]
        ours = max(found["LoRA, here"], found["MiCA, here"])
        assert ours <= ENCODERS.get(name, 0.9) * bare, name
        assert (found["DoRA, here"] > bare) == (name in MORE_WITH_DORA), name
        assert found["DoRA, here"] < 0.5 * found["DoRA, PEFT's best setting"], name
        for way in pages.FITS[:2]:
            assert abs(found[f"LoRA, {way}"] - found[f"MiCA, {way}"]) <= 0.03 * bare, name


@pytest.mark.parametrize("name", ["Phi3", "GPT-2", "BERT"])
def test_published_counts_are_counted_again(name, monkeypatch):
    monkeypatch.setattr("mica.ops.recompute.MIN_NUMBERS", 2**17)
    mica.fast.enable(lora=True)
    try:
        assert kinds.counted(kinds.KINDS[name]) == pages.raw("kinds")[name]
    finally:
        mica.fast.enable(lora=False)
