"""Training in two gloo processes on halves of the batch: the losses of one process with the whole one."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import mica.fast
from tests.support import gloo
from tests.support.models import adapted_layers, bases, tiny_llama, wrap
from tests.support.training import (
    STEPS,
    batches,
    eager_losses,
    follows,
    llama,
    optimizer_of,
    train,
    trainable,
)

FULL = StateDictOptions(full_state_dict=True)  # in every process


def halves(rank, count):
    return batches(count)[:, 2 * rank : 2 * rank + 2]


def run(model, rank, wrapped=None, count=STEPS, **options):
    """One rank's share of a run: what every scenario reports."""
    first_B = {name: full(B).clone() for name, B in bases(model).items()}
    before = mica.fast.call_counts.copy()
    losses = train(wrapped or model, halves(rank, count), **options)
    dist.all_reduce(losses)
    return {
        "losses": losses / 2,
        "counts": dict(mica.fast.call_counts - before),
        "paths": mica.fast.explain(model).counts(),
        "trainable": {name.split(".")[-3] for name in trainable(model)},
        "moved": [name for name, B in bases(model).items() if not torch.equal(full(B), first_B[name])],
        "B": {name: full(B) for name, B in bases(model).items()},
        "A": {name: full(p).detach() for name, p in trainable(model).items()},
        "dtypes": {p.dtype for p in trainable(model).values()},
    }


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ---------------------------------------------------------------------------------------------------
# what two processes do
# ---------------------------------------------------------------------------------------------------


def ddp(rank, **config):
    model = llama(**config)
    return run(model, rank, DistributedDataParallel(model))


def ddp_checkpointed(rank, use_reentrant):
    model = llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return run(model, rank, DistributedDataParallel(model))


def shard(model, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp(rank, policy=None, **config):
    model = shard(llama(**config), **({"mp_policy": policy} if policy else {}))
    return run(model, rank)


def fsdp_checkpointed(rank):
    model = llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return run(shard(model), rank)


def fsdp_own_units(rank):
    """lora_A alone in a unit, as PEFT's own FSDP policy has it: the layer cannot read its weight."""
    model = llama()
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return run(shard(model), rank)


def fsdp_unit_of_the_embedding(rank):
    """As accelerate has it. The layer itself is the unit, and of another class from then on."""
    model = llama(targets=["q_proj", "embed_tokens"])
    fully_shard(model.get_input_embeddings(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return run(shard(model), rank)


def fsdp_units_of_layers(rank):
    """Every adapted layer a unit; of the other kind, every base layer in it."""
    model, mesh = llama(), init_device_mesh("cpu", (dist.get_world_size(),))
    for number, layer in enumerate(adapted_layers(model).values()):
        fully_shard(layer.base_layer if number % 2 else layer, mesh=mesh)
    return {**run(shard(model), rank), "text": str(mica.fast.explain(model))}


def fsdp_resumed(rank, folder):
    """Two steps, a full state dict of model and optimizer, a new model, two more steps; a saved adapter."""
    model = shard(llama())
    optimizer = optimizer_of(model)
    first = run(model, rank, count=2, optimizer=optimizer)
    states = get_state_dict(model, optimizer, options=FULL)
    model = shard(llama())
    optimizer = optimizer_of(model)
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1], options=FULL)
    second = run(model, rank, count=2, optimizer=optimizer)
    states = get_model_state_dict(model, options=FULL)
    if rank == 0:
        model.save_pretrained(folder, state_dict=states)
    return {**second, "losses": torch.cat([first["losses"], second["losses"]])}


def accelerate(rank):
    """What `Accelerator.prepare` does under FSDP2, with weights in the first process only.

    Called by itself: on CPUs the Accelerator ignores its FSDP plugin.
    """
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    try:
        start = time.perf_counter()
        base = tiny_llama(initializer_range=0.3)
        if rank:
            for module in base.modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        module._parameters[name] = torch.nn.Parameter(p.to("meta"), requires_grad=False)
        model = wrap(base, targets="all-linear").train()
        seconds = time.perf_counter() - start
    finally:
        del os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp"]),
        mixed_precision="no",
        is_main_process=rank == 0,
        device=torch.device("cpu"),
    )
    return {**run(fsdp2_prepare_model(accelerator, model), rank), "seconds": seconds}


def adapter_after_sharding(rank):
    model = tiny_llama()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return wrap(fully_shard(model, mesh=mesh), targets="all-linear")


BF16 = torch.bfloat16
SCENARIOS = {
    "DDP": lambda rank, _: ddp(rank),
    "DDP, bf16 base": lambda rank, _: ddp(rank, dtype=BF16),
    "DDP, reentrant checkpoints": lambda rank, _: ddp_checkpointed(rank, True),
    "DDP, checkpoints": lambda rank, _: ddp_checkpointed(rank, False),
    "FSDP2": lambda rank, _: fsdp(rank),
    "FSDP2, bf16 base": lambda rank, _: fsdp(rank, dtype=BF16),
    "FSDP2, bf16 adapters": lambda rank, _: fsdp(rank, dtype=BF16, autocast_adapter_dtype=False),
    "FSDP2, mixed precision": lambda rank, _: fsdp(rank, MixedPrecisionPolicy(param_dtype=BF16)),
    "FSDP2, checkpoints": lambda rank, _: fsdp_checkpointed(rank),
    "FSDP2, units of lora_A": lambda rank, _: fsdp_own_units(rank),
    "FSDP2, units of layers": lambda rank, _: fsdp_units_of_layers(rank),
    "FSDP2, unit of the embedding": lambda rank, _: fsdp_unit_of_the_embedding(rank),
    "FSDP2, resumed": fsdp_resumed,
    "FSDP2, accelerate": lambda rank, _: accelerate(rank),
    "FSDP2, adapter after sharding": lambda rank, _: adapter_after_sharding(rank),
}


