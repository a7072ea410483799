"""A result: its runs by one process or several, its file, and how it goes on after a kill."""

import copy
import json
import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from bench.measure.machine import ROOT
from bench.quality import runs
from bench.quality.recipes import METHODS, Method
from bench.quality.runs import resume, save
from bench.quality.schedule import KNOWN, VALIDATION, Planned, missing, planned
from mica.errors import UsageError
from tests.bench.quality.conftest import SMALL

GOLDEN = ROOT / "tests" / "bench" / "golden" / "quality.json"
SETTINGS = {"epochs": 1, "rounds": 2, "rates": 1, "seeds": 2, "length": 32, "people": 8, "eval_blocks": 2}
LEARNED = dict.fromkeys((*KNOWN, VALIDATION), 1.0)
ALL = sorted(Planned(one.name, one.rates[1], seed) for one in SMALL for seed in (0, 1))


@pytest.fixture
def result(texts):
    """Without runs, like that of the command. Whatever is `Made` of it has learned the same."""
    machine = {"torch": "2.13", "peft": "0.21", "transformers": "5.24"}
    result = runs.start(texts, SETTINGS, machine=machine, starts=[{"commit": "abc"}], model="tiny")
    assert result["plan"].keys() == {one.name for one in METHODS}
    plan = {one.name: one._asdict() for one in SMALL}
    return result | {"plan": plan, "base": dict.fromkeys(LEARNED, 2.0)}


class Made:
    """In place of `measure`: notes what is made."""

    def __init__(self, seconds=lambda one: 0.0):
        self.seconds, self.order = seconds, []

    def __call__(self, base, texts, result, one):
        self.order.append(one)
        time.sleep(self.seconds(one))
        run = one._asdict() | {"diverged": None, "points": [{"step": 1, "evaluation": LEARNED}]}
        return {"method": {"trained_parameters": 1}, "run": run | {"wall_seconds": 40.0}}


def read(path):
    return json.loads(path.read_text())


def done(result):
    return sorted(Planned(run["method"], run["rate"], run["seed"]) for run in result["runs"])


def test_an_experiment_trains_each_method_and_leaves_the_base_model_as_it_was(base, texts, result, tmp_path):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    path = tmp_path / "run.json"
    del result["base"]
    result["settings"]["seeds"] = 1
    names = ("MiCA by the paper, r = 16", "full fine-tuning")
    result["plan"] = {name: result["plan"][name] for name in names}
    runs.experiment(base, texts, result, path)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert [*tmp_path.iterdir()] == [path]
    assert read(path) == json.loads(json.dumps(result))
    assert done(result) == [one for one in ALL if one.seed == 0 and one.method in names]
    for run in result["runs"]:
        steps = [one["step"] for one in run["points"]]
        assert steps == [math.ceil(len(run["losses"]) * stop) for stop in (0.25, 0.5, 1)]
    trained = result["methods"]["full fine-tuning"]["trained_parameters"]
    assert trained == sum(parameter.numel() for parameter in base.parameters())


def test_a_killed_run_goes_on_to_the_same_result(base, texts, result, tmp_path, monkeypatch):
    """What a killed process has made is in the file or beside it; what it was making is made again."""
    path, made, fresh = tmp_path / "run.json", Made(), copy.deepcopy(result)

    class Killed(BaseException):
        """Not an Exception, like what ends a process."""

    def killed_at(number):
        def measure(*args):
            if len(made.order) == number:
                raise Killed
            return made(*args)

        return measure

    for number in (3, 8):
        monkeypatch.setattr(runs, "measure", killed_at(number))
        with pytest.raises(Killed):
            runs.experiment(base, texts, result, path)
        assert len(read(path)["runs"]) == number
        (tmp_path / "run.runs" / f"{planned(result)[0].key}.lock").touch()  # nobody was there to remove it
        result = resume(path, fresh)
    monkeypatch.setattr(runs, "measure", made)
    runs.experiment(base, texts, result, path)
    assert done(result) == sorted(made.order) == ALL
    assert read(path) == json.loads(json.dumps(result))
    assert [*tmp_path.iterdir()] == [path]
    assert len(result["starts"]) == 3


def test_the_budget_ends_before_a_run_that_would_not_fit(base, texts, result, tmp_path, monkeypatch, capsys):
    now, made = [0.0], Made()

    def measure(*args):
        now[0] += 40
        return made(*args)

    monkeypatch.setattr(runs, "measure", measure)
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    runs.experiment(base, texts, result, tmp_path / "run.json", 100)
    assert len(result["runs"]) == 2  # the third would end at 120
    ended = capsys.readouterr().out.splitlines()[-1]
    assert ended == f"the budget is used up: no time for {SMALL[2].name}, rate {SMALL[2].rates[1]:g}, seed 0"


