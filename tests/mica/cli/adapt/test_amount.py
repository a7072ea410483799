"""How much a run reads and how long it takes: what is said is what the Trainer and the run's record have."""

import itertools
import json

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, RandomSampler

from mica.cli.adapt.amount import Amount, Pace, measurements
from tests.support.adapt_runs import Process, command, corpus, run, settings, summary
from tests.support.tiny_cli import TEXT

LENGTH = 32


def rounds(amount: Amount) -> list[int]:
    """Blocks of each forward of an epoch, of all processes together, by what accelerate deals out."""
    shards = []
    for process in range(amount.processes):
        drawn = RandomSampler(range(amount.blocks))
        batches = BatchSampler(drawn, amount.batch_size, drop_last=amount.drops_the_rest)
        if amount.processes > 1:
            batches = BatchSamplerShard(batches, amount.processes, process)
        shards.append([len(batch) for batch in batches])
    assert len({len(shard) for shard in shards}) == 1
    return [sum(sizes) for sizes in zip(*shards, strict=True)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_blocks_of_every_step(processes):
    for blocks, size, accumulation in itertools.product((1, 2, 7, 10, 24), (1, 2, 7, 64), (1, 2, 4, 5)):
        amount = Amount(blocks, LENGTH, size, accumulation, processes)
        read = rounds(amount)
        steps = [sum(read[at : at + accumulation]) for at in range(0, len(read), accumulation)]
        assert amount.epoch_steps == len(steps)
        assert amount.left_out == max(0, blocks - sum(read))
        after = [0, *itertools.accumulate(steps * 3)]
        assert [amount.blocks_after(step) for step in range(len(after))] == after


def test_epochs_are_tokens_over_those_of_all_blocks():
    amount = Amount(10, LENGTH, 2, 4, 1)  # eight blocks, then two
    assert amount.epochs(amount.tokens_after(100)) == 50
    assert Amount(10, LENGTH, 64, 1, 1).epochs(3 * 10 * LENGTH) == 3
    assert Amount(11, LENGTH, 2, 4, 1).epochs(11 * LENGTH) == 1  # one is left out of each epoch


def test_measurements_that_are_ahead():
    for first, last, every in itertools.product(range(13), range(13), (None, 1, 3, 5, 12, 20)):
        measured = {last, *(step for step in range(1, last) if step % (every or last) == 0)}
        expected = sum(first < step <= last for step in measured)
        assert measurements(first, last, every) == expected


def test_the_time_that_is_left():
    pace = Pace()
    assert pace.left(training=10.0, done=5, blocks=20, ahead=3) == 40
    pace.measured(4.0)
    pace.measured(6.0)
    assert pace.measuring == 10
    assert pace.left(training=10.0, done=5, blocks=20, ahead=3) == 55


SHAPES = [  # --batch-size, --gradient-accumulation-steps, --steps or --epochs; the text has 21 blocks
    (64, 1, ["--steps", 3]),
    (4, 8, ["--steps", 3]),
    (64, 1, ["--epochs", 2.5]),
    (8, 1, ["--epochs", 2]),
    (2, 4, ["--steps", 7]),
    (2, 4, ["--epochs", 0.5]),
]


@pytest.mark.parametrize(("size", "accumulation", "end"), SHAPES)
def test_what_is_said_is_what_the_record_has(size, accumulation, end, model_dir, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:700], encoding="utf-8")
    options = ["--batch-size", size, "--gradient-accumulation-steps", accumulation]
    options += ["--config", tmp_path / "options.yaml"]
    flag, value = end
    (tmp_path / "options.yaml").write_text(f"{flag.strip('-')}: {value}\n")
    output = tmp_path / "out"

    argv = ["--model", model_dir, "--text", text, "--output", output, "--rank", 4]
    assert command(*argv, "--sequence-length", LENGTH, *options) == 0
    said = capsys.readouterr().out
    record = summary(output)
    [checkpoint] = output.glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    tokens = state["num_input_tokens_seen"]
    assert record["training_tokens"] == tokens
    assert record["steps"] == state["global_step"]
    assert record["epochs"] == tokens / (LENGTH * record["blocks"])
    assert f"\n{record['steps']} steps, {tokens:,} tokens; 1,920 trained parameters; 0.00 GiB for" in said
    if record["epochs"] > 1:
        assert f"this run sees {record['epochs']:.3g} epochs" in said
    else:
        assert f"this run sees {100 * record['epochs']:.3g} % of an epoch" in said
    assert f"{record['epochs']:.3g} epochs, {tokens:,} tokens, " in said


@pytest.mark.slow
def test_two_processes_read_what_is_said(tmp_path):
    for blocks, size, accumulation in ((10, 2, 2), (3, 2, 1), (11, 1, 4)):
        folder = tmp_path / f"{blocks}"
        folder.mkdir()
        shares = {"batch_size": size, "gradient_accumulation_steps": accumulation}
        args = settings(output=folder / "out", steps=5, **shares)
        started = Process(run, args, corpus(blocks), count=2, folder=folder)
        assert started.join() == [0, 0], started.errors()
        amount = Amount(blocks, LENGTH, size, accumulation, 2)
        assert {done.tokens for done in started.results()} == {amount.tokens_after(5)}
