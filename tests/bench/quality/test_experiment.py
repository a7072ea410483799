"""`bench.quality` end to end on a tiny Llama: fair tries, and a file after every run."""

import json

import pytest
import torch

from bench.quality import __main__ as quality
from bench.quality import report
from bench.quality.report import FULL, MICA, SAME_RANK, SAME_SIZE, STOCK
from bench.quality.train import Method
from mica.errors import UsageError

SETTINGS = {"rank": 4, "steps": 4, "tries": 2, "seeds": 2, "length": 32, "people": 8, "eval_blocks": 2}


def run(base, texts, keep=lambda result: None, **settings):
    measured = quality.experiment(base, texts, SETTINGS | settings, keep)
    return {"machine": {"cpu": "a machine", "limit": ""}, "model": "tiny", "seconds": 1, **measured}


@pytest.fixture(scope="module")
def result(base, texts):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    result = run(base, texts)
    for name, value in base.state_dict().items():  # every method starts from the same model
        assert torch.equal(value, before[name])
    return result


def runs(result, method):
    return [one for one in result["runs"] if one["method"] == method]


def test_every_method_has_the_same_number_of_tries(result):
    for method in (MICA, SAME_RANK, SAME_SIZE, FULL):
        assert [one["seed"] for one in runs(result, method)] == [0, 0, 1]
        assert len({one["rate"] for one in runs(result, method)}) == 2
        assert runs(result, method)[-1]["rate"] == report.chosen_rate(result, method)


def test_both_backends_train_alike(result):
    (stock,) = runs(result, STOCK)
    assert stock["rate"] == report.chosen_rate(result, MICA)
    difference, steps = report.curve_difference(result)
    assert difference <= 2e-5
    assert steps == 4
    assert stock["losses"][-1] != pytest.approx(runs(result, SAME_RANK)[0]["losses"][-1], abs=2e-5)


def test_sizes_of_the_methods(base, result):
    methods = result["methods"]
    rank, size = methods[SAME_SIZE]["rank"], methods[MICA]["trained_parameters"]
    at_rank_1 = methods[SAME_RANK]["trained_parameters"] // methods[SAME_RANK]["rank"]
    assert methods[SAME_SIZE]["trained_parameters"] == rank * at_rank_1
    assert all(abs(rank * at_rank_1 - size) <= abs(r * at_rank_1 - size) for r in range(1, 9))
    assert methods[FULL]["trained_parameters"] == sum(p.numel() for p in base.parameters())
    for facts in methods.values():  # two fp32 moments a parameter, and the steps of each tensor
        assert 8 * facts["trained_parameters"] < facts["optimizer_bytes"] < 8.2 * facts["trained_parameters"]
        assert facts["saved_bytes"] > 0


def test_a_diverged_run_is_named_and_not_chosen(base, texts, monkeypatch):
    wild = [quality.methods(base, 4)[0], Method(SAME_RANK, "lora", 1e30, 4)]
    monkeypatch.setattr(quality, "methods", lambda *args: wild)
    result = run(base, texts)
    json.dumps(result, allow_nan=False)
    diverged = runs(result, SAME_RANK)
    assert len(diverged) == 2  # both tries, no further seed
    assert all("nan" in one["diverged"] and one["evaluation"] is None for one in diverged)
    text = report.report(result)
    assert f"{SAME_RANK} | 3.3e+29: diverged, 1e+30: diverged | none converged" in text
    assert f"- {SAME_RANK}, learning rate 1e+30, seed 0: training loss nan at step" in text


def test_the_file_is_complete_after_every_run(base, texts, tmp_path):
    path, counts = tmp_path / "run.json", []

    def keep(result):
        quality.save(path, {"machine": {"cpu": "a machine", "limit": ""}, "model": "tiny", **result})
        text = report.write(path)
        assert path.with_suffix(".md").read_text() == text
        assert text.startswith("tiny; cpu a machine.\n")
        assert json.loads(path.read_text())["runs"] == result["runs"]
        counts.append(len(result["runs"]))

    run(base, texts, keep, tries=1, seeds=1, steps=1)
    assert counts == [1, 2, 3, 4, 5]
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["run.json", "run.md"]


def test_arguments_are_checked(capsys, monkeypatch):
    def refuse(*args):
        raise UsageError("no weights")

    monkeypatch.setattr(quality, "find_source", refuse)
    for arguments, why in [(["--steps", "0"], "argument --steps: 0: at least 1"), ([], "no weights")]:
        with pytest.raises(SystemExit, match="2"):
            quality.main(arguments)
        assert capsys.readouterr().err.endswith(f"python -m bench.quality: error: {why}\n")
