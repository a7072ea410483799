"""The scripts and the command of planted results; test_session.py runs them."""

import pytest

from mica.cli.compare.again import command, script
from tests.mica.cli.compare.comparisons import NAMES, SETTINGS, found, gaining, proportional


def row_of(told, name):
    (row,) = [row for row in told["equal"]["methods"] if row["method"] == name]
    return row


def keywords(text, call):
    """The keywords of the call in a script, by evaluating its lines."""
    body = text.partition(f"{call}(\n")[2].partition("\n)")[0].partition("\n    )")[0]
    return eval(f"dict({body})")


@pytest.mark.parametrize("name", NAMES)
def test_a_script_says_all_that_a_training_needs(name):
    told = found(gaining(name, 2.0))
    text = script(told, row_of(told, name))
    compile(text, name, "exec")
    training = keywords(text, "TrainingArguments")
    row = row_of(told, name)
    assert (training["learning_rate"], training["max_steps"], training["seed"]) == (
        row["rate"],
        row["steps"],
        0,
    )
    assert training["lr_scheduler_type"] == "linear"
    assert "load(Path(__file__).parent, dtype='float32', packing='documents')" in text.replace('"', "'")
    if name == "full":
        assert "LoraConfig" not in text
        return
    adapter = keywords(text, "LoraConfig")
    assert adapter["r"] == {"lora": 32}.get(name, 64)
    assert adapter["init_lora_weights"] == (True if name == "lora" else "mica")
    assert adapter["target_modules"] == ["q_proj"]
    assert adapter["target_parameters"] == ["experts.down_proj"]
    assert ("replace_b(model, random_basis)" in text) == (name == "random")


@pytest.mark.parametrize(
    ("name", "line"), [("lora", ".lora_alpha *= 0.25"), ("full", "torch.lerp(old, parameter, 0.25)")]
)
def test_an_update_that_was_scaled_back_is_scaled_back_again(name, line):
    def forgets(method, rate, step):
        return proportional(method, rate, step) * (4 if method == name else 1)

    told = found(gaining(name, 5.0), forgets, noise=(0, 0))
    row = row_of(told, name)
    assert row["share"] == pytest.approx(0.25)
    assert line in script(told, row)
    assert line not in script(told, row | {"share": 1.0})


def test_options_that_were_given_are_kept():
    told = found(settings=SETTINGS | {"batch_size": 3})
    assert (
        keywords(script(told, row_of(told, "mica")), "TrainingArguments")["per_device_train_batch_size"] == 3
    )
    line = command(told, row_of(told, "mica"))
    assert "--rank 64 --eval-blocks 64 --model some/model" in line
    assert "--batch-size 3" in line
    assert line.endswith(f"--steps {row_of(told, 'mica')['steps']} --output run")
    assert line.count("--steps") == 1
