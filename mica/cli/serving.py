"""Which servers can load an adapter as it is, and why others cannot: rules read in the servers' sources.

None of the servers is needed, and nothing is served. A PEFT LoRA is judged like a MiCA adapter, which is one
to every server: B is in the file.
"""

import json
import math
from pathlib import Path

from peft import LoraConfig

from mica.cli.adapt import trained_on
from mica.cli.adapt.adapter import adapted_layers, read_adapter_config
from mica.fast.forward.eligibility import requests_mica

RELEASES = {"PEFT": "0.19.1 and 0.21.2", "vLLM": "0.33.0", "SGLang": "0.5.23", "llama.cpp": "0b03ada"}

_COPY = "{} in a copy of adapter_config.json"
_SCALE = f"with {_COPY}, because it scales by alpha / r"
# Classes with is_3d_moe_weight go without the options. As read there, lora_A of a stack is
# (rank * experts, in_features), which is what PEFT stores since 0.19.1. The pull request is about the layout
# before that; but the change it proposes swaps the factors of whatever names target_parameters, which would
# transpose the present layout.
_MIXED = (
    'with --enable-mixed-moe-lora-format and "is_3d_lora_weight": true in --lora-modules (gpt-oss and '
    "Qwen3.5-MoE: without); experts are unconfirmed, since vLLM's open pull request 52198 reports that they "
    "fail or come out transposed on Qwen3.5-MoE: compare its answers with those of the merged model"
)
_SWAPPED = "its stacks of experts are not as PEFT stores gate_up_proj and down_proj since 0.19.1"
_STACKS = "it does not read PEFT's names for stacks of experts (experts.base_layer)"
_VLLM = "vllm/lora/peft_helper.py: PEFTHelper.validate_legal"
_VLLM_STACKS = "vllm/lora/model_manager.py: LoRAModelManager"
_SGLANG = "sglang/srt/lora/lora.py: LoRAAdapter"
_SGLANG_CHECK = "sglang/srt/lora/lora_manager.py: LoRAManager.validate_new_adapter"
_SGLANG_NAMES = "sglang/srt/lora/utils.py: get_"
_CONVERTER = "convert_lora_to_gguf.py"
_GGUF_SCALE = "src/llama-adapter.h at 215841f: llama_adapter_lora_weight.get_scale"
_CHANGED = "init_lora_weights={} has changed the base's weights"
# Server -> one of `traits` -> whether it serves such an adapter, how or why not (a format string for the
# trait's value), and where the source of its release above shows that.
RULES: dict[str, dict[str, tuple[bool, str, str]]] = {
    "PEFT": {
        "mark": (True, f"from 0.20 on; for an older one {_COPY}", "peft/tuners/lora/layer.py: LoraLayer"),
    },
    "vLLM": {
        "rank": (True, "with --max-lora-rank {} (default 16)", "vllm/config/lora.py: LoRAConfig"),
        "huge rank": (False, "rank {} is above 512", "vllm/config/lora.py: MaxLoRARanks"),
        "whole modules": (False, "modules_to_save ({})", _VLLM),
        "embeddings": (True, "if its class for this model takes LoRA on {}", "vllm/lora/utils.py"),
        "experts": (True, _MIXED, f"{_VLLM_STACKS}._validate_moe_lora_format"),
        "other stacks": (False, _SWAPPED, f"{_VLLM_STACKS}._convert_3d_to_2d_moe_lora"),
        "single stacks": (False, "only one stack of a layer", f"{_VLLM_STACKS}._stack_moe_lora_weights"),
        "DoRA": (False, "DoRA", _VLLM),
        "biases": (False, "biases", _VLLM),
        "changed base": (False, _CHANGED, _VLLM),
    },
    "SGLang": {
        "rsLoRA": (True, _SCALE, f"{_SGLANG}.__init__"),
        "ranks": (False, "ranks or alphas differ between layers", f"{_SGLANG}.__init__"),
        "pattern": (True, f"with {_COPY}", f"{_SGLANG_NAMES}normalized_target_modules"),
        "whole modules": (False, "modules_to_save ({}) are silently left out", f"{_SGLANG}._process_weight"),
        "experts": (False, _STACKS, f"{_SGLANG_NAMES}target_module_name"),
        "unpaired": (False, "{}", f"{_SGLANG}.normalize_qkv_proj, normalize_gate_up_proj"),
        "other names": (True, "if its class takes LoRA on {}", f"{_SGLANG_NAMES}default_hidden_dim"),
        "DoRA": (False, "DoRA", _SGLANG_CHECK),
        "biases": (False, "biases", "sglang/srt/lora/mem_pool.py: load_lora_weight_to_buffer"),
        "changed base": (False, _CHANGED, "sglang/srt/lora/lora_config.py: LoRAConfig"),
    },
    "llama.cpp": {
        "any": (True, f"after {_CONVERTER}", _CONVERTER),
        "rsLoRA": (True, _SCALE, _GGUF_SCALE),
        "alphas": (False, "alphas differ between layers", _GGUF_SCALE),
        "whole modules": (False, "modules_to_save ({})", f"{_CONVERTER}: get_tensors"),
        "experts": (False, _STACKS, "conversion/qwen.py at 03173d5: Qwen2MoeModel"),
        "output layer": (True, "if the base's lm_head is not tied", f"{_CONVERTER}: modify_tensors"),
        "DoRA": (False, "DoRA", f"{_CONVERTER}: get_tensors"),
        "biases": (False, "biases", f"{_CONVERTER}: get_tensors"),
        "changed base": (False, _CHANGED, _CONVERTER),
    },
}
_BASES = {
    True: "has the weights that the adapter was trained on",
    False: "no longer has the weights that the adapter was trained on, so the result is another model",
    None: "not compared with what the adapter was trained on: it is not here, or that is not recorded",
}
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks
_PLAIN = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # change no base: vLLM's list
# Projections that SGLang fuses: the second must be adapted where the first is. It fills in zeros for a
# missing k_proj or up_proj.
_FUSED = (("q_proj", "v_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj"))
# Names that SGLang knows for all models.
_KNOWN = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"}
_KNOWN |= {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"}


def traits(config: LoraConfig, layers: dict[str, tuple[int, int, int]]) -> dict[str, object]:
    """What the rules look at, as far as the adapter has it: name -> value for the rule's text.

    ``config`` and ``layers`` are what `read_adapter_config` and `adapted_layers` return.
    """
    ranks = config.rank_pattern or {}
    rank = max(config.r, *ranks.values(), 0)
    stacks = {name for name, (_, rows, _) in layers.items() if rows > rank}  # A has the rows of all experts
    names = {name.rpartition(".")[2] for name in layers.keys() - stacks}
    found = {
        "any": True,
        **_traits_of_ranks(config, rank),
        **_traits_of_names(config, names),
        **_traits_of_stacks(stacks, layers),
        **_traits_of_kind(config),
    }
    return {name: value for name, value in found.items() if value}


def _traits_of_ranks(config: LoraConfig, rank: int) -> dict[str, object]:
    """``rank``: the largest of all layers."""
    found = {}
    if rank > _VLLM_RANKS[-1]:
        found["huge rank"] = rank
    elif rank > 16:
        found["rank"] = next(most for most in _VLLM_RANKS if most >= rank)
    if config.rank_pattern or config.alpha_pattern:
        found["ranks"] = True
    if config.alpha_pattern or (config.rank_pattern and config.use_rslora):
        found["alphas"] = True
    if config.use_rslora:
        alpha = config.lora_alpha * math.sqrt(config.r)
        found["rsLoRA"] = _entries(use_rslora=False, lora_alpha=alpha)
    return found


def _traits_of_names(config: LoraConfig, names: set[str]) -> dict[str, object]:
    """``names``: the last parts of the names of the adapted layers, without stacks of experts."""
    whole = list(config.modules_to_save or ())
    if config.trainable_token_indices:
        whole.append("rows of the embedding")
    unpaired = []
    for name, partner in _FUSED:
        if name in names and partner not in names:
            unpaired.append(f"{name} is adapted and {partner} is not")
    found = {
        "whole modules": ", ".join(whole),
        "embeddings": ", ".join(sorted(names & {"embed_tokens", "lm_head"})),
        "output layer": "lm_head" in names,
        "unpaired": "; ".join(unpaired),
        "other names": ", ".join(sorted(names - _KNOWN)),
    }
    if isinstance(config.target_modules, str):
        found["pattern"] = _entries(target_modules=sorted(names))
    return found


def _traits_of_stacks(stacks: set[str], layers: dict[str, tuple[int, int, int]]) -> dict[str, object]:
    """``stacks``: those of the ``layers`` that are stacks of experts.

    PEFT stores the adapters of two stacks of one module under its name and that name with ".base_layer".
    """
    found = {"experts": bool(stacks)}
    for name in stacks:
        inner = f"{name}.base_layer"
        if f"{name.removesuffix('.base_layer')}.base_layer" not in stacks:
            found["single stacks"] = True
        if inner in stacks and not _is_gate_up_and_down(layers[inner], layers[name]):
            found["other stacks"] = True
    return found


def _traits_of_kind(config: LoraConfig) -> dict[str, object]:
    """What kind of LoRA it is to each server."""
    found = {"DoRA": config.use_dora, "biases": config.lora_bias or config.bias != "none"}
    # An adapter of parameters is plain LoRA in its file already: the mark of MiCA is in peft_version.
    if requests_mica(config) and not config.target_parameters:
        found["mark"] = _entries(init_lora_weights=True)
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in _PLAIN:
        found["changed base"] = init
    return found


def _is_gate_up_and_down(inner: tuple[int, int, int], outer: tuple[int, int, int]) -> bool:
    """Whether two stacks of one module are (2·)I x H and H x I, as vLLM takes them by their names.

    ``inner``, ``outer``: out_features, rows of A, in_features.
    """
    gate_up_out, _, gate_up_in = inner
    down_out, _, down_in = outer
    return gate_up_in == down_out and gate_up_out in (2 * down_in, down_in)


def _entries(**entries) -> str:
    """The entries as they stand in a JSON object, without its braces."""
    return json.dumps(entries)[1:-1]


def judge(folder: Path) -> dict:
    """The adapter in ``folder``, and whether each server takes it, by which rules.

    ``is_its_base``: whether what lies under the base's name has the weights that it was trained on, or None.
    ``servers``: rows of server, release, serves, text, and rules (found, serves, text, source).

    Raises UsageError as `read_adapter_config` and `adapted_layers`.
    """
    config = read_adapter_config(folder, any_lora=True)
    layers = adapted_layers(folder)
    found = traits(config, layers)
    base = config.base_model_name_or_path
    kind = "LoRA"
    if requests_mica(config):
        kind = "MiCA"
    return {
        "folder": str(folder),
        "kind": kind,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "layers": len(layers),
        "base": base,
        "is_its_base": trained_on.is_base(folder, base or ""),
        "servers": [_verdict(server, found) for server in RELEASES],
    }


def _verdict(server: str, found: dict[str, object]) -> dict:
    """The row of one server, for an adapter with these traits."""
    rules = []
    for name, (serves, text, source) in RULES[server].items():
        if name in found:
            text = text.format(found[name])
            rules.append({"found": name, "serves": serves, "text": text, "source": source})
    refused = [rule["text"] for rule in rules if not rule["serves"]]
    if refused:
        text = f"no: {'; '.join(refused)}"
    else:
        text = ", ".join(["yes", *(rule["text"] for rule in rules)])
    return {
        "server": server,
        "release": RELEASES[server],
        "serves": not refused,
        "text": text,
        "rules": rules,
    }


def lines(judged: dict) -> list[tuple[str, str]]:
    """What `judge` found, as text: lines of a label and its text."""
    servers = judged["servers"]
    facts = "{kind}, rank {rank}, alpha {alpha}, {layers} layers, on {base}".format(**judged)
    result = [("adapter", facts), ("its base", _BASES[judged["is_its_base"]])]
    for row in servers:
        result.append((row["server"], row["text"]))
    if not all(row["serves"] for row in servers):
        result.append(("merged", "a plain checkpoint, which needs none of this: mica transfer writes it"))
    releases = ", ".join(f"{row['server']} {row['release']}" for row in servers)
    result.append(("rules", f"read in {releases}; nothing was served here"))
    return result
