"""`bench.quality` on a tiny Llama: fair tries, and a report that follows from its JSON."""

import copy
import json
import math
import re
from itertools import pairwise
from statistics import mean, median

import pytest
import torch

import mica.fast
from bench import quality, quality_plot, quality_report, quality_search, quality_text, quality_train
from bench.quality.report import FULL, MICA, SAME_RANK, SAME_SIZE, STOCK
from tests.support import models

SETTINGS = {"rank": 4, "steps": 4, "tries": 2, "seeds": 2, "length": 32, "people": 8, "eval_blocks": 2}
MACHINE = {"cpu": "a machine", "threads": 2, "torch": "2.0", "commit": "abc"}


@pytest.fixture(scope="module")
def base(tokenizer):
    return models.tiny_llama(vocab_size=len(tokenizer)).requires_grad_(False)


def run(base, texts, keep=lambda result: None, **settings):
    found = quality.experiment(base, texts, SETTINGS | settings, keep)
    return {"machine": MACHINE, "model": "tiny", "seconds": 1, **found}


@pytest.fixture(scope="module")
def result(base, texts):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    found = run(base, texts)
    for name, value in base.state_dict().items():  # every method starts from the same model
        assert torch.equal(value, before[name])
    return found


def runs(result, method):
    return [one for one in result["runs"] if one["method"] == method]


# --- training


def test_what_is_said_of_answers(base, tokenizer):
    prompts = ("The pet of Velma is a", "By trade, Velma is a")
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    with torch.no_grad():
        scores = [base(torch.tensor([one])).logits[0, -1].log_softmax(-1) for one in ids]

    def ordered(score, words):  # the likeliest first
        return sorted(words, key=lambda word: -score[tokenizer(word).input_ids[0]])

    first, *others = ordered(scores[0], (" wolf", " goat", " fox"))
    *wrong, last = ordered(scores[1], (" nurse", " tailor", " baker"))
    probes = [
        quality_text.Probe(prompts[0], first, tuple(others)),
        quality_text.Probe(prompts[1], last, tuple(wrong)),
    ]
    asked = quality_text.ask(tokenizer, probes)
    words = [[tokenizer(word).input_ids[0] for word in (one.answer, *one.others)] for one in probes]
    right = [score[word[0]].item() for score, word in zip(scores, words, strict=True)]
    among = [score[word].log_softmax(0)[0].item() for score, word in zip(scores, words, strict=True)]
    found = quality_train._answers(base, asked)
    assert found[""] == pytest.approx(-mean(right), rel=1e-5)
    assert found[", among answers"] == pytest.approx(-mean(among), rel=1e-5)
    assert found[", picked"] == 0.5
    assert [quality_train._answers(base, quality_text.ask(tokenizer, [p]))[", picked"] for p in probes] == [
        1,
        0,
    ]
    assert found[", recalled"] == 0
    likeliest = tokenizer.convert_ids_to_tokens(int(scores[0].argmax()))
    known = quality_text.ask(tokenizer, [quality_text.Probe(probes[0].prompt, f" {likeliest}")])
    found = quality_train._answers(base, known)
    assert found[", recalled"] == 1
    assert ", picked" not in found


def test_batches_are_the_same_for_all_and_have_a_block_of_each(texts):
    first, again, other = (
        torch.stack(list(quality_train.batches(texts.train, 40, seed))) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (40, 4, 32)
    start = 0
    for name, count in quality_text.BATCH.items():
        blocks, seen = texts.train[name], first[:, start : start + count].flatten(0, 1)
        epoch = seen[: len(blocks)]  # every block once
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, blocks.tolist()))
        start += count


def test_same_size_is_the_closest_rank(base, result):
    found = result["methods"]
    rank, wanted = found[SAME_SIZE]["rank"], found[MICA]["trained_parameters"]
    at_rank_1 = found[SAME_RANK]["trained_parameters"] // found[SAME_RANK]["rank"]
    assert found[SAME_SIZE]["trained_parameters"] == rank * at_rank_1
    assert all(abs(rank * at_rank_1 - wanted) <= abs(r * at_rank_1 - wanted) for r in range(1, 9))
    assert [quality_train.same_size_rank(r, 49, 100) for r in (1, 2, 3, 16)] == [1, 1, 1, 8]
    assert quality_train.same_size_rank(16, 60, 100) == 10  # 9.6
    assert found[FULL]["trained_parameters"] == sum(p.numel() for p in base.parameters())


