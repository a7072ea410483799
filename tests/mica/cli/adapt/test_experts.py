"""``mica adapt``, ``transfer`` and ``inspect`` on mixtures."""

import json
import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from mica.cli import main
from mica.cli.adapt.folder import MARKER
from tests.support.adapt_runs import (
    command,
    log_of,
    poison_solver,
    resume,
    same,
    saved,
    summary,
    unfinished,
    weights,
)
from tests.support.moe_models import BUILDERS
from tests.support.tiny_cli import TEXT, adapt, tiny_llama

KINDS = ["qwen3_moe", "gpt_oss"]  # the latter with biases, and its stacks transposed


def write_model(folder, kind, seed=0, **options):
    return saved(BUILDERS[kind](seed=seed, vocab_size=257, max_position_embeddings=128, **options), folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module", params=KINDS)
def made(request, text, tmp_path_factory):
    """A model and the folder of its whole run: 12 steps, a checkpoint every 4, the merged model."""
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder / "base", request.param)
    options = ["--save-steps", 4, "--merge", "--retain", text]
    assert adapt(folder / "base", text, folder / "run", *options) == 0
    return request.param, folder / "base", folder / "run"


def routers(folder):
    whole = weights(folder, "model")
    return {name: weight for name, weight in whole.items() if ".gate." in name or "router" in name}


def test_experts_are_adapted_and_the_router_is_not(made):
    _, base, run = made
    adapted = weights(run)
    assert sum("experts" in name for name in adapted) == 2 * 2 * 2  # layers, stacks, factors
    assert not any("router" in name or ".gate." in name for name in adapted)
    before, after = routers(base), routers(run / "merged")
    assert len(before) >= 2
    assert same(before, after)
    stacks = [weights(folder, "model") for folder in (base, run / "merged")]
    moved = {name for name in stacks[0] if "experts" in name and not torch.equal(*(s[name] for s in stacks))}
    assert moved == {name for name in stacks[0] if "experts" in name and "bias" not in name}
    made = summary(run)
    assert made["settings"]["experts"] is True
    assert made["perplexity_after"] < made["perplexity_before"]
    assert made["layers_on_peft_path"] == []
    assert yaml.safe_load((run / "run.yaml").read_text())["experts"] is True


def test_resumed_from_a_checkpoint_it_ends_the_same(made, tmp_path, monkeypatch):
    """As kill -9 leaves it: a checkpoint that is whole, one that is not, and nothing of the run's end."""
    _, _, run = made
    output = unfinished(run, tmp_path / "moved", last=12)
    (output / "checkpoint-12" / MARKER).unlink()
    poison_solver(monkeypatch)
    assert resume(output) == 0
    assert same(weights(output), weights(run))
    assert log_of(output) == log_of(run)


def test_from_an_adapter(made, text, tmp_path, monkeypatch):
    _, base, run = made
    poison_solver(monkeypatch)
    argv = ["--model", base, "--text", text, "--output", tmp_path / "out", "--adapter", run]
    assert command(*argv, "--sequence-length", "32", "--steps", "2", "--learning-rate", "1e-3") == 0
    before, after = weights(run), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) == ("lora_B" in name) for name in before)
    first, second = summary(run), summary(tmp_path / "out")
    assert second["perplexity_before"] == pytest.approx(first["perplexity_after"])
    assert second["settings"]["rank"] == first["settings"]["rank"]


