"""The options themselves: help, bad values, and that the Trainer knows the names that are offered."""

from pathlib import Path

import pytest
from transformers import SchedulerType

from mica.cli import parser
from mica.cli.adapt.options import OPTIONS, SCHEDULERS, TABLE
from mica.cli.arguments import a_name, a_path, a_source
from tests.support.tiny_cli import mica, words

ANY_STRING = (a_name, a_path, a_source)
# Values that the parser refuses. The other options take any string: test_refusals.py has theirs.
_SOME = """
dtype=int4 dtype= quantize=nf3 quantize=4
held_out=0 held_out=1 held_out=-0.1 held_out=nan sequence_length=1 sequence_length=512.5 packing=padding
eval_blocks=0 recipe=papers rank=0 rank=four alpha=0 alpha=1.5 dropout=-0.1 dropout=1
steps=0 steps=1.5 epochs=0 epochs=-1 epochs=nan batch_size=-1 batch_size=0 gradient_accumulation_steps=0
learning_rate=0 learning_rate=nan learning_rate=inf scheduler=cosine_with_min_lr warmup_ratio=1
warmup_ratio=-0.1 weight_decay=-1 max_grad_norm=-0.3 seed=-1 seed=4294967296 eval_steps=0 log_steps=0
keep_best=3 memory=0 memory=all patience=0 patience=1.5 save_steps=0
trust_remote_code=3 experts=3 gradient_checkpointing=3 resume=3
embedding_learning_rate=0 train_embeddings=3 steps=2147483648 epochs=1e10
"""


def _plainly_bad(option) -> str:
    takes_any = option.parse in ANY_STRING and not option.choices
    return f"{option.name}={'' if takes_any else '?'}"


BAD = [*_SOME.split(), *(_plainly_bad(option) for option in OPTIONS.values())]


@pytest.mark.parametrize("bad", BAD)
def test_bad_value(bad, capsys):
    name, _, value = bad.partition("=")
    flag = OPTIONS[name].flag
    assert mica("adapt --model=x --text=x --output=x", f"{flag}={value}") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("mica adapt: error: argument ")
    assert flag in err or flag.replace("--", "--[no-]") in err
    assert value in err


def test_schedulers_are_the_trainers():
    assert set(SCHEDULERS) <= {kind.value for kind in SchedulerType}


def test_help_has_every_option(capsys):
    assert mica("adapt --help") == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [row for row in TABLE if isinstance(row, str)]
    assert [line[:-1] for line in lines if line[:-1] in titles] == titles
    text = " ".join(" ".join(lines).split())
    for option in OPTIONS.values():
        assert option.flag in text
        assert option.help in text
    assert "learning_rate 0.0005 0.001" in text


def test_only_what_was_given_is_in_the_namespace():
    argv = words("adapt --model=x --no-experts --text a b --text c --output=~/run")
    given = {name: value for name, value in vars(parser().parse_args(argv)).items() if name in OPTIONS}
    assert given.pop("output") == Path.home() / "run"
    assert given == {"model": "x", "experts": False, "text": ["a", "b", "c"]}
