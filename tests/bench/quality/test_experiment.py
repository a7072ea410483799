"""`bench.quality` end to end on a tiny Llama: a file after every run, and the same runs after a stop."""

import copy
import json

import pytest
import torch

from bench.quality import __main__ as quality
from bench.quality.recipes import FULL, LORA_ALL, LORA_PAPER, MICA_ALL, MICA_PAPER, Method, methods
from bench.quality.schedule import Planned, chosen_rate, missing
from bench.quality.store import resume, save
from mica.errors import UsageError

SETTINGS = {"rank": 4, "epochs": 1, "rounds": 2, "tries": 2, "seeds": 2, "length": 32, "people": 8}


@pytest.fixture(scope="module")
def begin(texts):
    """() -> a result without runs, like that of the command."""

    def begin():
        head = {"machine": {"cpu": "a machine", "threads": 2}, "starts": [{"commit": "abc"}], "model": "tiny"}
        return quality.start(texts, SETTINGS | {"eval_blocks": 2}, methods(4), **head)

    return begin


@pytest.fixture(scope="module")
def finished(base, texts, begin):
    """A whole experiment; not to be changed."""
    result = begin()
    quality.experiment(base, texts, result, lambda result: None)
    return result


def runs(result, method):
    return [one for one in result["runs"] if one["method"] == method]


def untimed(result):
    """The runs without what differs between machines and moments."""
    return [{key: one[key] for key in one if not key.endswith("seconds")} for one in result["runs"]]


def test_every_method_has_its_rates_and_seeds_and_size(base, finished):
    facts, config = finished["methods"], base.config
    for method in (MICA_PAPER, LORA_PAPER, MICA_ALL, LORA_ALL):
        assert [one["seed"] for one in runs(finished, method)] == [0, 0, 1]
        assert [one["rate"] for one in runs(finished, method)[:2]] == finished["plan"][method]["rates"][:2]
        assert runs(finished, method)[-1]["rate"] == chosen_rate(finished, method)
    assert [one["seed"] for one in runs(finished, FULL)] == [0, 0]
    assert missing(finished) == []
    trained = {name: one["trained_parameters"] for name, one in facts.items()}
    heads = config.num_attention_heads + config.num_key_value_heads
    wide = config.hidden_size // config.num_attention_heads * heads  # rows of q_proj and v_proj
    layers, rank = config.num_hidden_layers, 4
    assert trained[FULL] == sum(p.numel() for p in base.parameters())
    assert trained[MICA_PAPER] == 2 * layers * rank * config.hidden_size
    assert trained[LORA_PAPER] == layers * 2 * rank * (2 * config.hidden_size + wide)
    assert trained[MICA_ALL] < trained[LORA_ALL]
    for one in facts.values():  # two fp32 moments a parameter, and the steps of each tensor
        assert 8 * one["trained_parameters"] < one["optimizer_bytes"] < 8.2 * one["trained_parameters"]
        assert one["saved_bytes"] > 0


def test_all_methods_start_from_the_same_model(base, texts, begin):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    result = begin()
    for method in result["plan"]:
        quality.measure(base, texts, result, Planned(method, 1e-3, 0))
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_killed_run_goes_on_to_the_same_result(base, texts, begin, finished, tmp_path):
    path, result = tmp_path / "run.json", begin()

    class Killed(BaseException):
        """Not an Exception, like what ends a process."""

    def keep(result):
        save(path, result)
        if len(result["runs"]) in (3, 8):
            raise Killed

    for done in (3, 8):
        with pytest.raises(Killed):
            quality.experiment(base, texts, result, keep)
        result = resume(path, begin())
        assert len(result["runs"]) == done
    quality.experiment(base, texts, result, lambda result: save(path, result))
    assert untimed(json.loads(path.read_text())) == untimed(finished)
    assert len(result["starts"]) == 3


def test_the_budget_ends_before_a_run_that_would_not_fit(base, texts, begin, monkeypatch, capsys):
    now = [0.0]

    def measure(base, texts, result, planned):
        now[0] += 40
        run = planned._asdict() | {"diverged": "made up", "evaluation": None, "wall_seconds": 40.0}
        return result["plan"][planned.method], run

    monkeypatch.setattr(quality, "measure", measure)
    result = begin()
    quality.experiment(base, texts, result, lambda result: None, 100, lambda: now[0])
    assert len(result["runs"]) == 2  # the third would end at 120
    ended = capsys.readouterr().out.splitlines()[-1]
    assert ended == f"the budget is used up: no time for {MICA_ALL}, rate 0.002"
    quality.experiment(base, texts, result, lambda result: None, 40, lambda: now[0])
    assert len(result["runs"]) == 3


def test_a_diverged_run_is_named_and_not_chosen(base, texts, begin):
    result = begin()
    wild = Method(LORA_PAPER, "lora", "paper", (1e30, 2e30), 4).facts()
    for part in ("plan", "methods"):
        result[part] = {LORA_PAPER: copy.deepcopy(wild)}
    quality.experiment(base, texts, result, lambda result: None)
    json.dumps(result, allow_nan=False)
    assert [one["rate"] for one in result["runs"]] == [1e30, 2e30]  # both tries, no further seed
    assert all(one["diverged"].startswith("training loss nan at step ") for one in result["runs"])
    assert not any(one["evaluation"] for one in result["runs"])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--epochs", "0"], "argument --epochs: 0: at least 1"),
        (["--budget", "0"], "argument --budget: 0: more than 0"),
        ([], "no weights"),
    ],
)
def test_arguments_are_checked(arguments, why, capsys, monkeypatch):
    def refuse(*args):
        raise UsageError("no weights")

    monkeypatch.setattr(quality, "find_source", refuse)
    with pytest.raises(SystemExit, match="2"):
        quality.main(arguments)
    assert capsys.readouterr().err.endswith(f"python -m bench.quality: error: {why}\n")
