"""A release of PEFT that this package does not know: what runs, what PEFT runs, and one sentence about it."""

import types
from importlib import util
from pathlib import Path

import peft
import pytest
from peft.tuners import lora
from peft.tuners.lora import variants
from torch import nn

import mica.fast
from mica.fast import known_peft, patching
from mica.fast.known_peft import EMBEDDING, EXPERTS, INITIALISATION, LINEAR, MERGING, PARTS, REPEATED
from tests.support.models import INDICES, net, randomise
from tests.support.quantised_models import adapted
from tests.support.stock import as_stock, assert_same, warned

BEGIN = "mica.fast with PEFT 0.22.0, which it does not know (it was written for 0.20.0 to 0.21.2)"
ALL = f"{BEGIN}: all that it replaces is unchanged there, so all of it runs on this backend."


@pytest.fixture
def unpatched(monkeypatch):
    """PEFT is not patched yet; nor is it afterwards, when monkeypatch gives back what was there."""
    mica.fast.uninstall()
    yield
    mica.fast.uninstall()


@pytest.fixture
def unknown(unpatched, monkeypatch):
    """PEFT is 0.22.0, too."""
    monkeypatch.setattr(peft, "__version__", "0.22.0")


def enabled() -> list[str]:
    """What is said while the backend is enabled."""
    return warned(mica.fast.enable)[1]


def edited(tmp_path, monkeypatch, owner, name, old, new):
    """The function of PEFT with one place of its text changed."""
    static = vars(owner)[name]
    function = getattr(static, "__func__", static)
    source = Path(util.find_spec(function.__module__).origin).read_text(encoding="utf-8")
    head = f"class {owner.__name__}("
    start = source.index(f"def {name}(", source.index(head))
    assert source.count(old, start) >= 1
    source = source[:start] + source[start:].replace(old, new, 1)
    file = tmp_path / "edited.py"
    file.write_text(source, encoding="utf-8")
    spec = util.spec_from_file_location(function.__module__, file)
    module = types.ModuleType(function.__module__)
    module.__spec__, module.__package__ = spec, function.__module__.rpartition(".")[0]
    exec(compile(source, str(file), "exec"), vars(module))
    theirs = vars(vars(module)[owner.__name__])[name]
    monkeypatch.setattr(owner, name, theirs)


def test_what_is_repeated_reads_as_known_in_the_installed_release():
    """Where this fails for a new release: the docstring of `known_peft` says what to do."""
    if peft.__version__ not in known_peft.KNOWN:
        pytest.skip(f"PEFT {peft.__version__} is not known")
    assert known_peft.differences() == {}
    for name, hashes in known_peft.QUANTISED.items():
        why = known_peft.difference(name, hashes)
        assert why in (None, f"{name} is not there")  # PEFT has the class only where its library is installed


def test_every_replaced_function_of_a_part_is_compared_with_the_known_ones():
    for patch in patching.PATCHES:
        if patch.part is not None:
            assert f"{patch.owner}.{patch.name}" in REPEATED[patch.part]
    assert set(REPEATED) == set(PARTS)


FUNCTION = '''
def function(self, x: int, *args, scale=2) -> int:
    """Doubles."""
    # a comment
    if x < 0:
        raise ValueError(f"negative: {x}")
    return x * scale
'''
SAME = {
    "no types": (": int, *args, scale=2) -> int", ", *args, scale=2)"),
    "no docstring": ('    """Doubles."""\n', ""),
    "another docstring": ("Doubles", "Twice as much"),
    "no comment": ("    # a comment\n", ""),
    "another error": ('ValueError(f"negative: {x}")', 'TypeError("no")'),
    "other spaces": ("x * scale", "(x  *  scale)"),
}
OTHER = {
    "another product": ("x * scale", "x + scale"),
    "another default": ("scale=2", "scale=3"),
    "another order": ("x * scale", "scale * x"),
    "another condition": ("x < 0", "x <= 0"),
    "one argument more": ("*args,", "*args, more=None,"),
    "a statement more": ("return x", "x = x.clone()\n    return x"),
}


def hash_of(tmp_path, source):
    file = tmp_path / f"m{abs(hash(source))}.py"
    file.write_text(source)
    scope = {}
    exec(compile(source, str(file), "exec"), scope)
    return known_peft.body_hash(scope["function"])


