"""A copy of an adapter on stacks of experts that has one LoRA for each expert, as servers read it:

python per_expert.py ADAPTER OUTPUT
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mica.cli import loading
from mica.cli.adapt import saved_adapter

adapter, output = map(Path, sys.argv[1:])
saved = saved_adapter.read(adapter)
base = loading.find_source(saved.config.base_model_name_or_path, trust_remote_code=False)
saved.check_fit(loading.skeleton(base), "its base")  # no layer or expert is missing, none too many
rank = saved.settings()["rank"]  # that of all layers
shutil.copytree(adapter, output, ignore=shutil.ignore_patterns("checkpoint-*", "base", "merged"))
config = json.loads((adapter / "adapter_config.json").read_text())
tensors = {}
for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
    layer, is_stack, factor = name.rpartition(".experts.")
    if not is_stack:
        tensors[name] = tensor
        continue
    if factor.endswith("lora_A.weight"):
        parts = tensor.split(rank)  # (experts * rank, in)
        gate_up = [(part, part) for part in parts]
    else:
        parts = tensor.unflatten(1, (rank, -1)).unbind(2)  # (out, rank * experts): the expert changes fastest
        gate_up = [part.chunk(2) for part in parts]
    for expert, part in enumerate(parts):
        if factor.startswith("base_layer."):  # PEFT's name for gate_up_proj
            split = dict(zip(("gate_proj", "up_proj"), gate_up[expert], strict=True))
        else:
            split = {"down_proj": part}
        for projection, weight in split.items():
            new = f"{layer}.experts.{expert}.{projection}.{factor.removeprefix('base_layer.')}"
            tensors[new] = weight.clone(memory_format=torch.contiguous_format)

save_file(tensors, output / "adapter_model.safetensors")
config["target_modules"] = [*config["target_modules"], "gate_proj", "up_proj", "down_proj"]
config["target_parameters"] = None
(output / "adapter_config.json").write_text(json.dumps(config, indent=2))
