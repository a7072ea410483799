"""The set-ups in mica/fast/SETUPS.md, and for the ways of training among them the runs that test them."""

import os
import re
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.support import tp_models
from tests.support.models import adapted_layers, tiny_llama, wrap
from tests.support.moe_models import BUILDERS, STACKS, wrap_experts
from tests.support.pages import read
from tests.support.stock import as_graph
from tests.support.training import FACTOR_A, STEPS, Run, batches, of_dora, of_lora, optimizer_of, train

PAGE = "mica/fast/SETUPS.md"
BF16 = torch.bfloat16


class Setup(NamedTuple):
    """A row of one of the tables."""

    name: str
    works: str  # "yes", "stand-in" (as tested with one) or "refused" (an error that says why in one sentence)
    fast: str  # runs on this backend: "yes", "partly" or "no" (PEFT's own code)
    test: str  # path::function
    group: str  # the heading above its table


HEAD = ["| set-up | works | fast path | test |", "| --- | --- | --- | --- |"]
ROW = re.compile(r"\| (.*) \| ([\w-]+) \| (\w+) \| \[(\w+)\]\(\.\./\.\./(.*)\) \|")


def setups() -> dict[str, Setup]:
    """The rows of all tables, by name."""
    between = read(PAGE).partition("<!-- setups -->")[2].partition("<!-- /setups -->")[0]
    found = {}
    for section in between.split("\n## ")[1:]:
        group, *lines = [line for line in section.splitlines() if line]
        assert lines[:2] == HEAD, group
        for line in lines[2:]:
            match = ROW.fullmatch(line)
            assert match is not None, line
            name, works, fast, test, file = match.groups()
            assert name not in found, name
            found[name] = Setup(name, works, fast, f"{file}::test_{test}", group)
    return found


# -- one process --------------------------------------------------------------------------------------


def scaled(model):
    """Within fp16's autocast, with a gradient scaler that skips no step for an Inf."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(loss, optimizer):
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    losses = train(model, step=step, autocast=torch.float16)
    assert scaler.get_scale() == 1024.0
    return losses


def within_autocast(model):
    with torch.autocast("cpu", BF16):
        return train(model)


def accumulated(model, mixed_precision):
    """By accelerate: two half batches a step are one whole one."""
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=2, cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    losses = []
    for half in batches().flatten(0, 1).split(2):
        with accelerator.accumulate(prepared):
            loss = prepared(input_ids=half, labels=half).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses).view(STEPS, 2).mean(1)


AUTOCAST = partial(train, autocast=BF16)
TWICE = {"linear": 28, "linear_backward": 28}
CONFIGURATIONS = "rsLoRA, `rank_pattern`, `alpha_pattern`, `modules_to_save`"

ONE_PROCESS: dict[str, list[Run]] = {
    "`torch.compile(fullgraph=True)`": [
        # C++ for one layer takes half a minute
        Run({"num_hidden_layers": 1}, around=partial(torch.compile, fullgraph=True)),
        Run(around=as_graph),
    ],
    "autocast, bf16": [Run(train=AUTOCAST, dtype=BF16)],
    "one autocast context around the whole training loop": [
        Run(train=within_autocast, reference=AUTOCAST, dtype=BF16)
    ],
    "autocast, fp16, with `GradScaler`": [Run(train=scaled, dtype=torch.float16)],
    "bf16 base, fp32 adapters": [Run({"dtype": BF16}, dtype=BF16)],
    "gradient checkpointing, reentrant or not": [Run(use_reentrant=True), Run(use_reentrant=False)],
    "accelerate: bf16, gradient accumulation": [
        Run(train=partial(accumulated, mixed_precision="no"), reference=train, counts=TWICE),
        Run(train=partial(accumulated, mixed_precision="bf16"), reference=AUTOCAST, dtype=BF16, counts=TWICE),
    ],
    CONFIGURATIONS: [
        Run({"use_rslora": True}),
        Run({"rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2}}),
        Run({"alpha_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 32}}),
        Run({"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 5}, "use_rslora": True}),
        Run({"modules_to_save": ["lm_head"]}, trained=rf"{FACTOR_A}|lm_head\.modules_to_save\."),
        Run({"targets": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    ],
    '`bias="lora_only"`': [
        Run(
            {"bias": "lora_only", "base": {"attention_bias": True}},
            trained=rf"{FACTOR_A}|_proj\.base_layer\.bias$",
            said={"base layer called: the base bias is trainable": 8},  # q, k, v, o
            counts={"linear": 14, "linear_backward": 14, "linear_added": 8},
        )
    ],
}

LORA = "plain LoRA (`enable(lora=True)`): "
WITH_LORA = {  # row: those above whose runs are LoRA's, too
    "autocast, bf16 base, gradient checkpointing, accelerate, configurations as below": (
        "autocast, bf16",
        "bf16 base, fp32 adapters",
        "gradient checkpointing, reentrant or not",
        "accelerate: bf16, gradient accumulation",
        CONFIGURATIONS,
    ),
    "`torch.compile(fullgraph=True)`": ("`torch.compile(fullgraph=True)`",),
}
ONE_PROCESS |= {
    f"{LORA}{name}": [of_lora(run) for row in rows for run in ONE_PROCESS[row]]
    for name, rows in WITH_LORA.items()
}

# -- two processes ------------------------------------------------------------------------------------


def mesh(**options):
    return init_device_mesh("cpu", (dist.get_world_size(),), **options)


def shard(model, **options):
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


def units_of_lora_a(model):
    """lora_A alone in a unit, as PEFT's own FSDP policy has it: the layer cannot read its weight."""
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            fully_shard(module, mesh=mesh())
    return shard(model)


