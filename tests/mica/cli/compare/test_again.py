"""The command, or the lines for PEFT, on planted results; test_session.py runs the command."""

import math

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


def test_the_command_stops_where_the_best_training_did():
    told = found(gaining("mica", 2.0))
    (row,) = [row for row in told["equal"]["methods"] if row["method"] == "mica"]
    line = again(told, row)
    assert f"--learning-rate {row['rate']:g} --steps {row['steps']} " in line
    stops_early = row["stop"] < row["steps"]
    assert ("--max-retain-rise" in line) == stops_early
    row["stop"] = row["steps"] / 2
    rise = 100 * math.expm1(told["equal"]["limit"])
    assert f"--max-retain-rise {rise:.3g}" in again(told, row)
