"""Processors with and without 16-bit instructions, as Python and C++ read it."""

from mica.paths import products


def has_instructions(answer: bool, monkeypatch) -> None:
    """As if this processor had instructions for 16-bit numbers, or none."""
    for dtype in products.ANSWERS:
        monkeypatch.setitem(products.ANSWERS, dtype, answer)
