"""What the page says of planted results."""

import math
from pathlib import Path

import pytest

from mica.cli.compare import page, picture
from mica.cli.compare.methods import METHODS
from tests.mica.cli.compare.comparisons import LOSS, SETTINGS, alike, found, gaining

OUTPUT = Path("here")


def sentences(told):
    return page.sentences(told, OUTPUT)


def markdown(told):
    return page.markdown(told, OUTPUT)


def test_the_best_is_named_and_taken_whatever_it_is():
    for name, title in (("lora", "LoRA"), ("full", "full fine-tuning"), ("mica", "MiCA")):
        first, _, last = sentences(found(gaining(name, 0.6)))
        assert first.startswith("At equal forgetting (at most ")
        assert f" {title} learned most, 0." in first
        assert first.count("more than") == 3
        assert "chance" not in first
        assert last == f"Take {title}: at equal forgetting it learned most."


def test_nothing_is_recommended_without_a_difference():
    """Neither the smallest nor the first: what would decide."""
    told = found(noise=(0.05, 0.02))
    first, _, *advice = sentences(told)
    assert first.endswith(" may be chance.")
    assert "more than" not in first
    assert advice[0].startswith("Undecided between ")
    assert advice[0].count("MiCA") == 2
    assert "LoRA" in advice[0]
    assert all(line.startswith("The lead over ") for line in advice[1:])
    for row in told["equal"]["methods"][1:]:
        assert METHODS[row["method"]].title in " ".join(advice[1:])
    assert not any(line.startswith("Take ") for line in advice)


def test_a_gap_of_one_seed_each_recommends_nothing_however_large_it_is():
    first, *_, advice = sentences(found(gaining("mica", 9.0), names=("mica", "lora"), seeds=1))
    assert first.endswith(" ± unknown) may be chance.")
    assert advice.startswith("The lead over LoRA: nothing can be said, as no two methods have second seeds")


def test_a_command_that_would_decide_is_named():
    lines = sentences(found(gaining("lora", 0.2), noise=(0.01, 0.02), names=("mica", "lora"), seeds=2))
    (line,) = [line for line in lines if line.startswith("The lead over MiCA: if it is as large as it looks")]
    assert "`mica compare --output here --resume --budget " in line
    assert " --seeds " in line


def test_too_few_documents_are_named():
    told = found(gaining("lora", 0.6), documents=2)
    lines = sentences(told)
    assert any(line.startswith("Undecided between LoRA, ") for line in lines)
    assert sum("the held-out blocks are of fewer than 3 documents" in line for line in lines) == 1
    assert "18 blocks of held-out text (documents: 2)" in markdown(told)


def test_a_price_in_forgetting_is_told():
    def forgets(method, rate, step):
        return step * (0.05 if method == "full" else 0.002)

    told = found(gaining("full", 1.0), forgets)
    first, second, *_ = sentences(told)
    assert "full fine-tuning learned most" not in first
    assert second.startswith("However much is forgotten, full fine-tuning learned most, ")
    assert " for " in second.split(":")[0]
    assert "## However much is forgotten" in markdown(told)


def test_where_nothing_is_forgotten_there_is_no_limit():
    told = found(forgets=lambda *at: -0.1)
    first, second, *_ = sentences(told)
    assert first.startswith("Without forgetting any of the retained text, ")
    assert second == "More forgetting would not have helped any of them."
    assert "## However much" not in markdown(told)


def test_nothing_learned_is_said_and_recommends_nothing():
    told = found(lambda *at: -0.1)
    assert sentences(told) == ["No method has learned anything of this text: no loss on held-out text fell."]
    assert "mica adapt" not in markdown(told)


def test_perplexities_before_and_after_are_in_the_table():
    told = found(gaining("lora", 0.6))
    text = markdown(told)
    row = told["equal"]["methods"][0]
    assert f"held-out perplexity (before: {math.exp(LOSS):.2f})" in text
    assert f"retained perplexity (before: {math.exp(LOSS):.2f})" in text
    cells = next(line for line in text.splitlines() if line.startswith("| LoRA | ")).split(" | ")
    assert cells[4] == f"{math.exp(LOSS - row['learned']):.2f}"
    assert cells[5] == f"{math.exp(LOSS + row['forgotten']):.2f}"


@pytest.mark.parametrize("steps", [12, 60])
def test_short_trainings_are_called_short(steps):
    text = markdown(found(steps=steps))
    assert f"All trainings that are compared have {steps} steps of 256 tokens." in text
    assert ("They are short" in text) == (steps == 12)


def test_what_the_budget_did_not_allow_is_on_the_page():
    told = found(budget=300.0)
    assert told["not_done"]
    for line in told["not_done"]:
        assert f"\n- {line}" in markdown(told)


def test_names_are_without_the_folders_of_this_machine():
    secret = SETTINGS | {"model": "/home/me/model", "text": ["/home/me/t.txt"], "retain": ["/home/me/r.txt"]}
    text = markdown(found(settings=secret)).partition("## The trainings")[0]  # whose command is to run
    assert "/home/me" not in text
    assert "`r.txt`" in text


def test_settings_of_the_trainings_are_named():
    told = found(settings=SETTINGS | {"batch_size": 3})
    text = markdown(told)
    assert "MiCA has rank 64 and alpha 64, LoRA half of both" in text
    assert "linear schedule" in text
    (row,) = [row for row in told["equal"]["methods"] if row["method"] == "mica"]
    line = page.command(told, row)
    assert f"```sh\n{line}\n```" in text
    assert "--rank 64 --eval-blocks 64 --model some/model" in line
    assert "--batch-size 3" in line
    assert line.endswith(f"--learning-rate {row['rate']:g} --steps {row['steps']} --output run")


def test_pictures(tmp_path):
    """Of methods that are certain, tied, and none at all."""
    reports = [
        found(gaining("lora")),
        found(seeds=1),
        found(lambda *at: -0.1),
        found(alike, lambda *at: -0.1),
    ]
    for number, told in enumerate(reports):
        path = tmp_path / f"{number}.png"
        picture.trade_off(told, path)
        assert path.read_bytes().startswith(b"\x89PNG")
