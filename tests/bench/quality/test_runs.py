"""A result: its runs by one process or several, its file, and how it goes on after a kill."""

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from bench.measure.machine import ROOT
from bench.quality import runs
from bench.quality.recipes import METHODS, Method
from bench.quality.runs import resume, save
from bench.quality.schedule import KNOWN, VALIDATION, Planned, missing, planned, rates_that_count
from mica.errors import UsageError
from tests.bench.quality.conftest import SMALL

GOLDEN = ROOT / "tests" / "bench" / "golden"
SETTINGS = {"epochs": 1, "rounds": 2, "rates": 1, "seeds": 2, "length": 32, "people": 8}
LEARNED = dict.fromkeys((*KNOWN, VALIDATION), 1.0)


def golden():
    return json.loads((GOLDEN / "quality.json").read_text())


@pytest.fixture(scope="module")
def begin(texts):
    """() -> a result without runs, like that of the command."""

    def begin():
        machine = {"torch": "2.13", "peft": "0.21", "transformers": "5.24"}
        head = {"machine": machine, "starts": [{"commit": "abc"}], "model": "tiny"}
        result = runs.start(texts, SETTINGS | {"eval_blocks": 2}, **head)
        assert result["plan"].keys() == {one.name for one in METHODS}
        return result | {"plan": {one.name: one._asdict() for one in SMALL}}

    return begin


