"""`bench.quality` end to end on a tiny Llama: a file after every run, and the same runs after a stop."""

import copy
import json

import pytest
import torch

from bench.quality import __main__ as quality
from bench.quality import report
from bench.quality.recipes import FULL, LORA_ALL, LORA_PAPER, MICA_ALL, MICA_PAPER, Method
from bench.quality.schedule import Planned, chosen_rate, missing
from bench.quality.store import resume, save
from mica.errors import UsageError


def runs(result, method):
    return [one for one in result["runs"] if one["method"] == method]


def untimed(result):
    """The runs without what differs between machines and moments."""
    return [{key: one[key] for key in one if not key.endswith("seconds")} for one in result["runs"]]


def test_every_method_has_its_rates_and_seeds(finished):
    for method in (MICA_PAPER, LORA_PAPER, MICA_ALL, LORA_ALL):
        assert [one["seed"] for one in runs(finished, method)] == [0, 0, 1]
        assert [one["rate"] for one in runs(finished, method)[:2]] == finished["plan"][method]["rates"][:2]
        assert runs(finished, method)[-1]["rate"] == chosen_rate(finished, method)
    assert [one["seed"] for one in runs(finished, FULL)] == [0, 0]
    assert missing(finished) == []


def test_all_methods_start_from_the_same_model(base, texts, begin):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    result = begin()
    for method in result["plan"]:
        quality.measure(base, texts, result, Planned(method, 1e-3, 0))
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])


def test_sizes_of_the_methods(base, finished):
    methods = finished["methods"]
    assert methods[FULL]["trained_parameters"] == sum(p.numel() for p in base.parameters())
    config = base.config
    heads = config.num_attention_heads + config.num_key_value_heads
    wide = config.hidden_size // config.num_attention_heads * heads  # rows of q_proj and v_proj
    layers, rank = config.num_hidden_layers, 4
    assert methods[MICA_PAPER]["trained_parameters"] == 2 * layers * rank * config.hidden_size
    assert methods[LORA_PAPER]["trained_parameters"] == layers * 2 * rank * (2 * config.hidden_size + wide)
    assert methods[MICA_ALL]["trained_parameters"] < methods[LORA_ALL]["trained_parameters"]
    for facts in methods.values():  # two fp32 moments a parameter, and the steps of each tensor
        assert 8 * facts["trained_parameters"] < facts["optimizer_bytes"] < 8.2 * facts["trained_parameters"]
        assert facts["saved_bytes"] > 0


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
        run = {
            **planned._asdict(),
            "diverged": "made up",
            "evaluation": None,
            "seconds": [1.0],
            "losses": [1.0],
        }
        return result["plan"][planned.method], run | {"wall_seconds": 40.0, "cpu_seconds": 40.0}

    monkeypatch.setattr(quality, "measure", measure)
    result = begin()
    quality.experiment(base, texts, result, lambda result: None, 100, lambda: now[0])
    assert len(result["runs"]) == 2  # the third would end at 120
    ended = capsys.readouterr().out.splitlines()[-1]
    assert ended == f"the budget is used up: no time for {MICA_ALL}, rate 0.002"
    text = report.report(result)
    assert "**This run is not finished.** Missing:\n\n- " in text
    assert f"- {LORA_ALL}: learning rate 0.001, 0.002; seed 1\n" in text
    quality.experiment(base, texts, result, lambda result: None, 40, lambda: now[0])
    assert len(result["runs"]) == 3


def test_a_diverged_run_is_named_and_not_chosen(base, texts, begin):
    result = begin()
    wild = Method(LORA_PAPER, "lora", "paper", (1e30, 2e30), 4).facts()
    for part in ("plan", "methods"):
        result[part] = {MICA_PAPER: result[part][MICA_PAPER], LORA_PAPER: copy.deepcopy(wild)}
    quality.experiment(base, texts, result, lambda result: None)
    json.dumps(result, allow_nan=False)
    diverged = runs(result, LORA_PAPER)
    assert len(diverged) == 2  # both tries, no further seed
    assert all("nan" in one["diverged"] and one["evaluation"] is None for one in diverged)
    text = report.report(result)
    assert f"{LORA_PAPER} | 1e+30: diverged, 2e+30: diverged | none converged" in text
    assert f"- {LORA_PAPER}, learning rate 1e+30, seed 0: training loss nan at step" in text


def test_arguments_are_checked(capsys, monkeypatch):
    def refuse(*args):
        raise UsageError("no weights")

    monkeypatch.setattr(quality, "find_source", refuse)
    for arguments, why in [
        (["--epochs", "0"], "argument --epochs: 0: at least 1"),
        (["--budget", "0"], "argument --budget: 0: more than 0"),
        ([], "no weights"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            quality.main(arguments)
        assert capsys.readouterr().err.endswith(f"python -m bench.quality: error: {why}\n")
