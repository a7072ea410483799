"""What a run leaves behind: adapter and tokenizer."""

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from mica.cli.adapt import adapter, result
from tests.support.adapt_runs import adapter_settings as settings
from tests.support.adapt_runs import move
from tests.support.tiny_cli import byte_tokenizer, logits, tiny_llama


def test_sharded_model_is_saved_whole(model_dir, tmp_path):
    """FSDP2 in a group of one: all weights are DTensors, as in a larger one.

    A forward alone leaves the output layer unsharded, in memory that FSDP frees while PEFT saves.
    """
    args = settings(train_embeddings=True, embedding_learning_rate=1e-3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = adapter.start(AutoModelForCausalLM.from_pretrained(model_dir), args)
        move(model)
        expected = logits(model)
        base, mesh = model.get_base_model(), init_device_mesh("cpu", (1,))
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        last = [base.model.norm, base.lm_head]
        fully_shard(last, mesh=mesh, reshard_after_forward=False)  # as accelerate does
        fully_shard(model, mesh=mesh)
        logits(model)
        result.save(model, None, tmp_path / "best")
        for weight in model.parameters():
            weight.data.mul_(2 if weight.requires_grad else 1)
        result.save(model, byte_tokenizer(), tmp_path, tmp_path / "best")
        assert result.gathered(model)  # still sharded
    finally:
        dist.destroy_process_group()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)
