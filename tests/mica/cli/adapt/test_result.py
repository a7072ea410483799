"""What a run leaves behind: adapter, tokenizer, merged model."""

import json
import re

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from mica.cli.adapt import adapter, base, result
from mica.cli.loading import find_source
from mica.errors import UsageError
from tests.support.adapt_runs import adapter_settings as settings
from tests.support.adapt_runs import factors, move, write_adapter
from tests.support.tiny_cli import byte_tokenizer, logits, tiny_llama


@pytest.fixture
def tuned():
    model = adapter.start(tiny_llama(), settings())
    move(model)
    return model


def test_saved_adapter_replaces_an_older_one_and_nothing_else(tuned, tmp_path):
    write_adapter(tmp_path, rank=2)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "README.md").write_text("ours")
    before = {path.name for path in tmp_path.iterdir() if path.is_file()}

    result.save(tuned, byte_tokenizer(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*before, "checkpoint-1"}
    assert (tmp_path / "README.md").read_text() == "ours"
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(tuned))


@pytest.mark.parametrize(("kind", "dtype"), [("nf4", "float32"), ("nf4", "bfloat16"), ("int8", "float32")])
def test_merge_of_a_quantised_run_is_into_the_base_as_it_was(kind, dtype, model_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.use_deterministic_algorithms(False)  # bitsandbytes has no such version of its operators
    args = settings(model=str(model_dir), output=tmp_path, quantize=kind, dtype=dtype)
    model = adapter.start(base.load(args, find_source(args.model, False)), args)
    move(model)
    result.save(model, byte_tokenizer(), tmp_path)
    result.merge(model, byte_tokenizer(), args)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    exact = adapter_sums(model)
    assert len(exact) == 4
    for name, weight in tiny_llama().to(getattr(torch, dtype)).state_dict().items():
        update = exact.get(name.removesuffix(".weight"), 0)
        torch.testing.assert_close(merged[name], (weight.double() + update).to(weight.dtype))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def adapter_sums(model) -> dict[str, torch.Tensor]:
    """s·B·A by the name of the layer, in float64."""
    a = factors(model, "A")
    b = factors(model, "B")
    sums = {name: 2.0 * b[name.replace("lora_A", "lora_B")].double() @ a[name].double() for name in a}
    return {
        re.sub(r"^base_model\.model\.(.*)\.lora_A\..*", r"\1", name): delta for name, delta in sums.items()
    }


def test_adapter_that_is_not_finite_is_not_merged(tuned, tmp_path):
    next(w for name, w in tuned.named_parameters() if "lora_A" in name).data[0, 0] = torch.nan
    said = r"^--merge .*NaNs detected in the merged weights.*the adapter is in"
    with pytest.raises(UsageError, match=said):
        result.merge(tuned, byte_tokenizer(), settings(output=tmp_path))
    assert not list(tmp_path.iterdir())


def test_sharded_model_is_saved_and_merged_whole(model_dir, tmp_path):
    """FSDP2 in a group of one: all weights are DTensors, as in a larger one.

    A forward alone leaves the output layer unsharded, in memory that FSDP frees while PEFT saves.
    """
    options = {"train_embeddings": True, "embedding_learning_rate": 1e-3}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = adapter.start(AutoModelForCausalLM.from_pretrained(model_dir), settings(**options))
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
        result.merge(model, byte_tokenizer(), settings(model=str(model_dir), output=tmp_path))
        assert result.gathered(model)  # still sharded
    finally:
        dist.destroy_process_group()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
