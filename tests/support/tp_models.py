"""A tiny Llama under tensor parallelism in gloo processes, loaded as transformers wants it."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.support.models import tiny_llama

# Two heads for two processes, weights large enough that a few steps learn something. The uneven one has an
# intermediate size that two processes cannot split evenly, and biases.
MODELS = {
    "even": {"num_key_value_heads": 2, "initializer_range": 0.3},
    "uneven": {
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "intermediate_size": 25,
        "attention_bias": True,
        "mlp_bias": True,
    },
}


def save_models(folder: Path) -> None:
    for name, config in MODELS.items():
        model = tiny_llama(**config)
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):  # transformers starts them at 0
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)


def split(folder, name="even", **kwargs):
    """Over all processes, by the model's own plan; whole where there is one alone."""
    if dist.is_initialized():
        rank, count = dist.get_rank(), dist.get_world_size()
        # what torchrun sets, and transformers reads
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
        kwargs["distributed_config"] = DistributedConfig(tp_size=count, tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(Path(folder) / name, **kwargs)


def made(name="even", **kwargs):
    """Saved, and loaded again by `split`."""
    with tempfile.TemporaryDirectory() as folder:
        if not dist.is_initialized():
            save_models(Path(folder))
            return split(folder, name, **kwargs)
        folders = [folder]
        dist.broadcast_object_list(folders)
        save_models(Path(folders[0]))  # of which transformers does nothing but in the first process
        dist.barrier()
        model = split(folders[0], name, **kwargs)
        dist.barrier()
        return model


def part(tensor):
    """What this process holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()
