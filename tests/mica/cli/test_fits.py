"""``mica fits``: its rows, what it says of a device, its refusals. Counts: `test_step_memory`."""

import json
import math
import re
import textwrap
from dataclasses import asdict

import pytest
import torch
from transformers import AutoConfig, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from mica.cli import fits
from mica.cli.fits import GIB, SETUPS, tokens_that_fit
from mica.fast.settings import settings
from tests.support.tables import rows
from tests.support.tiny_cli import mica

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
}
LONG = {**LLAMA, "max_position_embeddings": 2**20}
TOKENS = 1024


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command on a configuration; returns (status, JSON or None, captured)."""

    def run(config, *options, tokens=TOKENS):
        config.save_pretrained(tmp_path)
        file = tmp_path / "rows.json"
        file.unlink(missing_ok=True)
        status = mica("fits", tmp_path, "--tokens", tokens, "--json", file, *options)
        return status, json.loads(file.read_text()) if file.is_file() else None, capsys.readouterr()

    return run


def only(monkeypatch, *names):
    monkeypatch.setattr(fits, "SETUPS", [setup for setup in SETUPS if setup.name in names])


def test_rows(run):
    before = asdict(settings)
    status, report, captured = run(LlamaConfig(**LLAMA), "--dora --bits 4")
    assert (status, asdict(settings)) == (0, before)
    rows = {(row["name"], row["checkpointing"]): row for row in report["rows"]}
    assert rows.keys() == {(setup.name, checkpointing) for setup in SETUPS for checkpointing in (False, True)}
    for adapter in ("LoRA", "MiCA"):
        most_first = ("PEFT's default", "PEFT's best setting", "here, norms saved", "here")
        kept = [rows[f"{adapter}, {how}", False]["kept_bytes"] for how in most_first]
        assert kept == sorted(kept, reverse=True)
        assert len(set(kept)) == len(kept)
    stock, dora = (rows[f"{adapter}, PEFT's default", False]["kept_bytes"] for adapter in ("LoRA", "DoRA"))
    assert dora > stock
    bare, ours = (rows[name, False] for name in ("without adapter", "MiCA, here"))
    assert bare["weights_bytes"] + bare["peak_bytes"] == bare["total_bytes"]
    layers = 4 * 16 * (64 * 6 + 96)  # numbers of A: seven layers a block, of these one of 96 columns
    adam = 2 * 4 * layers
    assert ours["weights_bytes"] + ours["peak_bytes"] + adam == ours["total_bytes"]
    assert rows["MiCA, here", True]["kept_bytes"] < ours["kept_bytes"] / 2
    assert f"{'MiCA, here, norms saved':25}  {ours['weights_bytes'] / GIB:7.2f}" in captured.out
    assert "Not counted" in captured.out
    assert captured.err.startswith("\rCounting:   0%")  # before anything is counted


@pytest.mark.parametrize(("vocabulary", "loss"), [(256, "logits"), (32768, "logits"), (32768, "chunked")])
def test_the_logits_are_named_where_they_decide(vocabulary, loss, run, monkeypatch):
    only(monkeypatch, "without adapter", "LoRA, PEFT's default")
    if loss == "chunked":  # then it is something else that makes peaks alike
        monkeypatch.setattr(fits, "_ALIKE", math.inf)
    _, _, captured = run(LlamaConfig(**LLAMA | {"vocab_size": vocabulary}), f"--loss {loss}")
    assert ("--loss chunked" in captured.out) == (vocabulary == 32768 and loss == "logits")


def test_options_change_what_they_name(run, monkeypatch):
    name = "LoRA, PEFT's default"
    only(monkeypatch, name)

    def row(*options, **config):
        _, report, _ = run(LlamaConfig(**LLAMA | {"vocab_size": 4096} | config), *options)
        return report["rows"][0]

    options = "", "--bits 4", "--bits 8", "--dropout 0.1", "--loss chunked"
    plain, nf4, int8, dropped, chunked = map(row, options)
    assert nf4["kept_bytes"] == plain["kept_bytes"]
    assert nf4["weights_bytes"] < int8["weights_bytes"] < plain["weights_bytes"]
    masks = 4 * TOKENS * (64 * 6 + 96)  # of bytes, for each layer
    # By PEFT's default each layer keeps a copy of x, so that after dropout there is no other one
    assert dropped["kept_bytes"] == plain["kept_bytes"] + masks
    assert chunked["peak_bytes"] < plain["peak_bytes"]
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    assert row(quantization_config=quantised.to_dict()) == nf4


def test_the_tokens_that_fit_a_device_do(run, monkeypatch):
    only(monkeypatch, "MiCA, here")
    config = LlamaConfig(**LONG)
    _, report, captured = run(config, "--memory 0.25")
    assert "tokens in 0.25" in captured.out
    tokens = report["rows"][0]["tokens_that_fit"]
    totals = []
    for number in (tokens, tokens * 101 // 100):
        _, report, _ = run(config, tokens=number)
        totals.append(report["rows"][0]["total_bytes"])
    assert totals[0] <= 0.25 * GIB < totals[1]
    assert tokens_that_fit(report["rows"][0], TOKENS, memory=1e-6) == 0


def test_the_fewest_checkpointed_layers_for_a_device(run, monkeypatch):
    only(monkeypatch, "LoRA, here")
    config = LlamaConfig(**LONG)
    _, report, _ = run(config)
    none, every = (row["total_bytes"] for row in report["rows"])
    found = []
    for size in (every - 1, every, (every + none) // 2, none):
        _, report, captured = run(config, "--memory", size / GIB)
        row = report["rows"][0]
        found.append(row["fewest_checkpointed"])
        if found[-1] is None:
            assert row["fewest_total_bytes"] is None
            assert "too few: all" in captured.out
        else:
            assert row["fewest_total_bytes"] <= size
            line = next(line for line in captured.out.splitlines() if line.startswith("LoRA, here"))
            assert line.split()[-2] == str(found[-1])
    assert found[:2] + found[3:] == [None, 4, 0]
    assert 0 < found[2] < 4
    check_script(captured.out)


def check_script(printed):
    """The lines for the user's script do what they say, and change no gradient."""
    lines = re.search(r"(?m)^    from .*\n(?:    .*\n)+", printed)[0]
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"dtype": "float32"})).train()
    ids = torch.arange(16).view(1, 16)
    gradients = []
    for k in (0, 1, 3, 4):
        exec(textwrap.dedent(lines), {"model": model, "k": k})
        ran = []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda module, *_, ran=ran: ran.append(module))
        model(input_ids=ids, labels=ids).loss.backward()
        assert [ran.count(layer.mlp) for layer in model.model.layers] == [2] * k + [1] * (4 - k)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))


