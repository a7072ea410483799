"""A run that goes on with another number of processes, or another batch, and each step's same blocks."""

import re
import shutil
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from mica.cli import record
from mica.cli.adapt import checkpoints, global_batch, training
from mica.errors import UsageError
from tests.support.adapt_runs import (
    Process,
    command,
    corpus,
    fresh_state,  # noqa: F401 (a fixture)
    losses,
    resume,
    run,
    run_signalled,
    same,
    settings,
    summary,
    unfinished,
    weights,
)
from tests.support.tiny_cli import TEXT, adapt, tiny_llama


def recorded(args, data):
    """What `run` returns, and step -> the first tokens of the blocks that this process trained on."""
    steps = {}
    step = Trainer.training_step

    def training_step(self, model, inputs, *more):
        seen = steps.setdefault(self.state.global_step + 1, [])
        seen += [tuple(row) for row in inputs["input_ids"][:, :8].tolist()]
        return step(self, model, inputs, *more)

    # All checkpoints are kept, to go on from each
    with patch.object(Trainer, "training_step", training_step), patch.object(training, "KEPT", 99):
        return run(args, data), steps


def on_two(function, *arguments, folder: Path, statuses=(0, 0)):
    started = Process(function, *arguments, count=2, folder=folder)
    assert started.join() == list(statuses), started.errors()
    return started


def blocks_of(*processes: dict) -> dict:
    """Step -> the blocks that all processes together trained on, in a fixed order."""
    return {step: sorted(block for each in processes for block in each[step]) for step in processes[0]}


# An epoch has 30 blocks; its last step is short in the first case
ROUNDED = (
    {"batch_size": 2, "gradient_accumulation_steps": 2},
    {"batch_size": 1, "gradient_accumulation_steps": 2},
)
EXACT = ({"batch_size": 1, "gradient_accumulation_steps": 2}, {"batch_size": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "two", "tolerance"), [(*ROUNDED, 1e-6), (*EXACT, 0)], ids=["rounded", "exact"]
)
def test_one_process_then_two_then_one(tmp_path, one, two, tolerance):
    options = {"dropout": 0.0, "steps": 12, "save_steps": 2, "log_steps": 1}
    data = corpus(30)

    def begun(name: str, source: str, step: int, shares: dict):
        """The settings of a run in a folder that has the checkpoint of ``source``."""
        output = tmp_path / name
        folder = f"checkpoint-{step}"
        shutil.copytree(tmp_path / source / folder, output / folder)
        shutil.copy(tmp_path / source / record.FILE, output)
        return settings(output, resume=True, **options, **shares)

    whole, all_steps = recorded(settings(tmp_path / "whole", **options, **one), data)
    (first, mine), (_, theirs) = on_two(
        recorded, begun("two", "whole", 4, two), data, folder=tmp_path
    ).results()
    last, rest = recorded(begun("one", "two", 8, one), data)
    expected = blocks_of(all_steps)
    assert [*expected] == list(range(1, 13))
    assert [len(expected[step]) for step in (7, 8)] == ([4, 2] if tolerance else [2, 2])
    assert blocks_of(mine, theirs) == {step: expected[step] for step in range(5, 13)}
    assert blocks_of(rest) == {step: expected[step] for step in range(9, 13)}
    assert first.processes_from == {"1": 1, "5": 2}
    assert last.processes_from == {"1": 1, "5": 2, "9": 1}
    assert last.tokens == whole.tokens
    assert dict(losses(last)) == pytest.approx(dict(losses(whole)), rel=tolerance, abs=0)
    found = weights(tmp_path / "one")
    unbroken = weights(tmp_path / "whole")
    assert same(found, unbroken) == (not tolerance)
    assert max((found[name] - unbroken[name]).abs().max() for name in found) <= 2e-5

    # The same history with a kill has the same bits
    args = begun("killed", "whole", 4, two)
    on_two(killed, args, data, folder=tmp_path, statuses=(2, -9))
    assert 4 <= checkpoints.step(checkpoints.latest(args.output)) < 12
    on_two(recorded, args, data, folder=tmp_path)
    again, _ = recorded(begun("again", "killed", 8, one), data)
    assert losses(again) == losses(last)
    assert same(weights(tmp_path / "again"), found)


def killed(args, data):
    """The second process is killed when it has read some batches after checkpoint-4."""
    with patch("tests.support.adapt_runs.corpus", lambda: data):
        return run_signalled(args, signal.SIGKILL, [None, 7 + args.gradient_accumulation_steps])


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))


def checkpoint_in(output: Path) -> Path:
    """A checkpoint of step 3 that has a file and no marker."""
    folder = output / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    return folder


