"""What the page says of planted results."""

import math

from mica.cli.compare import page, settings
from tests.mica.cli.compare.comparisons import LOSS, SIZES, WORLD, World, comparison, simulate

GIVEN = {"model": "/home/me/a model", "text": ["/home/me/t.txt"], "retain": ["/home/me/r.txt"]}
ARGS = settings.of_mica_adapt(settings.DEFAULTS | {"sequence_length": 128} | GIVEN, "unused").args
FACTS = vars(ARGS) | SIZES | {"dtype": "float32", "blocks": 800}


def done(world=WORLD, **more):
    asked = comparison(**more)
    simulate(asked, world=world)
    return asked


def cells(text, start):
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {start} "))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[first : first + 4]]


def test_each_method_has_a_row_of_means_and_one_a_seed():
    asked = done()
    mean, *seeds = cells(page.table(asked), "MiCA")
    assert mean[:4] == ["MiCA", "9,600,000", "0.002", "mean"]
    assert [row[:4] for row in seeds] == [["", "", "", str(seed)] for seed in range(3)]
    found = asked.found()["mica"]
    for row, (learned, forgotten) in zip([mean, *seeds], [found.each.mean(axis=0), *found.each], strict=True):
        losses = LOSS - learned, LOSS + forgotten
        assert row[4:6] == [f"{learned:.3f}", f"{forgotten:.3f}"]
        assert row[6:] == [f"{math.exp(loss):.2f}" for loss in losses]
    assert f"test perplexity (before: {math.exp(LOSS):.2f})" in page.table(asked)


def test_how_far_seeds_and_documents_vary_is_said():
    learned, forgotten, caution = page.spread(done(World(between_seeds=0.02)))
    seeds = [found.each[:, 0] for found in done(World(between_seeds=0.02)).found().values()]
    widest = max(one.max() - one.min() for one in seeds)
    assert f"What was learned differs by up to {widest:.3f} between seeds of one method." in learned
    assert "standard error of up to 0.000 over the documents, of which there are 9" in learned
    assert "What was forgotten differs by up to 0.000 between seeds" in forgotten
    assert "of which there are 5." in forgotten
    assert "not larger than both of these can come from seeds or documents alone: it means nothing" in caution


def test_of_one_seed_and_one_method_nothing_is_known():
    learned, *_ = page.spread(done(seeds=1, names=("mica",)))
    assert learned.count("an unknown amount") == 2


def test_how_the_trainings_were_is_on_the_page():
    """Names of files are without the folders of this machine, but for the command, which is to run."""
    asked = done(rates=(1e-3, 2e-3))
    text, _, again = page.markdown(asked, FACTS).partition("To train with an adapter again")
    assert "/home/me" not in text
    assert "on `t.txt`" in text
    assert f"All have {asked.steps()} steps of 256 tokens" in text
    for rate, end in asked.found()["full"].curve.items():
        assert "| full fine-tuning | {:g} | {:.3f} | {:.3f} |".format(rate, *end.means) in text
    start = (
        "mica adapt --method mica --model '/home/me/a model' --text /home/me/t.txt --retain /home/me/r.txt "
    )
    assert start in again
    assert "--rank 32 --alpha 32 " in again.splitlines()[4]  # LoRA's
    assert f"--learning-rate 0.002 --steps {asked.steps()} --output lora" in again
    assert "mica adapt" not in page.markdown(done(names=("full",)), FACTS)
