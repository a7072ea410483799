"""``mica doctor --adapter``: which server takes which made-up adapter, and what it prints and writes."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from mica.cli import doctor, main, serving
from mica.cli.adapt.adapter import adapted_layers
from tests.support.adapt_runs import write_adapter
from tests.support.moe_models import qwen3_moe

CONVERTED = "yes, after convert_lora_to_gguf.py"
COPY = "in a copy of adapter_config.json"
OLDER = f'yes, from 0.20 on; for an older one "init_lora_weights": true {COPY}'
SCALED = f'with "use_rslora": false, "lora_alpha": 32.0 {COPY}, because it scales by alpha / r'
WHOLE = "modules_to_save (embed_tokens, lm_head)"
NAMES = "no: it does not read PEFT's names for stacks of experts (experts.base_layer)"
MIXED = 'yes, with --enable-mixed-moe-lora-format and "is_3d_lora_weight": true in --lora-modules '
MIXED += "(gpt-oss and Qwen3.5-MoE: without); experts are unconfirmed, since vLLM's open pull request "
MIXED += "52198 reports that they fail or come out transposed on Qwen3.5-MoE: compare its answers with those "
MIXED += "of the merged model"
OTHER_STACKS = "no: its stacks of experts are not as PEFT stores gate_up_proj and down_proj since 0.19.1"


def made_up(folder, layers="q_proj v_proj", stacks="", rows=None, sizes=None, **config):
    """A folder with an adapter of ``layers`` of one block, of rank 16, and of ``stacks`` of 4 experts.

    rows, sizes: of A, and (out_features, in_features), by name.
    """
    config = {"r": 16, "lora_alpha": 8, "init_lora_weights": "mica", **config}
    config = {"target_modules": [*layers.split(), "none"], "base_model_name_or_path": "owner/base", **config}
    if stacks:
        config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    LoraConfig(**config).save_pretrained(folder)
    weights = {}
    for name in [*layers.split(), *stacks.split()]:
        size = (rows or {}).get(name, config["r"]) * (4 if name in stacks else 1)
        out_features, in_features = (sizes or {}).get(name, (8, 8))
        key = f"base_model.model.model.layers.0.{name}"
        weights |= {
            f"{key}.lora_A.weight": torch.zeros(size, in_features),
            f"{key}.lora_B.weight": torch.zeros(out_features, size),
        }
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def texts(folder) -> dict[str, str]:
    return {row["server"]: row["text"] for row in serving.judge(folder)["servers"]}


DOWN, GATE_UP = "mlp.experts", "mlp.experts.base_layer"  # the names that PEFT gives them
STACKS = f"{DOWN} {GATE_UP}"
PLAIN = {"PEFT": OLDER, "vLLM": "yes", "SGLang": "yes", "llama.cpp": CONVERTED}
CASES = {
    "plain": ({}, {}),
    "LoRA": ({"init_lora_weights": True}, {"PEFT": "yes"}),
    "rank 32": ({"r": 32}, {"vLLM": "yes, with --max-lora-rank 32 (default 16)"}),
    "rank 300": ({"r": 300}, {"vLLM": "yes, with --max-lora-rank 320 (default 16)"}),
    "rank 600": ({"r": 600}, {"vLLM": "no: rank 600 is above 512"}),
    "ranks": (
        {"rank_pattern": {"q_proj": 64}, "rows": {"q_proj": 64}},
        {
            "vLLM": "yes, with --max-lora-rank 64 (default 16)",
            "SGLang": "no: ranks or alphas differ between layers",
        },
    ),
    "alphas": (
        {"alpha_pattern": {"q_proj": 64}},
        dict.fromkeys(("SGLang", "llama.cpp"), "differ between layers"),
    ),
    "rsLoRA": ({"use_rslora": True}, {"SGLang": f"yes, {SCALED}", "llama.cpp": f"{CONVERTED}, {SCALED}"}),
    "rsLoRA, ranks": (
        {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "rows": {"q_proj": 8}},
        dict.fromkeys(("SGLang", "llama.cpp"), "differ between layers"),
    ),
    "whole modules": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {
            "vLLM": f"no: {WHOLE}",
            "SGLang": f"no: {WHOLE} are silently left out",
            "llama.cpp": f"no: {WHOLE}",
        },
    ),
    "new tokens": (
        {"trainable_token_indices": [3]},
        dict.fromkeys(("vLLM", "SGLang", "llama.cpp"), "(rows of the embedding)"),
    ),
    "experts": (
        {"stacks": "mlp.experts mlp.experts.base_layer", "init_lora_weights": True},
        {"PEFT": "yes", "vLLM": MIXED, "SGLang": NAMES, "llama.cpp": NAMES},
    ),
    "experts, gated": (
        {"stacks": STACKS, "sizes": {DOWN: (16, 12), GATE_UP: (24, 16)}},
        {"PEFT": "yes", "vLLM": MIXED, "SGLang": NAMES, "llama.cpp": NAMES},
    ),
    "experts of PEFT 0.18": (  # in_features and out_features by position
        {"stacks": STACKS, "sizes": {DOWN: (12, 16), GATE_UP: (16, 24)}},
        {"PEFT": "yes", "vLLM": OTHER_STACKS, "SGLang": NAMES, "llama.cpp": NAMES},
    ),
    "experts in another order": (
        {"stacks": STACKS, "sizes": {GATE_UP: (16, 12), DOWN: (24, 16)}},
        {"PEFT": "yes", "vLLM": OTHER_STACKS, "SGLang": NAMES, "llama.cpp": NAMES},
    ),
    "one stack": (
        {"stacks": "mlp.experts"},
        {"PEFT": "yes", "vLLM": "no: only one stack of a layer", "SGLang": NAMES, "llama.cpp": NAMES},
    ),
    "embedding": (
        {"layers": "embed_tokens"},
        {"vLLM": "yes, if its class for this model takes LoRA on embed_tokens"},
    ),
    "output": (
        {"layers": "lm_head"},
        {
            "vLLM": "yes, if its class for this model takes LoRA on lm_head",
            "llama.cpp": f"{CONVERTED}, if the base's lm_head is not tied",
        },
    ),
    "q alone": ({"layers": "q_proj o_proj"}, {"SGLang": "no: q_proj is adapted and v_proj is not"}),
    "up alone": ({"layers": "up_proj"}, {"SGLang": "no: up_proj is adapted and gate_proj is not"}),
    "gate alone": ({"layers": "gate_proj"}, {}),
    "other names": ({"layers": "c_attn"}, {"SGLang": "yes, if its class takes LoRA on c_attn"}),
    "pattern": (
        {"target_modules": r".*\.[qv]_proj"},
        {"SGLang": f'yes, with "target_modules": ["q_proj", "v_proj"] {COPY}'},
    ),
    "DoRA": (
        {"use_dora": True, "init_lora_weights": True},
        {"PEFT": "yes"} | dict.fromkeys(("vLLM", "SGLang", "llama.cpp"), "no: DoRA"),
    ),
    "biases": ({"bias": "lora_only"}, dict.fromkeys(("vLLM", "SGLang", "llama.cpp"), "no: biases")),
    "PiSSA": (
        {"init_lora_weights": "pissa"},
        {"PEFT": "yes"}
        | dict.fromkeys(("vLLM", "SGLang", "llama.cpp"), "init_lora_weights=pissa has changed the base's"),
    ),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's own, on odd configurations
@pytest.mark.parametrize("case", CASES)
def test_verdicts(case, tmp_path):
    config, expected = CASES[case]
    found = texts(made_up(tmp_path, **config))
    for server, text in (PLAIN | expected).items():
        assert found[server] == text or (server in expected and text in found[server]), (
            server,
            found[server],
        )
        assert found[server].startswith(("yes", "no: "))


def test_every_rule_has_a_case_and_a_source(tmp_path):
    """By what is found: a rule that no adapter meets would never be read."""
    met = set()
    for number, (config, _) in enumerate(CASES.values()):
        for row in serving.judge(made_up(tmp_path / str(number), **config))["servers"]:
            met |= {(row["server"], rule["found"]) for rule in row["rules"]}
            assert all(".py" in rule["source"] or ".h" in rule["source"] for rule in row["rules"])
    assert met == {(server, found) for server, rules in serving.RULES.items() for found in rules}
    assert serving.RULES.keys() == serving.RELEASES.keys()


def test_an_adapter_of_a_run_with_experts(tmp_path):
    """What `mica adapt` saves: MiCA to this package, LoRA to all others, stacks under PEFT's names."""
    write_adapter(tmp_path, qwen3_moe(), target_modules="q_proj,v_proj", experts=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert {"experts", "base_layer"} < {name.rpartition(".")[2] for name in adapted_layers(tmp_path)}
    assert serving.judge(tmp_path)["kind"] == "MiCA"
    assert texts(tmp_path) == {"PEFT": "yes", "vLLM": MIXED, "SGLang": NAMES, "llama.cpp": NAMES}


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: pytest.fail("the machine was examined"))
    adapter, file = made_up(tmp_path / "adapter", r=32), tmp_path / "doctor.json"
    assert main(["doctor", "--adapter", str(adapter), "--json", str(file)]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["adapter"] == "MiCA, rank 32, alpha 8, 2 layers, on owner/base"
    assert printed["vLLM"] == "yes, with --max-lora-rank 32 (default 16)"
    assert "vLLM 0.33.0" in printed["rules"]
    assert "nothing was served here" in printed["rules"]
    assert "merged" not in printed
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["folder"] == str(adapter)
    (rule,) = report["servers"][1]["rules"]
    assert (rule["found"], rule["source"]) == ("rank", "vllm/config/lora.py: LoRAConfig")

    made_up(adapter, modules_to_save=["lm_head"])
    assert main(["doctor", "--adapter", str(adapter)]) == 0
    assert "\nmerged            a plain checkpoint" in capsys.readouterr().out


def test_folders_that_are_refused(tmp_path, capsys):
    empty, prefix, file = tmp_path / "empty", tmp_path / "prefix", tmp_path / "doctor.json"
    empty.mkdir()
    made_up(prefix)
    config = prefix / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    refused = {
        tmp_path / "no": "no such folder",
        empty: "is not a PEFT adapter folder (no adapter_config.json)",
        prefix: "must be a LoRA adapter, but is PREFIX_TUNING",
    }
    for folder, message in refused.items():
        assert main(["doctor", "--adapter", str(folder), "--json", str(file)]) == 2
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n"), file.exists()) == ("", 1, False)
        assert captured.err.startswith(f"mica doctor: error: --adapter {folder}: {message}")
