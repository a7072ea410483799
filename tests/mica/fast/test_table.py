"""The path table in print: equal rows as one line, with the totals, and nothing said that is not there."""

import itertools
import re
from collections import Counter

import pytest

import mica.fast
from mica.fast.table import patterns
from tests.support.models import tiny_llama, wrap


def test_equal_rows_are_one_line():
    model = wrap(tiny_llama(num_hidden_layers=30), targets="all-linear")
    explanation = mica.fast.explain(model)
    assert len(explanation.rows) == 210  # for programs, a row a layer
    lines = str(explanation).splitlines()
    assert len(lines) == 9
    assert lines[1].startswith("base_model.model.model.layers.{0-29}.self_attn.q_proj  ×30  Linear  default")
    assert lines[-1] == "210 layers: 210 reference"


def test_a_layer_that_differs_is_a_line_of_its_own():
    model = wrap(tiny_llama(num_hidden_layers=4), targets=["q_proj"])
    layers = model.base_model.model.model.layers
    layers[1].self_attn.q_proj.base_layer.weight.requires_grad_()
    layers[3].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    _, *lines, totals = str(mica.fast.explain(model)).splitlines()
    assert [re.match(r"\S*layers\.(\S*)\.self", line)[1] for line in lines] == ["{0,2}", "1", "3"]
    assert "base weight is trainable" in lines[1]
    assert totals == "4 layers: 3 reference, 1 peft"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["fc"], [("fc", 1)]),
        (["h.7.fc"], [("h.7.fc", 1)]),
        ([f"h.{n}.fc" for n in (0, 1, 3, 10, 11, 12)], [("h.{0-1,3,10-12}.fc", 6)]),
        ([f"h.{a}.e.{b}" for a, b in itertools.product(range(3), range(8))], [("h.{0-2}.e.{0-7}", 24)]),
        (["h.0.e.0", "h.1.e.1"], [("h.0.e.0", 1), ("h.1.e.1", 1)]),  # not h.{0-1}.e.{0-1}
        (["h.0.e.0", "h.0.e.1", "h.1.e.0", "h.1.e.1", "h.2.e.0"], [("h.{0-1}.e.{0-1}", 4), ("h.2.e.0", 1)]),
        (["h.0", "h.00", "h.1"], [("h.{0,00,1}", 3)]),
    ],
)
def test_a_pattern_stands_for_its_names_and_no_others(names, expected):
    assert Counter(patterns(names)) == Counter(expected)