def test_both_backends_train_alike(result):
    ours, stock = runs(result, MICA), runs(result, STOCK)
    assert len(stock) == 1
    same = next(one for one in ours if (one["rate"], one["seed"]) == (stock[0]["rate"], stock[0]["seed"]))
    assert same["losses"] == pytest.approx(stock[0]["losses"], abs=2e-5)
    assert same["losses"][-1] != pytest.approx(runs(result, SAME_RANK)[0]["losses"][-1], abs=2e-5)
    difference, steps = quality_report.curve_difference(result)
    assert difference == max(abs(a - b) for a, b in zip(same["losses"], stock[0]["losses"], strict=True))
    assert steps == 4
    assert difference <= 2e-5


def test_stock_is_stock(base, texts):
    for method in quality.methods(base, 4)[:2]:
        before = mica.fast.call_counts.total()
        candidate = quality_train.Candidate(method, base)
        quality_train.train(candidate, texts, 1e-3, 1, 0)
        quality_train.evaluate(candidate.model, texts, candidate.autocast, candidate.context)
        assert (mica.fast.call_counts.total() == before) == method.stock


def test_every_method_has_the_same_number_of_tries(result):
    for method in (MICA, SAME_RANK, SAME_SIZE, FULL):
        assert [one["seed"] for one in runs(result, method)] == [0, 0, 1]
        assert len({one["rate"] for one in runs(result, method)}) == 2
        assert runs(result, method)[-1]["rate"] == quality_report.chosen_rate(result, method)


def test_a_run_starts_anew(base, texts):
    for method in quality.methods(base, 4):
        candidate = quality_train.Candidate(method, base)
        first, _, again = (quality_train.train(candidate, texts, 1e-2, 3, seed) for seed in (0, 1, 0))
        assert first["losses"] == again["losses"], method.name


def test_tries():
    tried = {}
    for wanted, loss in ((1e-3, 3.0), (3e-3, 2.0), (9e-3, 2.5), (5.2e-3, 1.9), (3.9e-3, 2.1)):
        assert quality_search.next_rate(tried, 1e-3) == wanted
        tried[wanted] = loss
    assert quality_search.best(tried) == 5.2e-3
    assert quality_search.is_enclosed(tried)
    assert quality_search.next_rate({1.0: 1.0, 3.0: math.inf}, 1.0) == 0.33
    assert not quality_search.is_enclosed({1.0: 1.0, 3.0: math.inf})
    assert quality_search.next_rate({1.0: math.inf}, 1.0) == 0.33
    assert quality_search.best({1.0: math.inf}) is None


# --- results


def test_a_diverged_run_is_named_and_not_chosen(base, texts, monkeypatch):
    real = quality.methods(base, 4)
    wild = [real[0], quality_train.Method(SAME_RANK, "lora", 1e30, 4)]
    monkeypatch.setattr(quality, "methods", lambda *args: wild)
    result = run(base, texts)
    json.dumps(result, allow_nan=False)
    found = runs(result, SAME_RANK)
    assert len(found) == 2  # both tries, no further seed
    assert all("nan" in one["diverged"] and one["evaluation"] is None for one in found)
    assert quality_report.chosen_rate(result, SAME_RANK) is None
    text = quality_report.report(result)
    assert f"{SAME_RANK} | 3.3e+29: diverged, 1e+30: diverged | none converged" in text
    assert f"- {SAME_RANK}, learning rate 1e+30, seed 0: training loss nan at step" in text


def test_a_try_that_diverged_is_not_the_choice(result):
    broken = copy.deepcopy(result)
    rate = quality_report.chosen_rate(result, FULL)
    for one in runs(broken, FULL):
        if one["rate"] == rate:
            one["diverged"], one["evaluation"] = "training loss nan at step 3", None
    assert quality_report.chosen_rate(broken, FULL) not in (rate, None)
    assert "training loss nan at step 3" in quality_report.report(broken)
    for one in runs(broken, MICA):
        one["diverged"], one["evaluation"] = "training loss nan at step 3", None
    for one in runs(broken, STOCK):
        one["diverged"], one["evaluation"] = "training loss nan at step 3", None
    text = quality_report.report(broken)
    assert "| none converged |" in text
    assert f"\n{MICA} | 0" not in text.split("### Learning rates")[0]


VALIDATION = ("facts, validation, among answers", "prose, validation")


def columns(evaluation):
    return {
        "facts": evaluation["facts, held_out, among answers"],
        "picked": 100 * evaluation["facts, held_out, picked"],
        "answer": evaluation["facts, held_out"],
        "prose": evaluation["prose, held_out"],
        "reference": evaluation["reference"],
        "known": evaluation["known facts"],
        "known recalled": 100 * evaluation["known facts, recalled"],
    }


def leaves(value):
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in leaves(one)]
    if isinstance(value, list):
        return [leaf for one in value for leaf in leaves(one)]
    return [value] if isinstance(value, (int, float)) else []