def scenarios(rank, folder):
    """All in one launch, which takes longer than the runs."""
    results = {}
    for name, scenario in SCENARIOS.items():
        try:
            results[name] = scenario(rank, folder)
        except Exception as error:
            results[name] = error
    return results


# ---------------------------------------------------------------------------------------------------
# what must hold
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return gloo.run(scenarios, str(folder)), folder


@pytest.fixture
def of(results, one_thread):
    def both(name):
        pair = [result[name] for result in results[0]]
        for result in pair:
            if isinstance(result, Exception):
                raise result
        return pair

    return both


def check(pair, expected, dtype=torch.float32, forwards=STEPS, fast=True, backwards=STEPS):
    first, second = pair
    follows(first["losses"], expected, dtype)
    assert first["trainable"] == {"lora_A"}
    for result in pair:
        counts = {"linear": 14 * forwards, "linear_backward": 14 * backwards} if fast else {}
        assert result["counts"] == counts
        assert result["paths"] == {"reference" if fast else "peft": 14}
        assert result["moved"] == []
    for part in ("A", "B"):
        assert first[part].keys() == second[part].keys()
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), name
    identity = torch.eye(4)
    for B in first["B"].values():
        assert (B.T.float() @ B.float() - identity).abs().max() <= (
            1e-6 if B.dtype == torch.float32 else 2e-2
        )


def test_ddp(of):
    check(of("DDP"), eager_losses())


def test_ddp_with_a_bf16_base(of):
    check(of("DDP, bf16 base"), eager_losses(dtype=BF16), BF16)


@pytest.mark.parametrize("name", ["DDP, reentrant checkpoints", "DDP, checkpoints"])
def test_ddp_with_gradient_checkpointing(of, name):
    check(of(name), eager_losses(), forwards=2 * STEPS)


def test_fsdp2(of):
    check(of("FSDP2"), eager_losses())


def test_fsdp2_with_fp32_adapters_over_a_bf16_base(of):
    """It wants one dtype of what is trained in a unit, not of all that is in it."""
    pair = of("FSDP2, bf16 base")
    check(pair, eager_losses(dtype=BF16), BF16)
    assert pair[0]["dtypes"] == {torch.float32}


def test_fsdp2_with_bf16_adapters(of):
    pair = of("FSDP2, bf16 adapters")
    check(pair, eager_losses(dtype=BF16, autocast_adapter_dtype=False), BF16)
    assert pair[0]["dtypes"] == {BF16}


def test_fsdp2_with_mixed_precision(of):
    pair = of("FSDP2, mixed precision")
    check(pair, eager_losses(autocast=BF16), BF16)
    assert pair[0]["dtypes"] == {torch.float32}


def test_fsdp2_with_gradient_checkpointing(of):
    check(of("FSDP2, checkpoints"), eager_losses(), forwards=2 * STEPS)


def test_fsdp2_with_units_of_lora_a_takes_pefts_path(of):
    check(of("FSDP2, units of lora_A"), eager_losses(), fast=False)


def test_fsdp2_with_units_of_layers_and_of_base_layers(of):
    """A unit's weights are gathered where its own forward runs; a base layer that is one is called."""
    pair = of("FSDP2, units of layers")
    follows(pair[0]["losses"], eager_losses())
    for result in pair:
        assert result["paths"] == {"reference": 14}
        assert result["text"].count("base layer called: a base layer of type FSDPLinear") == 7
        forwards = ("linear", "down_projection", "up_projection")
        names = [*forwards, *(f"{name}_backward" for name in forwards)]
        assert result["counts"] == dict.fromkeys(names, 7 * STEPS)
        assert result["moved"] == []


def test_fsdp2_with_a_unit_of_the_embedding(of):
    first, _ = of("FSDP2, unit of the embedding")
    follows(first["losses"], eager_losses(targets=["q_proj", "embed_tokens"]))
    assert first["paths"] == {"reference": 3}
    counts = {"linear": 2, "linear_backward": 2, "embedding": 1, "embedding_backward": 1}
    assert first["counts"] == {name: count * STEPS for name, count in counts.items()}
    assert first["moved"] == []


def test_fsdp2_saves_resumes_and_leaves_a_plain_adapter(of, results):
    pair = of("FSDP2, resumed")
    check(pair, eager_losses(data=batches(4)), forwards=2, backwards=2)
    loaded = PeftModel.from_pretrained(tiny_llama(initializer_range=0.3), results[1])
    weights = dict(loaded.named_parameters())
    for name, A in pair[0]["A"].items():
        assert torch.equal(weights[name], A)


def test_fsdp2_by_accelerate_with_weights_in_the_first_process_only(of):
    """Stock PEFT raises in the others ("incompatible tensor type"). No process waits for their share."""
    pair = of("FSDP2, accelerate")
    check(pair, eager_losses())
    assert pair[0]["seconds"] < 30  # patience with a process that does not come is 60 s


def test_an_adapter_after_sharding_is_refused(of):
    with pytest.raises(
        ValueError, match=r"layer 'model\.layers.*' holds one shard of it .*before the model is sharded"
    ):
        of("FSDP2, adapter after sharding")


def test_a_weight_that_is_not_there_is_refused():
    model = tiny_llama()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj' is on the meta device"):
        wrap(model, targets="all-linear")