def unit_of_the_embedding(model):
    """As accelerate has it. The layer itself is the unit, and of another class from then on."""
    fully_shard(model.get_input_embeddings(), mesh=mesh())
    return shard(model)


def units_of_layers(model):
    """Every norm and every adapted layer a unit; of the other kind, every base layer in it."""
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            fully_shard(module, mesh=mesh())
    for number, layer in enumerate(adapted_layers(model).values()):
        fully_shard(layer.base_layer if number % 2 else layer, mesh=mesh())
    return shard(model)


def loaded_by_the_first():
    """A model whose weights are in the first process only; no process waits for the others' share.

    Stock PEFT raises in the others ("incompatible tensor type").
    """
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    try:
        start = time.perf_counter()
        base = tiny_llama(initializer_range=0.3)
        for module in base.modules() if dist.is_initialized() and dist.get_rank() else ():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(p.to("meta"), requires_grad=False)
        model = wrap(base, targets="all-linear").train()
        assert time.perf_counter() - start < 30  # a wait for a process that does not come takes 300 s
        return model
    finally:
        del os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]


def prepared(model):
    """What `Accelerator.prepare` does under FSDP2. Called by itself: on CPUs it ignores its FSDP plugin."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh(mesh_dim_names=("dp",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp"]),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def moe(kind):
    targets = {"target_parameters": STACKS, "target_modules": ["q_proj", "o_proj"]}
    return wrap_experts(BUILDERS[kind](), **targets).train()


def tensor_parallel(dtype=torch.float32, targets="all-linear", **config):
    return wrap(tp_models.made(dtype=dtype), targets=targets, **config).train()


DDP = Run(around=DistributedDataParallel)
FSDP = Run(around=shard)
TP = Run(make=tensor_parallel, is_stock=False, is_shared=False)
EXPERTS = {f"{name}{way}": 4 for name in ("linear", "experts_linear") for way in ("", "_backward")}

TWO_PROCESSES: dict[str, list[Run]] = {
    "DDP": [DDP, replace(DDP, config={"dtype": BF16}, dtype=BF16)],
    "DDP with gradient checkpointing": [replace(DDP, use_reentrant=True), replace(DDP, use_reentrant=False)],
    "FSDP2": [
        FSDP,
        replace(
            FSDP, config={"dtype": BF16, "autocast_adapter_dtype": False}, dtype=BF16, adapter_dtype=BF16
        ),
    ],
    # FSDP2 wants one dtype of what is trained in a unit, not of all that is in it
    "FSDP2, fp32 adapters over a bf16 base": [replace(FSDP, config={"dtype": BF16}, dtype=BF16)],
    "FSDP2, mixed precision": [
        Run(
            around=partial(shard, mp_policy=MixedPrecisionPolicy(param_dtype=BF16)),
            reference=AUTOCAST,
            dtype=BF16,
        )
    ],
    "FSDP2 with gradient checkpointing": [replace(FSDP, use_reentrant=False)],
    "FSDP2 through accelerate, `cpu_ram_efficient_loading`": [Run(make=loaded_by_the_first, around=prepared)],
    "FSDP2 with `lora_A` as its own unit": [Run(around=units_of_lora_a)],
    # a unit's weights are gathered where its own forward runs; a base layer that is one is called
    "FSDP2 with adapted layers, or their base layers, as units": [
        Run(
            around=units_of_layers,
            counts={"linear": 14, "linear_backward": 14, "linear_added": 7},
            said={"base layer called: a base layer of type FSDPLinear": 7},
        )
    ],
    "FSDP2 with an adapted embedding as its own unit (accelerate)": [
        Run(
            {"targets": ["q_proj", "embed_tokens"]},
            around=unit_of_the_embedding,
            counts={"linear": 2, "linear_backward": 2, "embedding": 1, "embedding_backward": 1},
        )
    ],
    "experts, DDP and FSDP2": [
        replace(DDP, make=moe, config={"kind": "qwen3_moe"}, counts=EXPERTS),
        replace(FSDP, make=moe, config={"kind": "mixtral"}, counts=EXPERTS),
        replace(
            FSDP,
            make=moe,
            config={"kind": "gpt_oss"},
            use_reentrant=False,
            counts={**EXPERTS, "linear": 8, "experts_linear": 8},
        ),
    ],
    "tensor parallelism of transformers, with autocast, checkpointing or a bf16 base": [
        TP,
        replace(TP, train=AUTOCAST, dtype=BF16),
        replace(TP, config={"dtype": BF16}, dtype=BF16),
        replace(TP, use_reentrant=False),
    ],
}
TWO_PROCESSES |= {
    f"{LORA}DDP, FSDP2": [
        of_lora(run) for name in ("DDP", "FSDP2", "FSDP2, mixed precision") for run in TWO_PROCESSES[name]
    ],
    "DoRA (`enable(lora=True)`): DDP, FSDP2": [
        of_dora(run)
        for name in ("DDP", "FSDP2", "FSDP2, mixed precision", "FSDP2 with gradient checkpointing")
        for run in TWO_PROCESSES[name]
    ],
}
