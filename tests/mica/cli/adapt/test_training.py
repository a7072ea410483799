"""The training loop on a tiny Llama, in process: settings, checkpoints, and what stops a run."""

import io
import pickle
import shutil
import signal
import zipfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError

from mica.cli.adapt import callbacks, checkpoints, trainer, training
from mica.cli.record import NAME
from mica.errors import UsageError
from tests.support.adapt_runs import (
    corpus,
    fresh_state,  # noqa: F401
    losses,
    model,
    run,
    same_weights,
    settings,
    train,
    weights,
)
from tests.support.faults import FULL
from tests.support.tiny_cli import logits, tiny_llama


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of ten steps with a log for each, and its folder."""
    folder = tmp_path_factory.mktemp("unbroken")
    return run(settings(folder, log_steps=1)), folder


def test_a_run(tmp_path, capsys):
    args = settings(tmp_path, eval_steps=4)
    trained = model(args)
    before = trained.get_base_model().config.use_cache
    result = train(trained, corpus(retain=3), args)
    assert trained.get_base_model().config.use_cache is before is True  # a merged model is made from it
    written = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    torch.testing.assert_close(written, logits(trained))
    assert (written - logits(tiny_llama())).abs().max() > 0.01
    assert [step for step, _ in losses(result)] == [4, 5, 8, 10]
    evaluated = [entry for entry in result.history if "eval_held_out_perplexity" in entry]
    assert [entry["step"] for entry in evaluated] == [0, 4, 8, 10]
    assert evaluated[-1]["eval_held_out_loss"] < evaluated[0]["eval_held_out_loss"]
    assert (result.steps, result.tokens, result.interrupted) == (10, 10 * 4 * 32, 0)
    assert 0 < result.seconds < 60
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-10"
    top = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert top == {"adapter_config.json", "adapter_model.safetensors", NAME}
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line for line in lines if "loss " not in line] == [
        f"step {entry['step']}/10: held-out perplexity {entry['eval_held_out_perplexity']:.2f}, "
        f"retained perplexity {entry['eval_retain_perplexity']:.2f}"
        for entry in evaluated
    ]


def test_settings_reach_the_trainer(tmp_path):
    changed = settings(
        tmp_path,
        scheduler="linear",
        optimizer="adafactor",
        weight_decay=0.3,
        max_grad_norm=0.7,
        seed=9,
        learning_rate=1e-4,
        log_steps=7,
        warmup_ratio=0.1,
    )
    args = trainer.training_arguments(changed, blocks=1)
    assert (args.lr_scheduler_type.value, args.optim.value) == ("linear", "adafactor")
    assert (args.get_warmup_steps(15), args.data_seed) == (2, 9)
    assert (args.weight_decay, args.max_grad_norm, args.seed, args.learning_rate) == (0.3, 0.7, 9, 1e-4)
    assert (args.logging_steps, args.logging_nan_inf_filter) == (7, False)


def test_zero_3_is_refused(tmp_path, monkeypatch):
    arguments = trainer.training_arguments(settings(tmp_path), blocks=1)
    monkeypatch.setattr(training, "training_arguments", lambda *_, **__: arguments)
    arguments.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    training.check(settings(tmp_path))
    arguments.deepspeed_plugin.zero_stage = 3
    with pytest.raises(UsageError, match="ZeRO-3 shards the adapter: set zero_stage: 2"):
        training.check(settings(tmp_path))


def disturbed(monkeypatch, step, act, args):
    """`run`, where ``act(model)`` is done in the midst of a step: the weights have changed already."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == step - 1:
            act(model)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Hooks, "on_optimizer_step", on_optimizer_step)
        return run(args)


def poison(model):
    """Make a weight, and so the next loss, NaN."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained[0].data[0] = float("nan")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(unbroken, tmp_path, monkeypatch, capfd, signum):
    args = settings(tmp_path, log_steps=1)
    result = disturbed(monkeypatch, 7, lambda model: signal.raise_signal(signum), args)
    assert (result.interrupted, result.steps) == (signum, 7)
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-7"
    assert not (tmp_path / "adapter_model.safetensors").exists()
    announced = f"mica adapt: {signum.name}: finishing this step and saving a checkpoint"
    assert capfd.readouterr().err.count(announced) == 1
    args.resume = True
    assert losses(run(args)) == losses(unbroken[0])
    assert same_weights(tmp_path, unbroken[1])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"dtype": "bfloat16", "target_modules": "embed_tokens,q_proj", "gradient_checkpointing": True},
        {"steps": None, "epochs": 3.0, "save_steps": 16},  # at the end of an epoch
        {"steps": None, "epochs": 2.0, "save_steps": 4, "batch_size": 2, "gradient_accumulation_steps": 3},
    ],
    ids=["float32", "bfloat16", "epochs", "accumulation"],
)
def test_resumed_is_unbroken(tmp_path, output, changed):
    changed = {"steps": 12, "save_steps": 6, **changed}
    full = tmp_path / "full"
    unbroken = run(settings(full, **changed))
    kept = checkpoints.folders(full)[0]
    assert 0 < checkpoints.step(kept) < unbroken.steps
    assert all("lora_" in name for name in weights(kept))  # and nothing of the base
    assert not (kept / "training_args.bin").exists()
    shutil.copytree(kept, output / kept.name)  # as if the run had been killed right after it
    half = output / kept.name.replace(str(checkpoints.step(kept)), "1")
    half.mkdir()  # killed as it was written
    begun = checkpoints.facts(kept)["seconds"]
    resumed = run(settings(output, resume=True, **changed))
    assert losses(resumed) == losses(unbroken)
    assert [e["step"] for e in resumed.history] == [e["step"] for e in unbroken.history]
    assert (resumed.steps, resumed.tokens) == (unbroken.steps, unbroken.tokens)
    assert resumed.seconds > begun
    assert same_weights(full, output)
    assert not half.exists()


def test_a_finished_run_without_checkpoints_does_not_start_anew(tmp_path):
    (tmp_path / "summary.json").touch()
    with pytest.raises(UsageError, match="it has no checkpoint"):
        training.find_checkpoint(settings(tmp_path, resume=True))


@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(_repacked(path.read_bytes())),
        Path.unlink,  # transformers goes on without most of them
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_named(unbroken, tmp_path, file, damage):
    shutil.copytree(unbroken[1], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-5" / file
    shutil.rmtree(tmp_path / "checkpoint-10")
    damage(path)
    said = rf"^--resume: {path.parent} cannot be read \(.*\): remove it, and the run continues from the one"
    with pytest.raises(UsageError, match=said) as refusal:
        run(settings(tmp_path, log_steps=1, resume=True))
    assert "weights_only" not in str(refusal.value)
    if damage is Path.unlink:
        assert f"({file} is missing)" in str(refusal.value)
    elif file != "trainer_state.json":
        assert "is damaged" in str(refusal.value)


def _repacked(content: bytes) -> bytes:
    """A whole archive, but not one of torch's; other files are cut."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Path()))
        archive.writestr("archive/version", "3")
    return packed.getvalue() if content.startswith(b"PK") else content[:100]