def derivable(result):
    """Every number that may stand in a report of ``result``, worked out here from its JSON alone."""
    base, found, falls = columns(result["base"]), [*leaves(result), math.log(8), 100 / 8], {}
    found += base.values()
    steps = {}
    for method, facts in result["methods"].items():
        own = runs(result, method)
        scores = [
            (mean(one["evaluation"][name] for name in VALIDATION), one["rate"])
            for one in own
            if one["seed"] == 0
        ]
        found += [score for score, _ in scores]
        after = [columns(one["evaluation"]) for one in own if one["rate"] == min(scores)[1]]
        for name, before in base.items():
            values = [one[name] for one in after]
            for one in (mean(values), min(values), max(values)):
                found += [one, one - before, before - one]
        falls[method] = base["facts"] - mean(one["facts"] for one in after)
        steps[method] = median(s for one in own for s in one["seconds"])
        found += [sum(one["seconds"]) for one in own]
        found += [steps[method], steps[method] * result["settings"]["steps"]]
        found += [facts[name] / 1e6 for name in ("optimizer_bytes", "saved_bytes")]
    sizes = {name: facts["trained_parameters"] for name, facts in result["methods"].items()}
    for rival in (SAME_RANK, SAME_SIZE, FULL):
        found += [falls[MICA] / falls[rival], 100 * sizes[MICA] / sizes[rival]]
    (stock,) = runs(result, STOCK)
    ours = next(o for o in runs(result, MICA) if (o["rate"], o["seed"]) == (stock["rate"], stock["seed"]))
    found += [steps[STOCK] / steps[MICA]]
    found += [max(abs(a - b) for a, b in zip(ours["losses"], stock["losses"], strict=True)), 4]
    return found


def absent(result, text):
    """Numbers in ``text`` that `derivable` does not know, at the precision in which they are printed."""
    machine = ", ".join(f"{name} {value}" for name, value in MACHINE.items())
    assert machine in text
    for quoted in (machine, quality_report.PAPER, *quality_report.CLAIMS.values()):
        text = text.replace(quoted, "")
    text = text.replace("SHA-256", "")
    for about in result["texts"].values():
        text = text.replace(about["sha256"][:12], "")
    values = derivable(result)
    printed = {f"{value:{form}}" for value in values for form in (".0f", ".1f", ".2f", ".3f", "g", ".2g")}
    words = re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", text)
    return [word for word in words if word.replace(",", "") not in printed]


def test_the_report_follows_from_the_json(result):
    again = json.loads(json.dumps(result))
    text = quality_report.report(again)
    assert len(re.findall(r"\d\.\d{3}", text)) > 50
    assert absent(again, text) == []
    assert absent(again, text + " 123.457") == ["123.457"]
    for claim in (*quality_report.CLAIMS.values(), "2604.01694"):
        assert claim in text
    for method in result["methods"]:
        assert f"\n{method} | " in text
    assert "numbers mean nothing" not in text
    again["settings"]["quick"] = True
    assert "numbers mean nothing" in quality_report.report(again)


def test_more_and_less_need_ranges_that_do_not_meet():
    spread = quality_report.Spread
    for ours, other, words in [
        (spread(2, 1.5, 2.5, 2), spread(1, 0.5, 1.4, 2), "MiCA: more"),
        (spread(1, 0.5, 1.4, 2), spread(2, 1.5, 2.5, 2), "MiCA: less"),
        (spread(2, 1.4, 2.5, 2), spread(1, 0.5, 1.5, 2), "not told apart"),
        (spread(2, 2, 2, 1), spread(1, 1, 1, 1), ""),
    ]:
        assert quality_report.compared(ours, other) == words


def test_what_did_not_fall_has_no_factor(result):
    worse = copy.deepcopy(result)
    for one in runs(worse, FULL):
        one["evaluation"]["facts, held_out, among answers"] = 9.0
    assert "no factor" not in quality_report.report(result)
    assert "no factor" in quality_report.report(worse)


def test_files(result, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.json"
    quality._save(path, result)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    text = quality_report.write(path)
    assert path.with_suffix(".md").read_text() == text
    svg = path.with_suffix(".svg").read_text()
    assert quality_plot.INK in svg
    for method in (SAME_RANK, SAME_SIZE, FULL, "MiCA"):
        assert method in svg
    quality_plot.figure(result, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == svg


def test_there_is_a_result_after_every_run(base, texts):
    counts = []
    run(base, texts, lambda result: counts.append(len(result["runs"])), tries=1, seeds=1, steps=1)
    assert counts == [1, 2, 3, 4, 5]
    assert all(b == a + 1 for a, b in pairwise(counts))


def test_arguments_are_checked(capsys):
    assert quality.main(["--steps", "0"]) == 2
    assert capsys.readouterr().err == "bench.quality: error: --steps 0: at least 1\n"
