"""``mica adapt --memory``: each batch checkpoints as few layers as it needs, which changes no bit."""

from tests.support.adapt_runs import same_weights
from tests.support.tiny_cli import adapt


def test_a_run(model_dir, text_file, tmp_path, capsys):
    shared = "--method lora --dropout 0.1 --batch-size 4 --target-modules q_proj,down_proj"
    assert adapt(model_dir, text_file, tmp_path / "without", shared) == 0
    for memory, number in (("100", 0), ("1e-6", 2), ("auto", 0)):
        output = tmp_path / memory
        assert adapt(model_dir, text_file, output, shared, "--memory", memory) == 0
        assert f"\ngradient checkpointing by memory: {number} of 2 layers in the" in capsys.readouterr().out
        assert same_weights(output, tmp_path / "without")
