"""Two gloo processes as torchrun would start them: what one does, all know, and one speaks."""

import os
import platform
import shutil
import signal
from unittest.mock import Mock

import datasets
import pytest
import torch
from peft import PeftModel

from mica.cli.adapt import checkpoints, processes, tokens
from mica.cli.adapt.methods import METHODS
from mica.cli.adapt.sources import find
from mica.errors import UsageError
from tests.support.adapt_runs import (
    corpus,
    fresh_state,  # noqa: F401 (a fixture)
    in_two_processes,
    losses,
    run,
    run_sharded,
    run_signalled,
    same,
    same_weights,
    settings,
    weights,
)
from tests.support.processes import printed_by
from tests.support.tiny_cli import byte_tokenizer, logits, tiny_llama

pytestmark = pytest.mark.slow


def check_losses(found, expected, rel=1e-6):
    assert dict(losses(found)) == pytest.approx(dict(losses(expected)), rel=rel)


def fail(failing):
    state = processes.start()
    if state.process_index in failing:
        raise UsageError("--text x.csv: no")
    processes.on_main(print)


@pytest.mark.parametrize("failing", [[0, 1], [0], [1]])
def test_an_error_is_printed_once(tmp_path, failing):
    errors = in_two_processes(fail, failing, folder=tmp_path, statuses=(2, 2)).errors
    assert errors == "error: --text x.csv: no\n"


def cannot_cache(path):
    datasets.config.HF_DATASETS_CACHE = path.parent
    if processes.start().is_main_process:
        datasets.Dataset.from_generator = Mock(side_effect=OSError(28, "No space left on device"))
    [source] = find("--text", [path])
    tokens.tokenize(source, byte_tokenizer())


def test_an_error_that_all_know_may_be_told_in_other_words(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    errors = in_two_processes(cannot_cache, tmp_path / "a.txt", folder=tmp_path, statuses=(2, 2)).errors
    assert errors.endswith(f"tokens cannot be cached in {tmp_path}: No space left on device\n")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_as_one_with_twice_the_batch(tmp_path, method):
    options = {"method": method, "dropout": 0.0, "steps": 12, "eval_steps": 6}
    data = corpus(30, retain=3)  # of an epoch's 30 blocks, 28 make whole batches
    alone = run(settings(tmp_path / "one", **options), data)
    both = settings(tmp_path / "two", batch_size=2, **options)
    first, second = in_two_processes(run, both, data, folder=tmp_path).results
    assert first.history[:1] == second.history[:1]
    assert losses(first) == losses(second)
    check_losses(first, alone)
    for name in ("eval_held_out_perplexity", "eval_retain_perplexity"):
        expected = [entry[name] for entry in alone.history if name in entry]
        assert [entry[name] for entry in first.history if name in entry] == pytest.approx(expected, rel=1e-6)
        assert len(expected) == 3
    assert first.tokens == second.tokens == alone.tokens
    one, other = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, weight in one.items():
        assert (weight - other[name]).abs().max() <= 1e-6 * weight.abs().max()
    errors = (tmp_path / "stderr-1").read_text()
    assert not [line for line in errors.splitlines() if "step" in line or "warn" in line.lower()]


def test_a_signal_stops_both_at_one_step(tmp_path):
    signum = signal.SIGTERM
    args = settings(tmp_path / "out", batch_size=2, save_steps=100)
    started = in_two_processes(run_signalled, args, signum, 0, 4, folder=tmp_path)
    first, second = started.results
    assert first.interrupted == second.interrupted == signum
    assert first.steps == second.steps < 8
    assert checkpoints.latest(args.output) == args.output / f"checkpoint-{first.steps}"
    assert started.errors.count("finishing this step") == 1
    args.resume = True
    assert [result.steps for result in in_two_processes(run, args, folder=tmp_path).results] == [10, 10]


def full_disk(args):
    """`run`, where the optimiser's or another process's state cannot be written."""
    rank = int(os.environ["RANK"])
    save = torch.save

    def failing(value, path, *more, **options):
        if str(path).endswith("checkpoint-10/rng_state_1.pth") and rank == 1:
            raise OSError(28, "No space left on device")
        return save(value, path, *more, **options)

    torch.save = failing
    return run(args)


def test_what_one_process_cannot_write_stops_both(tmp_path):
    args = settings(tmp_path / "out", batch_size=2)
    errors = in_two_processes(full_disk, args, folder=tmp_path, statuses=(2, 2)).errors
    (line,) = [line for line in errors.splitlines() if "error" in line]
    assert "checkpoint-10 cannot be written: No space left on device; the last complete checkpoint is" in line
    assert [path.name for path in checkpoints.folders(args.output)] == ["checkpoint-5"]


def test_a_lost_process_is_one_line_and_costs_nothing_but_time(tmp_path):
    options = {"batch_size": 2, "dropout": 0.1, "eval_steps": 4, "keep_best": True}
    args = settings(tmp_path / "out", **options)
    errors = in_two_processes(
        run_signalled, args, signal.SIGKILL, 1, 8, folder=tmp_path, statuses=(2, -9)
    ).errors
    assert errors.splitlines()[-1] == (
        f"error: another process died; the last complete checkpoint is {args.output}/checkpoint-5 "
        "(--resume continues from it)"
    )
    assert "Traceback" not in errors
    args.resume = True
    resumed = in_two_processes(run, args, folder=tmp_path).results[0]
    whole = in_two_processes(run, settings(tmp_path / "whole", **options), folder=tmp_path).results[0]
    check_losses(resumed, whole)
    assert (resumed.tokens, resumed.adapter_step) == (whole.tokens, whole.adapter_step)
    for name, weight in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(args.output)[name], weight, rtol=0, atol=1e-6)


