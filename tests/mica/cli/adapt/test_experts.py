"""``mica adapt``, ``transfer`` and ``inspect`` on mixtures."""

import json

import pytest

from tests.support.adapt_runs import saved, weights
from tests.support.moe_models import BUILDERS
from tests.support.tables import rows
from tests.support.tiny_cli import adapt, mica


@pytest.fixture
def base(tmp_path):
    model = BUILDERS["qwen3_moe"](vocab_size=257, max_position_embeddings=128)
    return saved(model, tmp_path / "base")


def test_inspect_lists_stacks_and_no_router(base, tmp_path):
    """What it says of a stack is tested in test_spectra.py."""
    table = tmp_path / "table.json"
    assert mica("inspect", base, "--rank 4 --json", table) == 0
    layers = {layer["name"]: layer["proven"] for layer in json.loads(table.read_text())["layers"]}
    assert [proven for name, proven in layers.items() if "experts" in name] == [True] * 4
    assert not any("router" in name or name.endswith(".gate") for name in layers)


@pytest.mark.parametrize(
    ("options", "message"),
    rows("""
--dropout 0.1 => --dropout 0.1: PEFT has no dropout for parameters such as model.layers.0.mlp.e
--method dora => --method dora: PEFT has no DoRA for parameters such as model.layers.0.mlp.e
--target-modules q_proj,gate --rank 7 => --rank 7: ...gate.weight has 6 x 32 weights, so at most 6
"""),
)
def test_refused_before_training(options, message, base, text_file, output, refused):
    refused(adapt(base, text_file, output, options), *message.split("..."))
    assert not output.exists()


def test_without_experts_and_by_name(base, text_file, tmp_path, capsys):
    assert adapt(base, text_file, tmp_path / "none", "--steps 2 --no-experts") == 0
    assert "note: the experts are not adapted" in capsys.readouterr().err
    assert not any("experts" in name for name in weights(tmp_path / "none"))
    options = "--steps 2 --recipe paper --dropout 0 --target-modules q_proj,gate,experts.down_proj"
    assert adapt(base, text_file, tmp_path / "named", options) == 0
    found = {name.removeprefix("base_model.model.model.layers.0.") for name in weights(tmp_path / "named")}
    assert {"mlp.gate.lora_A.weight", "mlp.experts.lora_A.weight", "self_attn.q_proj.lora_A.weight"} <= found
    assert adapt(base, text_file, tmp_path / "on", "--adapter", tmp_path / "named", "--steps 1") == 0
    assert weights(tmp_path / "on").keys() == weights(tmp_path / "named").keys()
