"""DeepSpeed's ZeRO in two gloo processes on the CPU, where it is installed: `make test-deepspeed`.

It compiles an operator first, once on a machine.
"""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist

import mica.fast
from tests.support import gloo
from tests.support.models import tiny_llama, wrap
from tests.support.training import Run, check, optimizer_of, train

pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-deepspeed")
pytestmark = pytest.mark.slow

# Its losses are 1e-3 off at most, relative; with stock PEFT, too, the third is 2e-4 off the plain run's
LOOSE = {"reference": train, "dtype": torch.float16}


def partitioned():
    """As `from_pretrained` builds a model under ZeRO-3: every weight is a part of one from the beginning."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    whole = tiny_llama(initializer_range=0.3)
    if not dist.is_initialized():
        return wrap(whole, targets="all-linear").train()
    settings = HfDeepSpeedConfig(config(3))  # PEFT gathers weights as long as this lives
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


def by_engine(model, data, stage):
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config(stage))
    losses = []
    for ids in data:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return torch.tensor(losses)


STAGE_2, STAGE_3 = (partial(by_engine, stage=stage) for stage in (2, 3))
REPLACED = {"said": {"torch.nn.functional.linear has been monkey-patched": 14}}  # ZeRO-3 has, for good
RUNS = {
    "stage 2": Run(train=STAGE_2, **LOOSE),
    "stage 3": Run(train=STAGE_3, **LOOSE, **REPLACED),
    "stage 3, partitioned": Run(make=partitioned, train=STAGE_3, **LOOSE, **REPLACED),
}


def scenarios(rank):
    alone = {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}
    os.environ.update(alone, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2")
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    results = {name: run.done(rank) for name, run in RUNS.items()}
    with mica.fast.disabled():
        return {**results, "stock": RUNS["stage 3"].done(rank)}


@pytest.fixture(scope="module")
def results():
    return gloo.run(scenarios)


def check_both(results, name, path):
    pair, expected = gloo.pair(results, name), RUNS[name].expected()
    for done in pair:
        check(done, expected, RUNS[name], path=path)
        assert ((done["losses"] - expected).abs() / expected).max() <= 1e-3
        for layer, B in done["B"].items():
            assert torch.equal(B, pair[0]["B"][layer])


def test_zero_2_is_on_the_fast_path(results):
    check_both(results, "stage 2", "reference")


@pytest.mark.parametrize("name", ["stage 3", "stage 3, partitioned"])
def test_zero_3_runs_on_pefts_path(results, name):
    """It gathers weights in hooks of the modules whose weights the backend would read, and in linear."""
    check_both(results, name, "peft")
    assert results[0][name]["losses"].tolist() == results[0]["stock"]["losses"].tolist()