@pytest.fixture(scope="module")
def finished(base, texts, begin, tmp_path_factory):
    """A whole experiment, which leaves the base model as it was; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    result, before = begin(), {name: value.clone() for name, value in base.state_dict().items()}
    runs.experiment(base, texts, result, folder / "run.json")
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert [*folder.iterdir()] == [folder / "run.json"]
    assert json.loads((folder / "run.json").read_text()) == json.loads(json.dumps(result))
    return result


class Made:
    """In place of `measure`: notes what is made, by which thread."""

    def __init__(self, seconds=lambda one: 0.0):
        self.seconds = seconds
        self.order, self.under_way, self.most = [], set(), 0
        self.lock = threading.Lock()

    def __call__(self, base, texts, result, one):
        with self.lock:
            self.under_way.add(one)
            self.most = max(self.most, len(self.under_way))
            self.order.append(one)
        time.sleep(self.seconds(one))
        with self.lock:
            self.under_way.remove(one)
        run = one._asdict() | {"diverged": None, "points": [{"step": 1, "evaluation": LEARNED}]}
        return {"method": {"trained_parameters": 1}, "run": run | {"wall_seconds": 40.0}}


@pytest.fixture
def learns_at_once(begin):
    """A result whose every run learns the same."""
    return begin() | {"base": dict.fromkeys(LEARNED, 2.0)}


ALL = sorted(Planned(one.name, one.rates[1], seed) for one in SMALL for seed in (0, 1))


def done(result):
    return sorted(Planned(run["method"], run["rate"], run["seed"]) for run in result["runs"])


def test_every_method_has_its_rates_and_seeds_and_size(base, finished):
    assert missing(finished) == []
    for method in SMALL:
        of_method = [one for one in finished["runs"] if one["method"] == method.name]
        assert [(one["rate"], one["seed"]) for one in of_method] == [
            (method.rates[1], 0),
            *((rate, 1) for rate in rates_that_count(finished, method.name)),
        ]
        for run in of_method:
            steps = [one["step"] for one in run["points"]]
            assert steps == [math.ceil(len(run["losses"]) * stop) for stop in (0.25, 0.5, 1)]
    trained = {name: one["trained_parameters"] for name, one in finished["methods"].items()}
    assert trained["full fine-tuning"] == sum(p.numel() for p in base.parameters())
    assert (
        trained["MiCA by the paper, r = 16"]
        == 2 * base.config.num_hidden_layers * 4 * base.config.hidden_size
    )
    frozen = {trained[one.name] for one in SMALL if one.rank == 4 and one.recipe == "all-linear"}
    assert frozen == {trained["MiCA, r = 16"], trained["LoRA, r = 16"]}
    assert trained["MiCA, r = 16"] < trained["LoRA, r = 16"] < trained["LoRA, r = 32"]


def test_a_killed_run_goes_on_to_the_same_result(base, texts, begin, learns_at_once, tmp_path, monkeypatch):
    """What a killed process has made is in the file or beside it; what it was making is made again."""
    path, made, result = tmp_path / "run.json", Made(), learns_at_once

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
        assert len(json.loads(path.read_text())["runs"]) == number
        (tmp_path / "run.runs" / f"{planned(result)[0].key}.lock").touch()  # nobody was there to remove it
        result = resume(path, begin())
        assert len(result["runs"]) == number
    monkeypatch.setattr(runs, "measure", made)
    runs.experiment(base, texts, result, path)
    assert done(result) == sorted(made.order) == ALL
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert [*tmp_path.iterdir()] == [path]
    assert len(result["starts"]) == 3


def test_runs_beside_a_result_are_part_of_it(fresh, tmp_path):
    """A process was killed before the result had them, or after that."""
    path, known = tmp_path / "run.json", golden()
    save(path, known)
    (tmp_path / "run.runs").mkdir()
    old = known["runs"][0]
    for one in (old, old | {"seed": 7}):
        key = Planned(one["method"], one["rate"], one["seed"]).key
        made = {"method": {"trained_parameters": 5}, "run": one}
        (tmp_path / "run.runs" / f"{key}.json").write_text(json.dumps(made))
    found = resume(path, fresh)
    assert found["runs"] == [*known["runs"], old | {"seed": 7}]
    assert found["methods"] == {old["method"]: {"trained_parameters": 5}}


def test_runs_without_a_result_are_of_another_one(fresh, tmp_path):
    (tmp_path / "run.runs").mkdir()
    (tmp_path / "run.runs" / "a.json").write_text('{"run": {"method": "made by other settings"}}')
    assert resume(tmp_path / "run.json", fresh) is fresh
    assert not [*tmp_path.iterdir()]


def test_the_budget_ends_before_a_run_that_would_not_fit(
    base, texts, learns_at_once, tmp_path, monkeypatch, capsys
):
    now, made = [0.0], Made()

    def measure(*args):
        now[0] += 40
        return made(*args)

    monkeypatch.setattr(runs, "measure", measure)
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    runs.experiment(base, texts, learns_at_once, tmp_path / "run.json", 100)
    assert len(learns_at_once["runs"]) == 2  # the third would end at 120
    ended = capsys.readouterr().out.splitlines()[-1]
    assert ended == f"the budget is used up: no time for {SMALL[2].name}, rate {SMALL[2].rates[1]:g}, seed 0"


@pytest.fixture
def helpers(base, texts, monkeypatch):
    """Threads for processes: locks are of open files. Gives the numbers of CPU threads that are set."""
    threads = []

    class Process:
        def __init__(self, target, args, daemon):
            self._call = target, *args

        def start(self):
            self._result = pool.submit(*self._call)

        def join(self):
            self._result.result()

    monkeypatch.setattr(runs, "load", lambda settings: (base, texts))
    monkeypatch.setattr(runs, "get_context", lambda kind: SimpleNamespace(Process=Process))
    monkeypatch.setattr(runs, "parent_process", lambda: SimpleNamespace(is_alive=lambda: True))
    monkeypatch.setattr(runs.torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(runs.torch, "set_num_threads", threads.append)
    with ThreadPoolExecutor(2) as pool:
        yield threads


def test_processes_share_the_runs_and_the_seeds_wait_for_all_rates(
    base, texts, learns_at_once, tmp_path, monkeypatch, helpers
):
    """The last of the first seeds is the slowest."""
    slowest = Planned(SMALL[-1].name, SMALL[-1].rates[1], 0)
    made = Made(lambda one: 0.3 if one == slowest else 0.05)
    monkeypatch.setattr(runs, "measure", made)
    path = tmp_path / "run.json"
    runs.experiment(base, texts, learns_at_once, path, processes=3)
    assert made.most == 3
    assert min(made.order.index(one) for one in ALL if one.seed) > made.order.index(slowest)
    assert sorted(made.order) == done(learns_at_once) == done(json.loads(path.read_text())) == ALL
    assert missing(learns_at_once) == []
    assert helpers == [2, 2, 2]  # of 6
    assert [*tmp_path.iterdir()] == [path]


def test_what_others_have_begun_within_the_budget_is_waited_for(
    base, texts, learns_at_once, tmp_path, monkeypatch, helpers
):
    """Runs seem to take 40 s, so that there is no time for a second one."""
    main = threading.current_thread()
    made = Made(lambda one: 0.3 if threading.current_thread() is main else 0.8)
    monkeypatch.setattr(runs, "measure", made)
    path = tmp_path / "run.json"
    runs.experiment(base, texts, learns_at_once, path, 30, processes=2)
    assert len(made.order) == 2
    assert done(json.loads(path.read_text())) == done(learns_at_once) == sorted(made.order)
    assert [*tmp_path.iterdir()] == [path]


def test_a_helper_ends_with_the_process_that_it_helps(learns_at_once, tmp_path, monkeypatch, helpers):
    monkeypatch.setattr(runs, "measure", Made())
    monkeypatch.setattr(runs, "parent_process", lambda: SimpleNamespace(is_alive=lambda: False))
    save(tmp_path / "run.json", learns_at_once)
    with pytest.raises(SystemExit):
        runs._help(tmp_path / "run.json", math.inf, 1)
    assert not [*tmp_path.glob("run.runs/*.json")]


def test_a_diverged_run_is_named_and_not_chosen(base, texts, begin, tmp_path):
    result = begin()
    result["plan"] = {"LoRA": Method("LoRA", "lora", "paper", (1e-3, 1e30), 4)._asdict()}
    runs.experiment(base, texts, result, tmp_path / "run.json")
    json.dumps(result, allow_nan=False)
    (run,) = result["runs"]  # no further seed
    assert run["diverged"] == "loss on 'prose, validation' after step 2: nan"
    assert run["points"] == []


@pytest.fixture
def fresh():
    result = golden() | {"runs": []}
    del result["base"]
    return result


def test_goes_on_with_what_is_there(fresh, tmp_path):
    path, finished = tmp_path / "run.json", golden()
    assert resume(path, fresh) is fresh
    save(path, finished)
    assert path.read_text() == (GOLDEN / "quality.json").read_text()  # a line for each run
    assert [*tmp_path.iterdir()] == [path]
    assert resume(path, fresh) == finished | {"starts": finished["starts"] + fresh["starts"]}


def test_seeds_may_be_more(fresh, tmp_path):
    path = tmp_path / "run.json"
    save(path, golden())
    seeds = golden()["settings"]["seeds"] + 1
    found = resume(path, fresh | {"settings": fresh["settings"] | {"seeds": seeds}})
    assert found["runs"] == golden()["runs"]
    assert found["settings"]["seeds"] == seeds


def test_methods_may_be_new_and_runs_of_none_are_dropped(fresh, tmp_path):
    path = tmp_path / "run.json"
    save(path, golden())
    more = fresh["plan"] | {"another": fresh["plan"]["LoRA, r = 16"]}
    found = resume(path, fresh | {"plan": more})
    assert (found["plan"], found["runs"]) == (more, golden()["runs"])
    assert {one.method for one in planned(found)} == {"another"}
    with pytest.raises(UsageError, match="has other plan"):
        resume(path, fresh | {"plan": {}})


@pytest.mark.parametrize(
    ("keys", "value", "why"),
    [
        (("settings", "epochs"), 9, "settings"),
        (("model",), "other", "model"),
        (("recipes", "paper", "dropout"), 0.5, "recipes"),
        (("texts", "reference", "tokens"), 9, "texts"),
        (("plan", "MiCA, r = 16", "rank"), 5, "plan"),
        (("machine", "torch"), "9.9", "torch"),
        (("machine", "triton"), "9.9", None),
    ],
)
def test_other_settings_are_refused(fresh, tmp_path, keys, value, why):
    path = tmp_path / "run.json"
    save(path, fresh)
    before, inner = path.read_text(), fresh
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    if why is None:
        assert resume(path, fresh)["runs"] == []
    else:
        with pytest.raises(UsageError) as raised:
            resume(path, fresh)
        assert str(raised.value) == f"--name run: {path} has other {why}: take another name"
    assert path.read_text() == before