# The model type and changes of its configuration, the options, and what the message has
REFUSED = """
llama => {"quantization_config": {"quant_method": "gptq", "bits": 4}} =>  => is quantised by gptq: only layers
llama => {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}} => --bits 8 => is quantised already: leave --bits 8 out
mixtral => {"architectures": ["MixtralForCausalLM"]} =>  => has experts, and how many tokens each gets is not
llama => {} => --rank 33 => k_proj has 32 x 64 weights, so at most 32
t5 => {} =>  => is no causal language model, or cannot be built
"""  # noqa: E501


def test_a_gguf_file_is_refused_early(capsys, monkeypatch):
    monkeypatch.setattr("mica.cli.loading.find_source", pytest.fail)
    assert mica("fits some/model.Q4_K_M.GGUF --tokens 8") == 2
    said = "is a GGUF file: give the Hub id or the folder (with config.json) of the model it was made from"
    assert capsys.readouterr().err.endswith(f"mica fits: error: some/model.Q4_K_M.GGUF: {said}\n")


@pytest.mark.parametrize(("model_type", "changes", "options", "message"), rows(REFUSED))
def test_what_is_not_counted_is_refused_in_one_line(model_type, changes, options, message, run):
    config = AutoConfig.for_model(model_type, **LLAMA | json.loads(changes))
    status, report, captured = run(config, options)
    assert (status, report, captured.out) == (2, None, "")
    assert captured.err.count("\n") == 1
    *_, line = captured.err.splitlines()  # over the bar, which has been wiped out
    assert line.startswith("mica fits: error: ")
    assert message in line
