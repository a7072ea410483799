"""``mica adapt``, ``transfer`` and ``inspect`` on mixtures."""

import json
import re

import pytest

from mica.cli import main
from tests.support.adapt_runs import (
    command,
    saved,
    summary,
    weights,
)
from tests.support.moe_models import BUILDERS
from tests.support.tiny_cli import adapt


@pytest.fixture
def base(tmp_path):
    model = BUILDERS["qwen3_moe"](vocab_size=257, max_position_embeddings=128)
    return saved(model, tmp_path / "base")


def test_over_a_quantised_base(base, text_file, tmp_path):
    """Quantised are the layers; stacks of experts and routers stay as they are."""
    output = tmp_path / "out"
    assert adapt(base, text_file, output, "--quantize", "nf4", "--dtype", "float32") == 0
    assert summary(output)["perplexity_after"] < summary(output)["perplexity_before"]
    assert summary(output)["settings"]["experts"] is True
    assert sum("experts" in name for name in weights(output)) == 2 * 2 * 2  # layers, stacks, factors
    assert not [name for name in weights(output) if ".gate." in name]


def test_inspect_lists_stacks_and_no_router(base, tmp_path):
    """What it says of a stack is tested in test_spectra.py."""
    table = tmp_path / "table.json"
    assert main(["inspect", str(base), "--rank", "4", "--json", str(table)]) == 0
    layers = {layer["name"]: layer["proven"] for layer in json.loads(table.read_text())["layers"]}
    assert [proven for name, proven in layers.items() if "experts" in name] == [True] * 4
    assert not any("router" in name or name.endswith(".gate") for name in layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dropout 0.1", "--dropout 0.1: PEFT has no dropout for parameters such as model.layers.0.mlp.e"),
        ("--method dora", "--method dora: PEFT has no DoRA for parameters such as model.layers.0.mlp.e"),
        ("--target-modules q_proj,gate --rank 7", "--rank 7: .*gate.weight has 6 x 32 weights, so at most 6"),
    ],
)
def test_refused_before_training(options, message, base, text_file, tmp_path, capsys):
    assert adapt(base, text_file, tmp_path / "out", *options.split()) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_without_experts_and_by_name(base, text_file, tmp_path, capsys):
    options = ["--steps", 2]
    assert adapt(base, text_file, tmp_path / "none", *options, "--no-experts") == 0
    assert "note: the experts are not adapted" in capsys.readouterr().err
    assert not any("experts" in name for name in weights(tmp_path / "none"))
    names = "q_proj,gate,experts.down_proj"
    options += ["--recipe", "paper", "--dropout", 0, "--target-modules", names]
    assert adapt(base, text_file, tmp_path / "named", *options) == 0
    found = {name.removeprefix("base_model.model.model.layers.0.") for name in weights(tmp_path / "named")}
    assert {"mlp.gate.lora_A.weight", "mlp.experts.lora_A.weight", "self_attn.q_proj.lora_A.weight"} <= found
    again = ["--adapter", tmp_path / "named", "--sequence-length", 32, "--steps", 1]
    assert command("--model", base, "--text", text_file, "--output", tmp_path / "on", *again) == 0
    assert weights(tmp_path / "on").keys() == weights(tmp_path / "named").keys()


def test_a_dense_model_has_none(model_dir, text_file, tmp_path, capsys):
    assert adapt(model_dir, text_file, tmp_path / "out", "--experts") == 2
    assert "--experts: LlamaForCausalLM has no experts" in capsys.readouterr().err
