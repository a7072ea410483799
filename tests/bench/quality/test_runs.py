"""A result: its runs, its file, and how it goes on after a kill."""

import copy
import json
import math

import pytest
import torch

from bench.quality import runs
from bench.quality.recipes import METHODS, Method
from bench.quality.runs import resume, save
from bench.quality.schedule import KNOWN, VALIDATION, Planned, planned
from mica.errors import UsageError
from tests.bench.quality.conftest import SMALL

SETTINGS = {"epochs": 1, "rounds": 2, "rates": 1, "seeds": 2, "length": 32, "people": 8, "eval_blocks": 2}
LEARNED = dict.fromkeys((*KNOWN, VALIDATION), 1.0)


@pytest.fixture
def result(texts):
    """Without runs, like that of the command. Whatever is `made` of it has learned the same."""
    machine = {"torch": "2.13", "peft": "0.21", "transformers": "5.24"}
    result = runs.start(texts, SETTINGS, machine=machine, starts=[{"commit": "abc"}], model="tiny")
    assert result["plan"].keys() == {one.name for one in METHODS}
    plan = {one.name: one._asdict() for one in SMALL}
    return result | {"plan": plan, "base": dict.fromkeys(LEARNED, 2.0)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.json"


def made(planned):
    """Of a run, in place of `measure`."""
    points = [{"step": 1, "evaluation": LEARNED}]
    run = {**planned._asdict(), "diverged": None, "points": points, "wall_seconds": 40.0}
    return {"method": {"trained_parameters": 1}, "run": run}


def test_an_experiment_leaves_the_base_model_as_it_was_and_names_what_diverged(base, texts, result, path):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    diverging = Method("diverging", "lora", "paper", (1e-3, 1e30), 4)
    result["plan"] = {one.name: one._asdict() for one in (SMALL[-1], diverging)}
    del result["base"]
    runs.experiment(base, texts, result, path)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    full, diverged, *others = result["runs"]
    assert {one["method"] for one in others} <= {"full fine-tuning"}  # no further seed of what diverged
    steps = [one["step"] for one in full["points"]]
    assert steps == [math.ceil(len(full["losses"]) * stop) for stop in (0.25, 0.5, 1)]
    assert diverged["diverged"] == "loss on 'prose, validation' after step 2: nan"
    assert diverged["points"] == []


def test_a_killed_run_goes_on_to_the_same_result(base, texts, result, path, monkeypatch):
    """What a killed process has made is in the file or beside it; what it was making is made again."""
    order, fresh = [], copy.deepcopy(result)

    class Killed(BaseException):
        """Not an Exception, like what ends a process."""

    def measure(base, texts, result, one):
        if len(order) == number:
            raise Killed
        order.append(one)
        return made(one)

    monkeypatch.setattr(runs, "measure", measure)
    for number in (3, 8):
        with pytest.raises(Killed):
            runs.experiment(base, texts, result, path)
        lock = path.with_suffix(".runs") / f"{planned(result)[0].key}.lock"
        lock.touch()  # nobody was there to remove it
        result = resume(path, fresh)
        assert len(result["runs"]) == number
    number = None
    runs.experiment(base, texts, result, path)
    assert [*path.parent.iterdir()] == [path]
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    found = sorted((one["method"], one["rate"], one["seed"]) for one in result["runs"])
    assert (
        found == sorted(order) == sorted((one.name, one.rates[1], seed) for one in SMALL for seed in (0, 1))
    )


def test_it_goes_on_with_what_is_there_with_more_seeds_and_other_methods(result, path):
    """Also with what lies beside the result of a process that was killed."""
    one, other = (made(Planned("LoRA, r = 16", 1e-3, seed)) for seed in (0, 1))
    save(path, result | {"runs": [one["run"]]})
    beside = path.with_suffix(".runs") / "a.json"
    beside.parent.mkdir()
    beside.write_text(json.dumps(other))
    result["settings"]["seeds"] += 1
    result["plan"]["another"] = result["plan"]["LoRA, r = 16"]
    found = resume(path, result)
    assert found["runs"] == [one["run"], other["run"]]
    assert found["methods"] == {"LoRA, r = 16": other["method"]}
    assert (found["settings"], found["plan"]) == (result["settings"], result["plan"])
    path.unlink()  # without it they are of another
    assert resume(path, result) is result
    assert not beside.exists()


@pytest.mark.parametrize(
    ("key", "changed", "why"),
    [
        ("settings", {"epochs": 9}, "settings"),
        ("recipes", {"paper": {}}, "recipes"),
        ("texts", {"reference": {"tokens": 9}}, "texts"),
        ("plan", {"MiCA, r = 16": {"rank": 5}}, "plan"),
        ("machine", {"torch": "9.9"}, "torch"),
    ],
)
def test_other_settings_are_refused(result, path, key, changed, why):
    save(path, result)
    before = path.read_text()
    result[key] |= changed
    with pytest.raises(UsageError, match=rf"run\.json has other {why}: take another name"):
        resume(path, result)
    assert path.read_text() == before
