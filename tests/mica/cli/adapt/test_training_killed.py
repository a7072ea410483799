"""A run that is killed with SIGKILL at random moments and resumed is the run that was not."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mica.cli.adapt import checkpoints
from tests.support.adapt_runs import Process, run, run_and_die
from tests.support.adapt_settings import settings

KILLS, STEPS = 5, 200


def losses(result):
    return [(entry["step"], entry["loss"]) for entry in result.history if "loss" in entry]


@pytest.mark.parametrize("count", [1, 2])
def test_killed_five_times(tmp_path, count):
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown if the test fails
    draw = random.Random(seed)
    options = {"steps": STEPS, "save_steps": 20, "log_steps": 10, "batch_size": 4 // count, "dropout": 0.1}
    args = settings(tmp_path / "out", **options)
    for step in sorted(draw.sample(range(1, STEPS), KILLS)):
        # a step takes some 10 ms, a checkpoint as long
        killed = Process(
            run_and_die,
            args,
            step,
            draw.uniform(0, 0.03),
            draw.randrange(count),
            count=count,
            folder=tmp_path,
        )
        killed.wait_for_one()
        killed.kill()  # the others, as torchrun does
        assert -9 in killed.join(), killed.errors()
        found = checkpoints.latest(args.output)
        print(f"killed in step {step}, resumes from {found and found.name}")
        assert step - 21 <= (checkpoints.step(found) if found else 0)
        args.resume = found is not None
        if found is None:  # as a user would
            shutil.rmtree(args.output, ignore_errors=True)
    resumed = Process(run, args, count=count, folder=tmp_path)
    assert resumed.join() == [0] * count, resumed.errors()

    unbroken_folder = tmp_path / "unbroken"
    unbroken_folder.mkdir()
    unbroken = Process(run, settings(tmp_path / "full", **options), count=count, folder=unbroken_folder)
    assert unbroken.join() == [0] * count, unbroken.errors()
    expected, found = unbroken.results()[0], resumed.results()[0]
    assert len(losses(expected)) == STEPS // 10
    for (step, loss), (resumed_step, resumed_loss) in zip(losses(expected), losses(found), strict=True):
        assert resumed_step == step
        assert resumed_loss == pytest.approx(loss, rel=1e-6)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.tokens == expected.tokens
    weights, resumed_weights = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("full", "out")
    )
    assert weights.keys() == resumed_weights.keys()
    for name, weight in weights.items():
        if "lora_B" in name:
            assert torch.equal(weight, resumed_weights[name])
        else:
            torch.testing.assert_close(resumed_weights[name], weight, rtol=0, atol=1e-6)
