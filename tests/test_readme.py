"""README's table of set-ups is that of tests/support/setups.py, and every row names a test that exists."""

import ast
import re
from pathlib import Path

import pytest

import mica.fast
from tests.support.models import tiny_llama
from tests.support.setups import SETUPS, table

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("file", sorted({setup.test.partition("::")[0] for setup in SETUPS}))
def test_every_named_test_exists(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {setup.test.partition("::")[2] for setup in SETUPS if setup.test.startswith(f"{file}::")}
    assert named <= functions
    assert all(name.startswith("test_") for name in named)


def test_rows_say_what_they_may():
    assert {setup.works for setup in SETUPS} <= {"yes", "refused", "no"}
    assert {setup.fast for setup in SETUPS} <= {"yes", "partly", "no"}
    assert len({setup.name for setup in SETUPS}) == len(SETUPS)


def test_the_examples_run(monkeypatch):
    """As they stand, but for the model's size."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda name: tiny_llama(**sizes))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert examples
    for example in examples:
        names = {}
        exec(example, names)
        assert mica.fast.explain(names["model"]).counts() == {"reference": 14}


def test_readme_holds_the_table():
    """`python -m tests.support.setups` prints what belongs between the markers."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("<!-- setups -->") == readme.count("<!-- /setups -->") == 1
    between = readme.partition("<!-- setups -->")[2].partition("<!-- /setups -->")[0]
    assert between.strip() == table()