def test_all_stop_at_the_same_step_and_the_best_is_written(tmp_path):
    """On four blocks by heart, so that the held-out ones get worse from the start."""
    options = {
        "dropout": 0.0,
        "learning_rate": 0.1,
        "scheduler": "constant",
        "eval_steps": 1,
        "patience": 2,
        "keep_best": True,
    }
    args = settings(tmp_path / "out", batch_size=2, **options)
    results = in_two_processes(run, args, corpus(4), folder=tmp_path).results
    results.append(run(settings(tmp_path / "one", **options), corpus(4)))
    assert [(result.steps, result.adapter_step) for result in results] == [(2, 1)] * 3
    assert same_weights(args.output, args.output / "checkpoint-1")


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("more", [{}, {"train_embeddings": True, "embedding_learning_rate": 1e-3}])
def test_fsdp2(tmp_path, kind, more):
    """The last checkpoint follows an evaluation, which leaves the output layer unsharded."""
    args = settings(tmp_path / "out", batch_size=2, dropout=0.0, eval_steps=5, **more)
    whole = in_two_processes(run_sharded, kind, args, folder=tmp_path).results[0]
    assert checkpoints.facts(args.output / "checkpoint-10")["engine"] == "FSDP"
    alone = run(settings(tmp_path / "one", dropout=0.0, eval_steps=5, **more))
    check_losses(whole, alone, 1e-4 if more else 1e-6)
    adapter = weights(args.output)
    shapes = [{name: w.shape for name, w in found.items()} for found in (adapter, weights(tmp_path / "one"))]
    assert shapes[0] == shapes[1]
    loaded, expected = (
        logits(PeftModel.from_pretrained(tiny_llama(), folder)) for folder in (args.output, tmp_path / "one")
    )
    torch.testing.assert_close(loaded, expected, **({"rtol": 1e-3, "atol": 1e-3} if more else {}))

    shutil.rmtree(args.output / "checkpoint-10")  # as if the run had been killed before it
    args.resume = True
    resumed = in_two_processes(run_sharded, kind, args, folder=tmp_path).results[0]
    assert losses(resumed) == losses(whole)
    assert same(weights(args.output), adapter)


FAULTS = """
import resource
import torch
from mica.cli.adapt import processes

processes.keep_freed_memory()
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MB, which glibc would give back at once
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_what_a_step_has_freed_serves_the_next_one():
    """Of 16,384 pages."""
    assert int(printed_by(FAULTS)) < 100