FACTS = {
    "processes": 1,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "dropout": 0.0,
    "engine": "NO",
    "steps": 8,
}
ON_TWO = {"processes": 2, "batch_size": 1, "engine": "MULTI_CPU"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (ON_TWO, None),
        ({"batch_size": 1, "gradient_accumulation_steps": 4}, None),
        ({**ON_TWO, "batch_size": 2}, "must stay 4, but is now 8"),
        ({**ON_TWO, "dropout": 0.1}, "--dropout 0.1 would draw different masks"),
        ({**ON_TWO, "engine": "FSDP"}, "FSDP shards the optimiser's state"),
        ({**ON_TWO, "data": "other"}, "checkpoint-3 was written with data here (now other)"),
        # 31 blocks: 30 in rounds of 2, 31 in rounds of 1, 28 of 4
        ({"batch_size": 1, "gradient_accumulation_steps": 4, "blocks": 31}, "get different blocks: proc"),
        ({**ON_TWO, "batch_size": 2, "gradient_accumulation_steps": 1, "blocks": 31}, "must stay 2"),
        ({"batch_size": 1, "gradient_accumulation_steps": 4, "blocks": 33}, None),  # 32 in eight steps
        ({"batch_size": 1, "gradient_accumulation_steps": 4, "blocks": 33, "steps": None}, "must stay 2"),
        ({**ON_TWO, "blocks": 31}, None),
        ({**ON_TWO, "blocks": 1}, "would get different blocks. Continue"),  # the second process gets it too
        ({**ON_TWO, "model": tiny_llama(attention_dropout=0.1)}, "the model's attention_dropout 0.1 would"),
        ({**ON_TWO, "model": tiny_gpt2()}, "the model's resid_pdrop 0.1 would"),
        ({**ON_TWO, "model": tiny_llama(classifier_dropout=0.1)}, None),
    ],
)  # fmt: skip
def test_what_may_differ(tmp_path, changed, reason):
    folder = checkpoint_in(tmp_path)
    given = {name: changed[name] for name in ("blocks", "model") if name in changed}
    now = FACTS | {name: value for name, value in changed.items() if name not in given}
    same = {name: now[name] for name in ("dropout", "steps")}
    checkpoints.mark(folder, step=3, data="here", **FACTS | same)
    if reason is None:
        global_batch.check(folder, now, **given)
    else:
        with pytest.raises(UsageError, match=f"^--resume: .*{re.escape(reason)}") as error:
            global_batch.check(folder, now, **given)
        assert "\n" not in str(error.value)


def test_dropout_inside_a_module_that_no_configuration_names(tmp_path):
    model = tiny_gpt2()
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(model.config, name, 0.0)
    assert "the model's transformer.drop, Dropout(p=0.1" in global_batch._random(model)


def test_sessions(tmp_path):
    assert global_batch.history(None, 2) == {"1": 2}
    folder = checkpoint_in(tmp_path)
    checkpoints.mark(folder, step=3, processes=1)  # of a version that wrote no sessions
    assert global_batch.history(folder, 1) == {"1": 1}
    (folder / checkpoints.MARKER).unlink()
    checkpoints.mark(folder, step=3, processes=1, processes_from={"1": 2, "2": 1})
    assert global_batch.history(folder, 1) == {"1": 2, "2": 1}
    sessions = global_batch.told(global_batch.history(folder, 2))
    assert sessions == "processes: 2 from step 1, 1 from step 2, 2 from step 4"


def test_the_command_goes_on_with_smaller_batches(model_dir, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    assert adapt(model_dir, text, tmp_path / "whole", "--save-steps", 4) == 0
    output = unfinished(tmp_path / "whole", tmp_path / "out")
    again = ["--output", output, "--resume", "--batch-size", 1]
    assert command(*again) == 2
    assert "written with batch_size 2 (now 1): processes x batch" in capsys.readouterr().err
    written = (output / "run.yaml").read_bytes()
    again += ["--gradient-accumulation-steps", 2]
    with patch.object(global_batch, "_random", lambda model: "the model's dice"):
        assert command(*again) == 2
    assert "the model's dice would draw different masks" in capsys.readouterr().err
    assert (output / "run.yaml").read_bytes() == written
    assert command(*again) == 0
    run_yaml = yaml.safe_load((output / "run.yaml").read_text())
    assert (run_yaml["batch_size"], run_yaml["gradient_accumulation_steps"]) == (1, 2)
    found = summary(output)
    expected = summary(tmp_path / "whole")
    assert found["training_loss"] == pytest.approx(expected["training_loss"], rel=1e-6)
    assert found["processes_from"] == {"1": 1}
    for checkpoint in checkpoints.folders(output):
        shutil.rmtree(checkpoint)
    (output / "summary.json").unlink()  # as if killed before its first: it would start from its beginning
    capsys.readouterr()
    assert command("--output", output, "--resume", "--batch-size", 2) == 2
    assert "run.yaml has 1; omit this option" in capsys.readouterr().err
    assert resume(output) == 0
