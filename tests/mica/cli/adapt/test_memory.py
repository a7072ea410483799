"""``mica adapt --memory``: the fewest layers are checkpointed, which changes no bit of what is trained."""

import pytest
import torch
from transformers import AutoConfig

from mica.cli.adapt import memory, training
from mica.cli.fits import GIB, count_step
from mica.errors import UsageError
from tests.support.adapt_runs import adapter_settings, same_weights
from tests.support.tiny_cli import adapt


@pytest.fixture
def args(model_dir):
    return adapter_settings(model=str(model_dir), method="lora", dropout=0.1)


@pytest.fixture
def totals(args):
    """GiB that a step takes with 0, 1 and 2 of its layers checkpointed."""
    counted = count_step(memory._setup(args), memory._options(args, None))
    return [counted.row(number)["total_bytes"] / GIB for number in range(3)]


def test_the_fewest_layers_with_which_a_step_fits(args, totals, model_dir):
    config = AutoConfig.from_pretrained(model_dir)
    for number, total in enumerate(totals):
        args.memory = total
        assert memory.plan(args, config) == (number, 2, round(total * GIB))
    args.memory = totals[2] / 1.01
    with pytest.raises(UsageError, match="even with all 2 layers checkpointed; lower --sequence-length"):
        memory.plan(args, config)


@pytest.mark.parametrize(("free", "number"), [(1.0, 2), (1.06, 1)])
def test_auto_is_what_the_gpu_has_left(args, totals, monkeypatch, free, number):
    args.memory = "auto"
    with pytest.raises(UsageError, match="there is no GPU to ask"):
        memory.plan(args, None)
    monkeypatch.setattr(memory, "find_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * totals[1] * GIB, 0))
    assert memory.plan(args, None).number == number


def test_what_is_counted_is_what_is_trained(args):
    args.quantize, args.dtype, args.sequence_length = "nf4", "bfloat16", 64
    options = memory._options(args, None)
    assert (options.bits, options.dtype, options.tokens, options.loss) == (4, "bfloat16", 64, "logits")
    args.method = "dora"
    config = {"init_lora_weights": True, "use_dora": True}
    assert memory._setup(args)[1:] == (config, True, "norms", True)
    args.train_embeddings = True
    with pytest.raises(UsageError, match="trained embeddings are not counted"):
        memory.plan(args, None)


def test_a_run(model_dir, text_file, tmp_path, totals, monkeypatch, capsys):
    flags = []
    checkpoint_first = training.checkpoint_first

    def watched(model, number):
        checkpoint_first(model, number)
        flags.extend(layer.gradient_checkpointing for layer in model.model.layers)

    monkeypatch.setattr(training, "checkpoint_first", watched)
    shared = "--method lora --dropout 0.1 --batch-size 4 --target-modules q_proj,down_proj"
    assert adapt(model_dir, text_file, tmp_path / "without", shared) == 0
    assert adapt(model_dir, text_file, tmp_path / "with", shared, "--memory", totals[1]) == 0
    assert flags == [True, False]
    assert "\ncheckpointing 1 of 2 layers: a step takes 0.00 GiB (counted)\n" in capsys.readouterr().out
    assert same_weights(tmp_path / "with", tmp_path / "without")
