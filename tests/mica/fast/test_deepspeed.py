"""DeepSpeed's ZeRO in two gloo processes on the CPU, where it is installed; it builds an operator first."""

import os

import pytest
import torch
import torch.distributed as dist

import mica.fast
from tests.support import gloo
from tests.support.models import bases, tiny_llama, wrap
from tests.support.training import STEPS, batches, eager_losses, llama, optimizer_of, trainable

pytest.importorskip("deepspeed")

FP32 = 1e-3  # of a loss, relative; with stock PEFT, too, the third loss is 2e-4 off the plain run's


def partitioned():
    """As `from_pretrained` builds a model under ZeRO-3: every weight is a part of one from the beginning."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    settings = HfDeepSpeedConfig(config(3))  # PEFT gathers weights as long as this lives
    whole = tiny_llama(initializer_range=0.3)
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        base = tiny_llama(initializer_range=0.3)
    for name, parameter in base.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(whole.get_parameter(name))
    model = wrap(base, targets="all-linear").train()
    del settings
    return model


def config(stage):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def whole_bases(model):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(bases(model).values())):
        return {name: B.detach().clone() for name, B in bases(model).items()}


def run(rank, build, stage, enabled=True):
    import deepspeed

    model = build()
    first_B = whole_bases(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config(stage))
    before, losses = mica.fast.call_counts.copy(), []
    if not enabled:
        mica.fast.disable()
    for ids in batches()[:, 2 * rank : 2 * rank + 2]:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    losses = torch.tensor(losses)
    dist.all_reduce(losses)
    rows = mica.fast.explain(model).rows
    mica.fast.enable()
    last_B = whole_bases(model)
    return {
        "losses": losses / 2,
        "counts": dict(mica.fast.call_counts - before),
        "reasons": {(row.path, row.reason) for row in rows},
        "moved": [name for name in first_B if not torch.equal(first_B[name], last_B[name])],
        "B": last_B,
        "trainable": {name.split(".")[-3] for name in trainable(model)},
    }


def scenarios(rank):
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29731",
    )
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    return {
        "stage 2": run(rank, llama, 2),
        "stage 3": run(rank, llama, 3),
        "stage 3, stock": run(rank, llama, 3, enabled=False),
        "stage 3, partitioned": run(rank, partitioned, 3),
    }


@pytest.fixture(scope="module")
def results():
    return gloo.run(scenarios)


def check(results, name, expected):
    pair = [result[name] for result in results]
    assert ((pair[0]["losses"] - expected).abs() / expected).max() <= FP32
    for result in pair:
        assert result["trainable"] == {"lora_A"}
        assert result["moved"] == []
        for layer, B in result["B"].items():
            assert torch.equal(B, pair[0]["B"][layer])
            assert (B.T @ B - torch.eye(4)).abs().max() <= 1e-6
    return pair[0]


def test_zero_2_is_on_the_fast_path(results):
    result = check(results, "stage 2", eager_losses())
    assert result["counts"] == {"linear": 14 * STEPS, "linear_backward": 14 * STEPS}


@pytest.mark.parametrize("name", ["stage 3", "stage 3, partitioned"])
def test_zero_3_runs_on_pefts_path(results, name):
    """It gathers weights in hooks of the very modules whose weights the backend would read."""
    result = check(results, name, eager_losses())
    assert result["counts"] == {}
    assert result["reasons"] == {("peft", "hooks on the base layer")}
    assert result["losses"].tolist() == results[0]["stage 3, stock"]["losses"].tolist()