def test_transfer_to_a_sibling(made, tmp_path, capsys):
    kind, base, run = made
    sibling = write_model(tmp_path / "chat", kind, seed=5)
    argv = ["transfer", "--adapter", str(run), "--to", str(sibling), "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    merged, there = weights(tmp_path / "out", "model"), weights(sibling, "model")
    trained, here = weights(run / "merged", "model"), weights(base, "model")
    assert merged.keys() == there.keys()
    for name, weight in merged.items():  # the same update, up to the rounding of the sums
        torch.testing.assert_close(weight - there[name], trained[name] - here[name], rtol=0, atol=1e-6)
    other = write_model(tmp_path / "other", kind, experts=8)
    argv = ["transfer", "--adapter", str(run), "--to", str(other), "--output", str(tmp_path / "none")]
    assert main(argv) == 2
    assert "but in --to" in (error := capsys.readouterr().err)
    assert "it has 8 x " in error


def test_inspect_lists_stacks_and_no_router(made, capsys, tmp_path):
    """What it says of a stack is tested in test_spectra.py."""
    _, base, _ = made
    assert (
        main(["inspect", str(base), "--rank", "4", "--layers", "--json", str(tmp_path / "table.json")]) == 0
    )
    assert "of expert " in capsys.readouterr().out
    layers = {layer["name"]: layer for layer in json.loads((tmp_path / "table.json").read_text())["layers"]}
    model = AutoModelForCausalLM.from_pretrained(base)
    stacks = [name for name in layers if "experts" in name]
    assert len(stacks) == 4
    assert not any("router" in name or name.endswith(".gate") for name in layers)
    for name in stacks:
        assert sorted(layers[name]["shape"]) == sorted(model.get_parameter(name).shape)
        assert (layers[name]["proven"], layers[name]["reason"]) == (True, None)


def test_over_a_quantised_base(text, tmp_path):
    """Quantised are the layers; stacks of experts stay as they are, and all is merged into what it was."""
    base, output = write_model(tmp_path / "base", "qwen3_moe"), tmp_path / "out"
    options = ["--quantize", "nf4", "--dtype", "float32", "--merge"]
    assert adapt(base, text, output, *options) == 0
    assert summary(output)["perplexity_after"] < summary(output)["perplexity_before"]
    assert same(routers(base), routers(output / "merged"))
    stack = "model.layers.0.mlp.experts"
    factors = {key.partition(f"{stack}.")[2]: weight for key, weight in weights(output).items()}
    before, after = (AutoModelForCausalLM.from_pretrained(at) for at in (base, output / "merged"))
    down, merged = (model.get_parameter(f"{stack}.down_proj") for model in (before, after))
    lora_A = factors["lora_A.weight"].view(len(down), 4, -1)
    lora_B = factors["lora_B.weight"].view(down.shape[1], 4, -1).permute(2, 0, 1)
    torch.testing.assert_close(merged, down + lora_B @ lora_A, rtol=1e-5, atol=1e-6)  # alpha is the rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dropout 0.1", "--dropout 0.1: PEFT has no dropout for parameters such as model.layers.0.mlp.e"),
        ("--target-modules q_proj,gate --rank 7", "--rank 7: .*gate.weight has 6 x 32 weights, so at most 6"),
        ("--target-modules q_proj,experts.up_proj", "no layer of the model is called 'experts.up_proj'"),
    ],
)
def test_refused_before_training(options, message, text, tmp_path, capsys):
    base = write_model(tmp_path / "base", "qwen3_moe")
    assert adapt(base, text, tmp_path / "out", *options.split()) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_without_experts_and_by_name(text, tmp_path, capsys):
    base = write_model(tmp_path / "base", "qwen3_moe")
    options = ["--steps", 2]
    assert adapt(base, text, tmp_path / "none", *options, "--no-experts") == 0
    assert "note: the experts are not adapted" in capsys.readouterr().err
    assert not any("experts" in name for name in weights(tmp_path / "none"))
    names = "q_proj,gate,experts.down_proj"
    options += ["--recipe", "paper", "--dropout", 0, "--target-modules", names]
    assert adapt(base, text, tmp_path / "named", *options) == 0
    found = {name.removeprefix("base_model.model.model.layers.0.") for name in weights(tmp_path / "named")}
    assert {"mlp.gate.lora_A.weight", "mlp.experts.lora_A.weight", "self_attn.q_proj.lora_A.weight"} <= found
    argv = ["--model", base, "--text", text, "--output", tmp_path / "on", "--adapter", tmp_path / "named"]
    assert command(*argv, "--sequence-length", 32, "--steps", 1) == 0
    assert weights(tmp_path / "on").keys() == weights(tmp_path / "named").keys()


def test_a_dense_model_has_none(text, tmp_path, capsys):
    saved(tiny_llama(), tmp_path / "base")
    assert adapt(tmp_path / "base", text, tmp_path / "out", "--experts") == 2
    assert "--experts: LlamaForCausalLM has no experts" in capsys.readouterr().err
    assert adapt(tmp_path / "base", text, tmp_path / "out", "--steps", 1) == 0
    assert "experts" not in yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
