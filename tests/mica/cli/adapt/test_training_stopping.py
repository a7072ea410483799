"""The best step and early stopping, with perplexities that are made up, step by step."""

import json
import math
import os
import signal

import pytest
import torch
from peft import PeftModel

from mica.cli.adapt import evaluation, stopping, training
from mica.cli.adapt.evaluation import Likelihood
from mica.errors import UsageError
from tests.support.adapt_runs import (
    corpus,
    fresh_state,  # noqa: F401
    losses,
    model,
    resume,
    run,
    same,
    same_weights,
    settings,
    steps,
    summary,
    train,
    weights,
)
from tests.support.tiny_cli import adapt, logits, tiny_llama

# Checkpoints are at 3, 6, 9 and 10, and where it is best. Two are as good: the first counts.
HELD_OUT = {0: 9.0, 2: 8.0, 4: 7.0, 6: 7.5, 8: 7.0, 10: 7.25}
PATIENCE = "--patience 2: no lower held-out perplexity than the"
OPTIONS = {"eval_steps": 2, "save_steps": 3, "log_steps": 3}


def history(held_out):
    entries = [{"step": step, "eval_held_out_perplexity": value} for step, value in held_out.items()]
    return [{"step": 1, "loss": 2.0}, *entries]


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        (HELD_OUT, 4),
        ({0: 1.0, 5: 3.0, 10: 2.0}, 10),  # before training is no step
        ({0: 1.0}, None),
    ],
)
def test_the_best_step(held_out, expected):
    assert stopping.best(history(held_out), settings(keep_best=True)) == expected


@pytest.mark.parametrize(
    ("held_out", "patience", "expected"),
    [
        ([9, 8, 8], 2, None),
        ([9, 8, 8, 8.5], 2, f"{PATIENCE} 8.00 of step 1"),
        ([9, 10, 9.5], 2, f"{PATIENCE} 9.00 of step 0"),
        ([], 1, None),
        ([9, 10, 11], None, None),
    ],
)
def test_the_reason_to_stop(held_out, patience, expected):
    assert stopping.reason(history(dict(enumerate(held_out))), settings(patience=patience)) == expected


@pytest.fixture
def scripted(monkeypatch):
    """``scripted(held_out, retain, act)``: what is measured at a step, and what happens then."""

    def script(held_out=HELD_OUT, retain=None, act=None):
        build = training.build_trainer

        def built(*given):
            trainer = build(*given)

            def likelihood(model, blocks, *_):
                step = trainer.state.global_step
                if step in (act or {}):
                    act.pop(step)()
                perplexities = held_out if blocks is trainer.sets["held_out"] else retain
                return Likelihood(math.log(perplexities[step]), 1)

            monkeypatch.setattr(evaluation, "likelihood", likelihood)
            return trainer

        monkeypatch.setattr(training, "build_trainer", built)

    return script


@pytest.mark.parametrize("more", [{}, {"train_embeddings": True, "embedding_learning_rate": 1e-3}])
def test_the_adapter_is_that_of_the_best_step(scripted, tmp_path, more):
    scripted()
    args = settings(tmp_path / "best", **OPTIONS, **more, keep_best=True)
    trained = model(args)
    result = train(trained, corpus(), args)
    assert (result.steps, result.adapter_step, result.stopped_by) == (10, 4, None)
    assert steps(args.output) == [4, 9, 10]
    kept = weights(args.output / "checkpoint-4")
    assert same(weights(args.output), kept)
    assert torch.equal(logits(trained), logits(PeftModel.from_pretrained(tiny_llama(), args.output)))
    assert all(w.requires_grad for name, w in trained.named_parameters() if "lora_A" in name)

    last = run(settings(tmp_path / "last", **OPTIONS, **more))  # trained alike
    assert (last.adapter_step, steps(tmp_path / "last")) == (10, [9, 10])
    assert same_weights(tmp_path / "last", args.output / "checkpoint-10")
    assert not same(weights(tmp_path / "last"), kept)
    # a log closes the mean before each measurement, as that may become a checkpoint
    assert [step for step, _ in losses(result)] == [2, 3, 4, 6, 8, 9, 10]


