"""``mica fits``: its rows, what it says of a device, its refusals. Counts: `test_step_memory`."""

import json
from dataclasses import asdict

import pytest
from transformers import BitsAndBytesConfig, LlamaConfig, MixtralConfig, T5Config

from mica.cli import fits, main
from mica.cli.fits import GIB, SETUPS, tokens_that_fit
from mica.fast.settings import settings

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
TOKENS = 1024


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command on a configuration; returns (status, JSON or None, captured)."""

    def run(config, *options, tokens=TOKENS):
        config.save_pretrained(tmp_path)
        file = tmp_path / "rows.json"
        file.unlink(missing_ok=True)
        argv = ["fits", str(tmp_path), "--tokens", str(tokens), "--json", str(file), *options]
        status = main(argv)
        return status, json.loads(file.read_text()) if file.is_file() else None, capsys.readouterr()

    return run


def test_rows(run):
    before = asdict(settings)
    status, report, captured = run(LlamaConfig(**LLAMA))
    assert (status, asdict(settings)) == (0, before)
    rows = {(row["name"], row["checkpointing"]): row for row in report["rows"]}
    assert rows.keys() == {(setup.name, checkpointing) for setup in SETUPS for checkpointing in (False, True)}
    for adapter in ("LoRA", "MiCA"):
        most_first = ("PEFT's default", "PEFT's best setting", "here, norms saved", "here")
        kept = [rows[f"{adapter}, {how}", False]["kept_bytes"] for how in most_first]
        assert kept == sorted(kept, reverse=True)
        assert len(set(kept)) == len(kept)
    bare, ours = (rows[name, False] for name in ("without adapter", "MiCA, here"))
    assert bare["weights_bytes"] + bare["peak_bytes"] == bare["total_bytes"]
    layers = 4 * 16 * (64 * 6 + 96)  # numbers of A: seven layers a block, of these one of 96 columns
    adam = 2 * 4 * layers
    assert ours["weights_bytes"] + ours["peak_bytes"] + adam == ours["total_bytes"]
    assert rows["MiCA, here", True]["kept_bytes"] < ours["kept_bytes"] / 2
    assert f"{'MiCA, here, norms saved':25}  {ours['weights_bytes'] / GIB:7.2f}" in captured.out
    assert "Not counted" in captured.out


@pytest.mark.parametrize("vocabulary", [256, 32768])
def test_the_logits_are_named_where_they_decide(vocabulary, run, monkeypatch):
    monkeypatch.setattr(fits, "SETUPS", SETUPS[:2])
    _, _, captured = run(LlamaConfig(**{**LLAMA, "vocab_size": vocabulary}))
    assert ("linear_cross_entropy" in captured.out) == (vocabulary == 32768)


def test_the_tokens_that_fit_a_device_do(run, monkeypatch):
    name = "MiCA, here"
    monkeypatch.setattr(fits, "SETUPS", [setup for setup in SETUPS if setup.name == name])
    config = LlamaConfig(**{**LLAMA, "max_position_embeddings": 2**20})
    _, report, captured = run(config, "--memory", "0.25")
    assert "tokens in 0.25" in captured.out
    tokens = report["rows"][0]["tokens_that_fit"]
    totals = []
    for number in (tokens, tokens * 101 // 100):
        _, report, _ = run(config, tokens=number)
        totals.append(report["rows"][0]["total_bytes"])
    assert totals[0] <= 0.25 * GIB < totals[1]
    assert tokens_that_fit(report["rows"][0], TOKENS, memory=1e-6) == 0


REFUSED = {  # what it is: (configuration, options, message)
    "quantised": (
        LlamaConfig(**LLAMA, quantization_config=BitsAndBytesConfig(load_in_4bit=True).to_dict()),
        (),
        "is quantised: what its library allocates is not counted",
    ),
    "experts": (
        MixtralConfig(**{**LLAMA, "architectures": ["MixtralForCausalLM"]}),
        (),
        "has experts, and how many tokens each gets is not known",
    ),
    "another name": (LlamaConfig(**LLAMA), ("--target-modules", "q_prj"), "did you mean q_proj?"),
    "too large a rank": (LlamaConfig(**LLAMA), ("--rank", "33"), "k_proj has 32 x 64 weights, so at most 32"),
    "no causal model": (T5Config(), (), "is no causal language model, or cannot be built"),
}


def test_a_gguf_file_is_refused_early(capsys, monkeypatch):
    monkeypatch.setattr("mica.cli.loading.find_source", pytest.fail)
    assert main(["fits", "some/model.Q4_K_M.GGUF", "--tokens", "8"]) == 2
    said = "is a GGUF file: give the Hub id or the folder (with config.json) of the model it was made from"
    assert capsys.readouterr().err == f"mica fits: error: some/model.Q4_K_M.GGUF: {said}\n"


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_counted_is_refused_in_one_line(case, run):
    config, options, message = REFUSED[case]
    status, report, captured = run(config, *options)
    assert (status, report, captured.out) == (2, None, "")
    [line] = captured.err.splitlines()  # before anything is counted
    assert line.startswith("mica fits: error: ")
    assert message in line