@pytest.mark.parametrize(
    ("changed", "environment", "processes", "said"),
    [
        ({"recipe": "all-linear"}, "no", 1, r"with recipe paper \(now all-linear\)"),
        ({}, "no", 2, r"with processes 1 \(now 2\)"),
        ({}, "bf16", 1, r"with mixed_precision no \(now bf16\)"),
    ],
)
def test_another_training_is_refused(unbroken, monkeypatch, changed, environment, processes, said):
    training.processes.start()
    args = settings(unbroken[1], log_steps=1, resume=True)
    assert training.find_checkpoint(args) == unbroken[1] / "checkpoint-10"
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", environment)
        patch.setitem(training.PartialState._shared_state, "num_processes", processes)
        with pytest.raises(UsageError, match=said):
            training.find_checkpoint(settings(unbroken[1], resume=True, **changed))


def test_other_texts_are_refused(unbroken):
    other = corpus()
    other.fingerprint = "other tokens"
    for data, message in (
        (corpus(63), r"with data 64 blocks \(.*\) \(now 63 blocks"),
        (other, "checkpoint-10 was written with data"),
        (corpus(retain=3), r"with retain None \(now some 3\)"),
    ):
        with pytest.raises(UsageError, match=message):
            run(settings(unbroken[1], log_steps=1, resume=True), data)


SAVING = ".adapter.partial"
DENIED = PermissionError(13, "Permission denied")
SAFETENSORS = SafetensorError("I/O error: No space left (os error 28)")
WRITER = RuntimeError(
    "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"
)


def failing(original, error, part):
    """``original``, but its calls with ``part`` in an argument fail: in a checkpoint from the second on."""
    calls = []

    def call(*args, **kwargs):
        if any(part in str(value) for value in args if isinstance(value, str | Path)):
            calls.append(args)
            if len(calls) > (part != SAVING):
                raise error
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("where", "name", "error", "part"),
    [
        ("peft.peft_model", "safe_save_file", FULL, SAVING),
        ("peft.peft_model", "safe_save_file", SAFETENSORS, "checkpoint"),
        ("torch", "save", WRITER, "optimizer.pt"),
        ("mica.cli.adapt.checkpoints", "finish", DENIED, ""),
    ],
)
def test_what_cannot_be_written_leaves_the_checkpoint_before(tmp_path, monkeypatch, where, name, error, part):
    what, step = ("the adapter", 10) if part == SAVING else ("checkpoint-10", 5)
    where = import_module(where)
    full = type("usage", (), {"free": 0})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: full)
        patch.setattr(where, name, failing(getattr(where, name), error, part))
        with pytest.raises(UsageError) as raised:
            run(settings(tmp_path))
    reason = "Permission denied" if error is DENIED else "No space left on device"
    assert str(raised.value) == (
        f"--output {tmp_path}: {what} cannot be written: {reason}; the last complete checkpoint is "
        f"{tmp_path}/checkpoint-{step} (--resume continues from it)"
    )
    assert checkpoints.step(checkpoints.folders(tmp_path)[-1]) == step


@pytest.mark.parametrize(
    ("step", "saved", "what"),
    [
        (7, "the last complete checkpoint is {}/checkpoint-5 (--resume continues", "a trained weight"),
        (5, "nothing was saved", "a trained weight"),  # in the very step that saves
        (6, "the last complete checkpoint is {}/checkpoint-5", "the training loss is not finite (nan)"),
    ],
)
def test_nothing_that_is_not_finite_is_saved(tmp_path, monkeypatch, step, saved, what):
    args = settings(tmp_path, log_steps=7 if "loss" in what else 100)
    with pytest.raises(UsageError) as raised:
        disturbed(monkeypatch, step, poison, args)
    message = str(raised.value)
    assert what in message
    assert saved.format(tmp_path) in message
    assert "lower --learning-rate (now 0.005) or --dtype float32" in message
    good = checkpoints.latest(tmp_path)
    assert good is None or all(tensor.isfinite().all() for tensor in weights(good).values())
    assert all(checkpoints.facts(path) is not None for path in checkpoints.folders(tmp_path))