@pytest.mark.parametrize("signums", [[signal.SIGTERM], [signal.SIGINT] * 2])
@pytest.mark.parametrize("at", [6, 8])
def test_resumed_it_has_the_same_best_and_ends_alike(scripted, tmp_path, signums, at):
    """8 is where the patience ends."""
    options = OPTIONS | {"save_steps": 100, "keep_best": True, "patience": 2}
    held_out = HELD_OUT | {6: 7.5, 8: 7.1}
    scripted(held_out)
    unbroken = run(settings(tmp_path / "full", **options))
    assert (unbroken.steps, unbroken.adapter_step) == (8, 4)
    assert unbroken.stopped_by == f"{PATIENCE} 7.00 of step 4"
    args = settings(tmp_path / "out", **options)
    scripted(held_out, act={at: lambda: [os.kill(os.getpid(), signum) for signum in signums]})
    if len(signums) == 1:
        assert run(args).interrupted
    else:
        with pytest.raises(KeyboardInterrupt):
            run(args)
    assert 4 in steps(args.output)
    assert not (args.output / "adapter_model.safetensors").exists()
    args.resume = True
    resumed = run(args)
    assert (resumed.steps, resumed.adapter_step, resumed.stopped_by) == (8, 4, unbroken.stopped_by)
    assert stopping.measured(resumed.history) == stopping.measured(unbroken.history)
    assert same_weights(args.output, tmp_path / "full")
    assert same_weights(args.output / "checkpoint-8", tmp_path / "full" / "checkpoint-8")


def test_a_run_that_had_ended_is_not_trained_on(scripted, tmp_path, capsys):
    scripted()
    options = OPTIONS | {"save_steps": 4}
    args = settings(tmp_path / "out", **options, patience=1)  # without keep_best: the last
    ended = run(args)
    assert (ended.steps, ended.adapter_step, steps(args.output)) == (6, 6, [4, 6])
    said = [line for line in capsys.readouterr().err.splitlines() if "stopping" in line]
    assert said == [f"step 6/10: stopping, {ended.stopped_by}"]
    before = weights(args.output)
    args.resume = True
    assert run(args)._replace(seconds=0) == ended._replace(seconds=0)
    assert same(weights(args.output), before)

    args.patience, args.eval_steps = 3, 5  # what --resume may change counts from here on
    gone_on = run(args)
    assert [*stopping.measured(gone_on.history)] == [0, 2, 4, 6, 10]
    assert (gone_on.steps, run(settings(tmp_path / "full", **options)).steps) == (10, 10)
    assert same_weights(args.output, tmp_path / "full")


def test_a_best_step_that_is_gone(scripted, tmp_path):
    scripted(act={8: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    args = settings(tmp_path, **OPTIONS, keep_best=True)
    assert run(args).interrupted
    args.resume = True
    (tmp_path / "checkpoint-4" / "complete.json").unlink()
    with pytest.raises(UsageError) as raised:
        run(args)
    assert str(raised.value) == (
        "--keep-best: checkpoint-4, which holds the best step, is missing or incomplete; the last complete "
        f"checkpoint is {tmp_path}/checkpoint-10 (--resume continues from it); "
        "--resume --no-keep-best uses the last step instead"
    )
    assert not (tmp_path / "adapter_model.safetensors").exists()
    args.keep_best = False
    assert run(args).adapter_step == 10
    assert same_weights(tmp_path, tmp_path / "checkpoint-10")


def test_summary_card_and_adapter_are_of_the_best_step(scripted, model_dir, text_file, output, capsys):
    scripted({0: 9.0, 3: 8.0, 6: 8.5, 9: 8.25}, {0: 20.0, 3: 19.0, 6: 18.0, 9: 17.0})
    options = "--eval-steps 3 --patience 2 --retain"
    assert adapt(model_dir, text_file, output, options, text_file) == 0
    made = summary(output)
    why = f"{PATIENCE} 8.00 of step 3"
    assert (made["steps"], made["adapter_step"], made["stopped_by"]) == (9, 3, why)
    assert made["settings"]["keep_best"] is True  # by --patience
    measured = [made[f"{name}_{when}"] for name in ("perplexity", "retain") for when in ("before", "after")]
    assert measured == pytest.approx([9.0, 8.0, 20.0, 19.0])
    said = f"of step 3, the best of those measured; stopped after step 9 by {why}"
    assert said in capsys.readouterr().out
    assert f"\n\nThe adapter is {said}.\n" in (output / "README.md").read_text()
    assert same_weights(output, output / "checkpoint-3")
    assert resume(output) == 0
    assert summary(output)["adapter_step"] == 3
    state = output / "checkpoint-9" / "trainer_state.json"
    assert json.loads(state.read_text())["max_steps"] == 12
