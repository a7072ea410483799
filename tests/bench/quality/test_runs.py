"""A result of `bench.quality`: its training runs, its file, and how it goes on after a kill."""

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
# Losses of a run that has learned and forgotten nothing; the base model's are 2
LEARNED = dict.fromkeys((*KNOWN, VALIDATION), 1.0)


@pytest.fixture
def result(texts):
    """Like the command's before the first run, with fewer and smaller methods."""
    machine = {"torch": "2.13", "peft": "0.21", "transformers": "5.24"}
    result = runs.start(texts, SETTINGS, machine=machine, starts=[{"commit": "abc"}], model="tiny")
    assert result["plan"].keys() == {method.name for method in METHODS}
    plan = {method.name: method._asdict() for method in SMALL}
    return result | {"plan": plan, "base": dict.fromkeys(LEARNED, 2.0)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.json"


def made(planned):
    """What `measure` would return for a run, without the training: all have learned the same."""
    points = [{"step": 1, "evaluation": LEARNED}]
    run = {**planned._asdict(), "diverged": None, "points": points, "wall_seconds": 40.0}
    return {"method": {"trained_parameters": 1}, "run": run}


def test_an_experiment_leaves_the_base_model_as_it_was_and_names_what_diverged(base, texts, result, path):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    diverging = Method("diverging", "lora", "paper", (1e-3, 1e30), 4)
    result["plan"] = {method.name: method._asdict() for method in (SMALL[-1], diverging)}
    del result["base"]
    runs.experiment(base, texts, result, path)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    full, diverged, *others = result["runs"]
    assert {run["method"] for run in others} <= {"full fine-tuning"}  # no further seed of what diverged
    steps = [point["step"] for point in full["points"]]
    assert steps == [math.ceil(len(full["losses"]) * stop) for stop in (0.25, 0.5, 1)]
    assert diverged["diverged"] == "loss on 'prose, validation' after step 2: nan"
    assert diverged["points"] == []


def test_a_killed_run_goes_on_to_the_same_result(base, texts, result, path, monkeypatch):
    """What a killed process has made is in the file or beside it; what it was making is made again."""
    measured, fresh = [], copy.deepcopy(result)

    class Killed(BaseException):
        """Not an Exception, like what ends a process."""

    def measure(base, texts, result, run):
        if len(measured) == killed_after:
            raise Killed
        measured.append(run)
        return made(run)

    monkeypatch.setattr(runs, "measure", measure)
    for killed_after in (3, 8):
        with pytest.raises(Killed):
            runs.experiment(base, texts, result, path)
        lock = path.with_suffix(".runs") / f"{planned(result)[0].key}.lock"
        lock.touch()  # nobody was there to remove it
        result = resume(path, fresh)
        assert len(result["runs"]) == killed_after
    killed_after = None
    runs.experiment(base, texts, result, path)
    assert [*path.parent.iterdir()] == [path]
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    found = sorted((run["method"], run["rate"], run["seed"]) for run in result["runs"])
    # The settings ask for one rate: of each method the second, see `bench.quality.schedule.FIRST`
    planned_runs = [(method.name, method.rates[1], seed) for method in SMALL for seed in (0, 1)]
    assert found == sorted(measured) == sorted(planned_runs)


def test_it_goes_on_with_what_is_there_with_more_seeds_and_other_methods(result, path):
    """Also with runs of a killed process, which lie in files beside the result."""
    in_result, in_file = (made(Planned("LoRA, r = 16", 1e-3, seed)) for seed in (0, 1))
    save(path, result | {"runs": [in_result["run"]]})
    beside = path.with_suffix(".runs") / "a.json"
    beside.parent.mkdir()
    beside.write_text(json.dumps(in_file))
    result["settings"]["seeds"] += 1
    result["plan"]["another"] = result["plan"]["LoRA, r = 16"]
    found = resume(path, result)
    assert found["runs"] == [in_result["run"], in_file["run"]]
    assert found["methods"] == {"LoRA, r = 16": in_file["method"]}
    assert (found["settings"], found["plan"]) == (result["settings"], result["plan"])
    path.unlink()  # without the result, what lies beside it belongs to another one and is removed
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
