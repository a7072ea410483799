"""The command, or the lines for PEFT, on planted results; test_session.py runs the command."""

import pytest

from mica.cli.compare.again import again
from tests.support.comparisons import found, gaining


@pytest.mark.parametrize("name", ["lora", "random", "full"])
def test_lines_for_peft_run(name):
    told = found(gaining(name, 2.0))
    (row,) = [row for row in told["equal"]["methods"] if row["method"] == name]
    lines = again(told, row)
    assert lines.startswith("```python\n")
    calls = {}

    class Model:
        def modules(self):
            return [self]

    names = {
        "model": Model(),
        "LoraConfig": lambda **given: calls.setdefault("LoraConfig", given),
        "get_peft_model": lambda model, config: model,
        "TrainingArguments": lambda **given: calls.setdefault("TrainingArguments", given),
    }
    exec(lines.removeprefix("```python\n").removesuffix("\n```"), names)
    assert calls["TrainingArguments"]["learning_rate"] == row["rate"]
    assert calls["TrainingArguments"]["max_steps"] == row["steps"]
    assert calls["TrainingArguments"]["lr_scheduler_type"] == "linear"
    if name == "full":
        assert "LoraConfig" not in calls
    else:
        assert calls["LoraConfig"]["r"] == {"lora": 32, "random": 64}[name]
        assert (calls["LoraConfig"].get("init_lora_weights") == "mica") == (name == "random")


def test_the_command_ends_as_the_best_training_did():
    told = found(gaining("mica", 2.0))
    (row,) = [row for row in told["equal"]["methods"] if row["method"] == "mica"]
    whole = row | {"stop": row["steps"], "share": 1.0}
    line = again(told, whole)
    assert f"--learning-rate {row['rate']:g} --steps {row['steps']} --output run\n```" in line
    early = again(told, whole | {"stop": 15, "share": 0.75})
    assert "--eval-steps 15 --keep-best\n# and scale what it adds to the weights by 0.75" in early
