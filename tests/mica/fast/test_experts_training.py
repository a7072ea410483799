"""Experts in two gloo processes on halves of the batch: the losses of one process with the whole one."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import mica.fast
from tests.support import gloo
from tests.support.moe_models import BUILDERS, STACKS, wrap_experts
from tests.support.training import STEPS, batches, follows, optimizer_of, train, trainable

TARGETS = {"target_parameters": STACKS, "target_modules": ["q_proj", "o_proj"]}


def model_of(kind, dtype=torch.float32):
    return wrap_experts(BUILDERS[kind]().to(dtype), **TARGETS).train()


def bases_of(model):
    return {name: B for name, B in model.named_parameters() if ".lora_B." in name}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run(model, rank, around=None):
    before = {name: full(B).clone() for name, B in bases_of(model).items()}
    counts = mica.fast.call_counts.copy()
    losses = train(around or model, batches()[:, 2 * rank : 2 * rank + 2])
    dist.all_reduce(losses)
    return {
        "losses": losses / 2,
        "counts": dict(mica.fast.call_counts - counts),
        "paths": mica.fast.explain(model).counts(),
        "moved": [name for name, B in bases_of(model).items() if not torch.equal(full(B), before[name])],
        "A": {name: full(A).detach() for name, A in trainable(model).items()},
    }


def ddp(rank, kind):
    model = model_of(kind)
    return run(model, rank, DistributedDataParallel(model))


def fsdp(rank, kind, checkpointed=False):
    model = model_of(kind)
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return run(fully_shard(model, mesh=mesh), rank)


SCENARIOS = {
    "DDP": lambda rank: ddp(rank, "qwen3_moe"),
    "FSDP2": lambda rank: fsdp(rank, "mixtral"),
    "FSDP2, checkpoints": lambda rank: fsdp(rank, "gpt_oss", checkpointed=True),
}
KINDS = {"DDP": "qwen3_moe", "FSDP2": "mixtral", "FSDP2, checkpoints": "gpt_oss"}


def scenarios(rank):
    return {name: scenario(rank) for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module")
def results():
    pair = gloo.run(scenarios)
    for result in pair:
        if isinstance(result, Exception):
            raise result
    return pair


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_follow_one(results, name, one_thread):
    model = model_of(KINDS[name])
    with mica.fast.disabled():
        expected = train(model)
    first, second = (result[name] for result in results)
    follows(first["losses"], expected)
    forwards = 2 * STEPS if "checkpoints" in name else STEPS
    for result in (first, second):
        assert result["counts"] == {
            "linear": 4 * forwards,
            "linear_backward": 4 * STEPS,
            "experts_linear": 4 * forwards,
            "experts_linear_backward": 4 * STEPS,
        }
        assert result["paths"] == {"reference": 8}
        assert result["moved"] == []
    for key, A in first["A"].items():
        assert torch.equal(A, second["A"][key]), key


def test_trainer_saves_and_resumes(tmp_path, one_thread):
    """Four steps, and two steps, a checkpoint, two steps: the same weights to the bit."""

    def trainer(folder, steps):
        model = model_of("qwen3_moe")
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        data = [{"input_ids": ids, "labels": ids} for ids in batches(1)[0].repeat(3, 1)]
        return model, Trainer(model=model, args=arguments, train_dataset=data)

    model, whole = trainer(tmp_path / "whole", 4)
    whole.train()
    _, first = trainer(tmp_path / "parts", 2)
    first.train()
    resumed, second = trainer(tmp_path / "parts", 4)
    frozen = {name: B.clone() for name, B in bases_of(resumed).items()}
    second.train(resume_from_checkpoint=True)
    weights = dict(resumed.named_parameters())
    for name, A in trainable(model).items():
        assert torch.equal(weights[name], A), name
        assert (A != 0).any()
    for name, B in bases_of(resumed).items():
        assert not B.requires_grad
        assert torch.equal(B, frozen[name]), name


def test_optimizer_of_experts_trains_only_a():
    assert {name.split(".")[-3] for name in trainable(model_of("mixtral"))} == {"lora_A"}
    assert len(optimizer_of(model_of("mixtral")).param_groups[0]["params"]) == 8