@pytest.mark.parametrize("edit", [*SAME, *OTHER])
def test_a_hash_is_that_of_what_is_computed(tmp_path, edit):
    old, new = (SAME | OTHER)[edit]
    assert old in FUNCTION
    before, after = (hash_of(tmp_path, text) for text in (FUNCTION, FUNCTION.replace(old, new)))
    assert (before == after) == (edit in SAME)


def test_what_cannot_be_read_has_none():
    scope = {}
    exec("def function(x): return x", scope)
    assert known_peft.body_hash(scope["function"]) is None
    assert known_peft.body_hash(len) is None
    assert known_peft.body_hash(lambda x: x) is None
    assert known_peft.difference("peft.nowhere:Class.function", "") == (
        "peft.nowhere:Class.function is not there"
    )


def test_a_release_in_which_nothing_differs_runs_and_says_so_once(unknown):
    assert enabled() == [ALL]
    assert mica.fast.explain(net()).counts() == {"reference": 4}
    mica.fast.enable(device="cpu")  # a change of a setting says nothing again
    assert enabled() == []


def test_a_known_release_says_nothing(unpatched):
    assert enabled() == []
    assert known_peft.left == {}


DIFFERENT = {
    LINEAR: (lora.Linear, "forward", "self.merged", "bool(self.merged)"),
    EMBEDDING: (lora.Embedding, "forward", "self.merged", "bool(self.merged)"),
    EXPERTS: (lora.layer.ParamWrapper, "forward", "self.merged", "bool(self.merged)"),
    INITIALISATION: (lora.LoraLayer, "mica_init", "U[:, -r:]", "-U[:, -r:]"),
    MERGING: (variants.MiCALinearVariant, "merge_safe", "orig_weight +", "1 * orig_weight +"),
}


@pytest.mark.parametrize("part", DIFFERENT)
def test_a_part_with_another_body_is_left_to_peft(unknown, monkeypatch, tmp_path, part):
    owner, name, *edit = DIFFERENT[part]
    edited(tmp_path, monkeypatch, owner, name, *edit)
    stock = vars(owner)[name]
    (sentence,) = enabled()
    reason = f"{owner.__module__}:{owner.__name__}.{name} has another body"
    rest = [other for other in PARTS if other != part]
    assert sentence == (
        f"{BEGIN}: PEFT's own code runs {part}, because {reason}; "
        f"this backend runs {', '.join(rest[:-1])} and {rest[-1]}."
    )
    assert known_peft.left == {part: [reason]}
    assert vars(owner)[name] is stock
    model = randomise(net())
    paths = {row.name.rpartition(".")[2]: (row.path, row.reason) for row in mica.fast.explain(model).rows}
    left = {LINEAR: ("up", "conv", "down"), EMBEDDING: ("embed",)}.get(part, ())
    for layer, (path, why) in paths.items():
        assert path == ("peft" if layer in left else "reference")
        assert (why == f"left to PEFT, because {reason}") == (layer in left)
    as_stock(lambda: model(INDICES), 1e-5)


def test_the_basis_of_another_initialisation_is_taken_as_it_is(unknown, monkeypatch, tmp_path, solved):
    """And it is no news at every model: the import has said it."""
    edited(tmp_path, monkeypatch, *DIFFERENT[INITIALISATION])
    enabled()
    ours, said = warned(net)
    assert said == solved == []
    mica.fast.uninstall()
    theirs = net()
    assert_same([*ours.parameters()], [*theirs.parameters()], 0.0)


def test_another_signature_leaves_its_part_in_a_known_release_too(unpatched, monkeypatch):
    monkeypatch.setattr(lora.Linear, "forward", lambda layer, x: nn.Module.forward(layer, x))
    (sentence,) = enabled()
    assert sentence.startswith(f"mica.fast with PEFT {peft.__version__}: PEFT's own code runs {LINEAR}, ")
    assert "peft.tuners.lora.layer:Linear.forward takes (layer x); " in sentence


def test_a_class_over_quantised_weights_with_another_body(unknown, monkeypatch):
    """It is looked at when its first layer gets an adapter."""
    from peft.tuners.lora.bnb import Linear4bit

    enabled()
    name = "peft.tuners.lora.bnb:Linear4bit.forward"
    monkeypatch.setitem(known_peft.QUANTISED, name, "another")
    with pytest.warns(UserWarning, match=rf"^Linear4bit runs PEFT's own forward: {name} has another body\.$"):
        model = adapted("nf4")
    assert set(mica.fast.explain(model).counts()) == {"peft"}
    assert vars(Linear4bit)["forward"].__globals__["__name__"] == "peft.tuners.lora.bnb"