@pytest.fixture
def helpers(base, texts, monkeypatch):
    """Threads for processes: locks are of open files. Gives the numbers of CPU threads that are set."""
    threads = []
    monkeypatch.setattr(runs, "load", lambda settings: (base, texts))
    monkeypatch.setattr(runs, "get_context", lambda kind: SimpleNamespace(Process=threading.Thread))
    monkeypatch.setattr(runs, "parent_process", lambda: SimpleNamespace(is_alive=lambda: True))
    monkeypatch.setattr(runs.torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(runs.torch, "set_num_threads", threads.append)
    return threads


def test_processes_share_the_runs_and_the_seeds_wait_for_all_rates(
    base, texts, result, tmp_path, monkeypatch, helpers
):
    """The last of the first seeds is the slowest."""
    slowest = Planned(SMALL[-1].name, SMALL[-1].rates[1], 0)
    made = Made(lambda one: 0.3 if one == slowest else 0.05)
    monkeypatch.setattr(runs, "measure", made)
    path = tmp_path / "run.json"
    runs.experiment(base, texts, result, path, processes=3)
    assert min(made.order.index(one) for one in ALL if one.seed) > made.order.index(slowest)
    assert sorted(made.order) == done(result) == done(read(path)) == ALL
    assert missing(result) == []
    assert helpers == [2, 2, 2]  # of 6
    assert [*tmp_path.iterdir()] == [path]


def test_what_others_have_begun_within_the_budget_is_waited_for(
    base, texts, result, tmp_path, monkeypatch, helpers
):
    """Runs seem to take 40 s, so that there is no time for a second one."""
    main = threading.current_thread()
    made = Made(lambda one: 0.3 if threading.current_thread() is main else 0.8)
    monkeypatch.setattr(runs, "measure", made)
    runs.experiment(base, texts, result, tmp_path / "run.json", 30, processes=2)
    assert len(made.order) == 2
    assert done(read(tmp_path / "run.json")) == done(result) == sorted(made.order)


def test_a_diverged_run_is_named_and_not_chosen(base, texts, result, tmp_path):
    result["plan"] = {"LoRA": Method("LoRA", "lora", "paper", (1e-3, 1e30), 4)._asdict()}
    runs.experiment(base, texts, result, tmp_path / "run.json")
    (run,) = result["runs"]  # no further seed
    assert run["diverged"] == "loss on 'prose, validation' after step 2: nan"
    assert run["points"] == []


def test_it_goes_on_with_what_is_there_with_more_seeds_and_other_methods(result, tmp_path):
    """Also with what lies beside the result of a process that was killed; without it that is of another."""
    path, finished, made = tmp_path / "run.json", json.loads(GOLDEN.read_text()), Made()
    beside = tmp_path / "run.runs" / "a.json"
    beside.parent.mkdir()
    beside.write_text("{}")
    assert resume(path, result) is result
    assert not [*tmp_path.iterdir()]

    save(path, finished)
    assert path.read_text() == GOLDEN.read_text()  # a line for each run
    beside.parent.mkdir()
    more = made(None, None, None, Planned("MiCA, r = 16", 1e-3, 7))
    beside.write_text(json.dumps(more))
    fresh = copy.deepcopy(finished) | {"runs": []}
    fresh["settings"]["seeds"] += 1
    fresh["plan"]["another"] = fresh["plan"]["LoRA, r = 16"]
    found = resume(path, fresh)
    assert found["runs"] == [*finished["runs"], more["run"]]
    assert found["methods"]["MiCA, r = 16"] == more["method"]
    assert found["starts"] == finished["starts"] * 2
    assert (found["settings"], found["plan"]) == (fresh["settings"], fresh["plan"])


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("model", "other", "model"),
        ("settings", {"epochs": 9}, "settings"),
        ("recipes", {"paper": {}}, "recipes"),
        ("texts", {"reference": {"tokens": 9}}, "texts"),
        ("plan", {"MiCA, r = 16": {"rank": 5}}, "plan"),
        ("machine", {"torch": "9.9"}, "torch"),
    ],
)
def test_other_settings_are_refused(result, tmp_path, key, value, why):
    path = tmp_path / "run.json"
    save(path, result)
    before = path.read_text()
    assert resume(path, result | {"machine": {**result["machine"], "triton": "9.9"}})["runs"] == []
    result[key] = {**result[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UsageError) as raised:
        resume(path, result)
    assert str(raised.value) == f"--name run: {path} has other {why}: take another name"
    assert path.read_text() == before
