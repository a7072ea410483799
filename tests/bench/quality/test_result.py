"""What follows from a result: the next run, what is missing, the report; and the file of a result."""

import json
from dataclasses import astuple
from math import inf, log

import pytest

from bench.measure.machine import ROOT
from bench.quality import report
from bench.quality.recipes import FULL, LORA_ALL, LORA_PAPER, MICA_ALL, MICA_PAPER, RECIPES, methods
from bench.quality.schedule import best, is_enclosed, missing, next_rate, next_run, tried, verdict
from bench.quality.store import resume, save
from mica.cli.adapt import options
from mica.errors import UsageError

GOLDEN = ROOT / "tests" / "bench" / "golden"
RESULTS = [*sorted((ROOT / "bench/results").glob("*/*-quality-paper.json")), GOLDEN / "quality.json"]
OPTIMA = {MICA_PAPER: 6e-3, LORA_PAPER: 1e-3, MICA_ALL: 5e-3, LORA_ALL: 1e-5, FULL: 3e-4}


def golden():
    return json.loads((GOLDEN / "quality.json").read_text())


def test_the_papers_recipe_is_that_of_mica_adapt():
    """arXiv 2604.01694, and alpha = 2 r as in its author's example."""
    ours, theirs = RECIPES["paper"], options.RECIPES["paper"]
    assert astuple(ours) == (("q_proj", "v_proj"), 2, "cosine", 0.1, 0.01, 0.05, 0.3)
    assert (ours.scaling, ours.warm_up) == (theirs["alpha_per_rank"], theirs["warmup_ratio"])
    assert ",".join(ours.target_modules) == theirs["target_modules"]
    for name in ("scheduler", "weight_decay", "dropout", "max_grad_norm"):
        assert getattr(ours, name) == theirs[name]


@pytest.mark.parametrize(
    ("losses", "limit", "rate", "chosen", "enclosed"),
    [  # the range of 1e-3 and 2e-3 comes first
        ({}, 9, 1e-3, None, False),
        ({1e-3: 3.0}, 9, 2e-3, 1e-3, False),
        # then what is beyond the best, until worse ones are on both sides
        ({1e-3: 3.0, 2e-3: 2.0}, 9, 4e-3, 2e-3, False),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.5, 8e-3: 1.8}, 9, None, 4e-3, True),
        ({1e-3: 1.0, 2e-3: 2.0}, 3, 5e-4, 1e-3, False),
        ({1e-3: 1.0, 2e-3: 2.0, 5e-4: 0.9}, 3, None, 5e-4, False),  # the limit
        ({1e-3: 1.0}, 1, None, 1e-3, False),
        # one that diverged is worse
        ({1e-3: inf, 2e-3: inf}, 9, 5e-4, None, False),
        ({1e-3: 1.0, 2e-3: inf}, 9, 5e-4, 1e-3, False),
        ({5e-4: 2.0, 1e-3: 1.0, 2e-3: inf}, 9, None, 1e-3, True),
    ],
)
def test_which_learning_rate_is_tried_next(losses, limit, rate, chosen, enclosed):
    assert next_rate(losses, (1e-3, 2e-3), limit) == rate
    assert best(losses) == chosen
    assert is_enclosed(losses) == enclosed


def story(diverges) -> str:
    """All runs in their order, what was missing after some of them, and what the searches found.

    The validation loss grows with the distance to the optimum.
    """
    compared = {method.name: method.facts() for method in methods(16)}
    result, lines = {"settings": {"tries": 6, "seeds": 3}, "methods": compared, "runs": []}, []
    while planned := next_run(result):
        loss = abs(log(planned.rate / OPTIMA[planned.method]))
        evaluation = {"facts, validation, among answers": loss, "prose, validation": loss}
        run = {"diverged": "nan", "evaluation": None} if diverges(planned) else {"diverged": None}
        result["runs"].append(planned._asdict() | {"evaluation": evaluation} | run)
        lines.append(f"{planned.method}, rate {planned.rate:g}, seed {planned.seed}")
        if len(lines) in (9, 16):
            lines[-1] += "".join(f"\n  missing: {line}" for line in missing(result))
    lines += missing(result)
    for name in compared:
        rates = tried(result, name)
        lines.append(f"{name}: {verdict(result, name)}, {len(rates)} rates, {best(rates)}")
    return "\n".join(lines)


STORIES = {
    "every run converges": lambda planned: False,
    "MiCA never converges on all linear layers": lambda planned: planned.method == MICA_ALL,
    "every second seed diverges, and is not repeated": lambda planned: planned.seed == 1,
}


def test_rates_then_seeds_then_full_fine_tuning_and_methods_take_turns():
    told = "\n\n".join(f"# {title}\n{story(diverges)}" for title, diverges in STORIES.items())
    assert told + "\n" == (GOLDEN / "schedule.txt").read_text()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_report_follows_from_its_json(path):
    assert report.report(json.loads(path.read_text())) == path.with_suffix(".md").read_text()


def test_the_table_of_the_page_and_a_result_without_runs():
    assert report.page_table(golden()) + "\n" == (GOLDEN / "quality-page.md").read_text()
    text = report.report(golden() | {"runs": []})
    assert "- full fine-tuning: learning rate 0.0001, 0.0002, 0.0004\n" in text
    assert "\n| full fine-tuning |  | not tried |\n" in text


@pytest.fixture
def fresh():
    result = golden() | {"runs": []}
    del result["base"]
    return result


def test_goes_on_with_what_is_there_and_a_kill_while_writing_leaves_the_last_file(fresh, tmp_path):
    path, finished = tmp_path / "run.json", golden()
    assert resume(path, fresh) is fresh
    save(path, finished)
    assert path.read_text() == (GOLDEN / "quality.json").read_text()  # a line for each run
    assert [*tmp_path.iterdir()] == [path]
    path.with_suffix(".part").write_text('{"settings"')
    assert resume(path, fresh) == finished | {"starts": finished["starts"] + fresh["starts"]}


@pytest.mark.parametrize(
    ("keys", "value", "why"),
    [
        (("settings", "epochs"), 9, "settings"),
        (("model",), "other", "model"),
        (("recipes", "paper", "dropout"), 0.5, "recipes"),
        (("texts", "reference", "tokens"), 9, "texts"),
        (("plan", "MiCA, paper", "rank"), 5, "plan"),
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
