"""What the page says of planted results."""

import math
from pathlib import Path

import pytest

from mica.cli.compare import page, picture
from tests.mica.cli.compare.comparisons import LOSS, SETTINGS, found, gaining

OUTPUT = Path("here")
ONE_SEED = {"names": ("mica", "lora"), "seeds": 1}
NOISY = {"noise": (0.05, 0.02), "names": ("mica", "lora"), "seeds": 2}


@pytest.mark.parametrize(
    ("name", "title"), [("lora", "LoRA"), ("full", "full fine-tuning"), ("mica", "MiCA")]
)
def test_the_best_is_named_and_taken_whatever_it_is(name, title):
    first, last = page.sentences(found(gaining(name, 0.6)), OUTPUT)
    assert first.startswith("At equal forgetting (at most ")
    assert f" {title} learned most, 0." in first
    assert first.count("more than") == 3
    assert "chance" not in first
    assert last == f"Take {title}."


@pytest.mark.parametrize(
    ("planted", "lead", "why"),
    [
        # neither the smallest nor the first is recommended
        ({"noise": (0.05, 0.02)}, " may be chance.", ""),
        # however large it is
        ({"learns": gaining("mica", 9.0), **ONE_SEED}, " ± unknown) may be chance.", "seeds are few or"),
        ({"learns": gaining("mica", 0.2), **NOISY}, "", "seeds are few or differ"),
        ({"learns": gaining("mica", 0.6), "counts": (2, 10)}, " ± unknown) ", "the held-out documents"),
    ],
)
def test_nothing_is_recommended_where_a_lead_may_be_chance(planted, lead, why):
    """But what would decide is said, once for all methods of which that is so."""
    told = found(**planted)
    first, second, *others = page.sentences(told, OUTPUT)
    assert lead in first
    assert "more than" not in first
    assert second.startswith("Undecided between ")
    assert "MiCA" in second
    assert "LoRA" in second
    assert sum("is uncertain mostly because " in line for line in others) == len(others)
    assert any(line.partition("mostly because ")[2].startswith(why) for line in others)
    assert sum(" LoRA" in line for line in others) == 1


def test_the_command_that_adds_seeds_doubles_what_there_is():
    told = found(gaining("mica", 0.2), **NOISY, settings=SETTINGS | {"seeds": 2})
    *_, line = page.sentences(told, OUTPUT)
    assert "`mica compare --output here --resume --budget 60 --seeds 4` adds more" in line


def test_who_forgets_more_does_not_win():
    def forgets(method, rate, step):
        return step * (0.05 if method == "full" else 0.002)

    told = found(gaining("full", 1.0), forgets)
    assert "full fine-tuning learned most" not in page.sentences(told, OUTPUT)[0]
    full, _ = [line for line in page.markdown(told, OUTPUT).splitlines() if line.startswith("| full fine")]
    assert 0 < float(full.split(" | ")[7]) < 0.1  # of its update


def test_where_nothing_is_forgotten_or_learned_that_is_said():
    first, *_ = page.sentences(found(forgets=lambda *at: -0.1), OUTPUT)
    assert first.startswith("Without forgetting any of the retained text, ")
    nothing = found(lambda *at: -0.1)
    assert page.sentences(nothing, OUTPUT) == [
        "No method has learned anything of this text: no loss on held-out text fell."
    ]
    assert "mica adapt" not in page.markdown(nothing, OUTPUT)


def test_perplexities_before_and_after_are_in_the_table():
    told = found(gaining("lora", 0.6))
    text = page.markdown(told, OUTPUT)
    row = told["methods"][0]
    assert f"held-out perplexity (before: {math.exp(LOSS):.2f})" in text
    assert f"retained perplexity (before: {math.exp(LOSS):.2f})" in text
    cells = next(line for line in text.splitlines() if line.startswith("| LoRA | ")).split(" | ")
    assert cells[4] == f"{math.exp(LOSS - row['learned']):.2f}"
    assert cells[5] == f"{math.exp(LOSS + row['forgotten']):.2f}"


@pytest.mark.parametrize("steps", [12, 60])
def test_short_trainings_are_called_short(steps):
    text = page.markdown(found(steps=steps), OUTPUT)
    assert f"All trainings in the table have {steps} steps of 256 tokens." in text
    assert ("are short**: 12 steps" in text) == (steps == 12)


def test_settings_are_on_the_page():
    """Names of files are without the folders of this machine, but for the command, which is to run."""
    paths = {"model": "/home/me/model", "text": ["/home/me/t.txt"], "retain": ["/home/me/r.txt"]}
    told = found(budget=400.0, settings=SETTINGS | paths | {"batch_size": 3})
    text, _, trainings = page.markdown(told, OUTPUT).partition("## The trainings")
    assert "/home/me" not in text
    assert "`r.txt` (documents: 10;" in text
    assert "MiCA has rank 64 and alpha 64, LoRA half of both" in trainings
    assert "linear schedule" in trainings
    (row,) = [row for row in told["methods"] if row["method"] == "mica"]
    line = page.command(told, row)
    assert f"```sh\n{line}\n```" in trainings
    assert "--rank 64 --eval-blocks 64 --model /home/me/model" in line
    assert "--batch-size 3" in line
    assert line.endswith(f"--learning-rate {row['rate']:g} --steps {row['steps']} --output run")


@pytest.mark.parametrize("planted", [{"learns": gaining("lora")}, {"seeds": 1}, {"learns": lambda *at: -0.1}])
def test_pictures(tmp_path, planted):
    """Of methods that are certain, tied, and none at all."""
    picture.trade_off(found(**planted), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
