"""A tiny Llama under tensor parallelism in gloo processes, loaded as transformers wants it."""

import os

import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.support.models import tiny_llama


def save_model(folder) -> None:
    """With two heads for two processes."""
    tiny_llama(num_key_value_heads=2).save_pretrained(folder)


def split(folder):
    """Over all processes, by the model's own plan; whole where there is one alone."""
    options = {}
    if dist.is_initialized():
        rank, count = dist.get_rank(), dist.get_world_size()
        # what torchrun sets, and transformers reads
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
        options["distributed_config"] = DistributedConfig(tp_size=count, tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, **options)
