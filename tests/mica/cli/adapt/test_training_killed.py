"""A run that is killed with SIGKILL at random moments and resumed is the run that was not."""

import random
import shutil
import signal

import pytest
import torch

from mica.cli.adapt import checkpoints
from tests.support.adapt_runs import Process, losses, run, run_signalled, settings, weights

pytestmark = pytest.mark.slow

KILLS = 3
STEPS = 60


@pytest.mark.parametrize("count", [1, 2])
def test_killed_three_times(tmp_path, count):
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown if the test fails
    draw = random.Random(seed)
    options = {"steps": STEPS, "save_steps": 10, "log_steps": 5, "batch_size": 4 // count, "dropout": 0.1}
    # so high a rate that the best step may not be the last
    options |= {"eval_steps": 5, "keep_best": True, "learning_rate": 0.1, "scheduler": "constant"}
    args = settings(tmp_path / "out", **options)
    for step in sorted(draw.sample(range(1, STEPS), KILLS)):
        steps = [None] * count
        steps[draw.randrange(count)] = step
        moment = (steps, draw.uniform(0, 0.03))  # a step takes some 10 ms, a checkpoint as long
        killed = Process(run_signalled, args, signal.SIGKILL, *moment, count=count, folder=tmp_path)
        killed.wait_for_one()
        killed.kill()  # the others, as torchrun does
        assert -9 in killed.join(), killed.errors()
        found = checkpoints.latest(args.output)
        print(f"killed in step {step}, resumes from {found and found.name}")
        assert step - 11 <= (checkpoints.step(found) if found else 0)
        args.resume = found is not None
        if found is None:  # as a user would
            shutil.rmtree(args.output, ignore_errors=True)
    results = []
    for name, given in (("out", args), ("full", settings(tmp_path / "full", **options))):
        (tmp_path / f"{name}-logs").mkdir()
        started = Process(run, given, count=count, folder=tmp_path / f"{name}-logs")
        assert started.join() == [0] * count, started.errors()
        results.append(started.results()[0])
    found, expected = results
    assert len(losses(expected)) == STEPS // 5
    for (step, loss), (resumed_step, resumed_loss) in zip(losses(expected), losses(found), strict=True):
        assert resumed_step == step
        assert resumed_loss == pytest.approx(loss, rel=1e-6)
    assert found.tokens == expected.tokens
    assert found.adapter_step == expected.adapter_step
    whole = weights(tmp_path / "full")
    resumed = weights(tmp_path / "out")
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0.0 if "lora_B" in name else 1e-6)
