"""Every way in which PEFT users train, in one process or two: by the operators, with a plain run's losses."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from trl import SFTConfig, SFTTrainer

import mica.fast
from mica.subspace import many
from tests.support import gloo, setups, tiny_cli
from tests.support.models import bases, net, tiny_llama, wrap
from tests.support.moe_models import BUILDERS, wrap_experts
from tests.support.peft_versions import is_at_least
from tests.support.stock import assert_same
from tests.support.training import (
    Run,
    batches,
    check,
    follows,
    llama,
    optimizer_of,
    report,
    train,
)

PATHS = {"yes": "reference", "no": "peft"}  # of `explain`, by the column "fast path"
FULL = state_dict.StateDictOptions(full_state_dict=True)  # in every process


def runs(table):
    return [
        pytest.param(name, number, id=f"{name}-{number}", marks=[pytest.mark.slow] * ("compile" in name))
        for name in table
        for number in range(len(table[name]))
    ]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    for state in 2 * (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.parametrize(("name", "number"), runs(setups.ONE_PROCESS))
def test_in_one_process(name, number):
    run = setups.ONE_PROCESS[name][number]
    check(run.done(), run.expected(), run, path=PATHS[setups.setups()[name].fast])


@pytest.mark.parametrize(
    "run", setups.ONE_PROCESS[setups.CONFIGURATIONS], ids=lambda run: ",".join(run.config)
)
def test_a_configuration_does_something(run):
    assert run.expected()[-1] != pytest.approx(Run().expected()[-1].item(), abs=1e-4)


# -- trainers -----------------------------------------------------------------------------------------


OPTIONS = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "max_grad_norm": 0.0,
    "weight_decay": 0.01,  # torch's default, so that `train` is the same run
}


def losses_of(trainer, **options):
    """The losses of every forward, unrounded."""
    seen, compute_loss = [], trainer.compute_loss

    def recorded(*args, **kwargs):
        result = compute_loss(*args, **kwargs)
        seen.append((result[0] if isinstance(result, tuple) else result).item())
        return result

    trainer.compute_loss = recorded
    trainer.train(**options)
    return seen


def test_trainer_saves_and_resumes(tmp_path):
    """Four steps in one go are the plain loop's; two, a new model, and the other two are the same bits.

    Of linear layers and of experts.
    """
    run = Run({"kind": "qwen3_moe"}, setups.moe, reference=lambda model: train(model, batches(4)))
    run = replace(run, counts=setups.EXPERTS)

    def trainer(folder, **options):
        model = run.make(**run.config)
        rows = [{"input_ids": ids, "labels": ids} for ids in batches(1)[0]]
        arguments = TrainingArguments(str(tmp_path / folder), **{**OPTIONS, "max_steps": 4, **options})
        return model, Trainer(model=model, args=arguments, train_dataset=rows)

    model, whole = trainer("whole")
    done = report(model, lambda: losses_of(whole))
    check(done, run.expected(), run, steps=4)
    first = losses_of(trainer("parts", save_strategy="steps", save_steps=2, max_steps=2)[1])
    model, second = trainer("parts")
    checkpoint = str(tmp_path / "parts" / "checkpoint-2")
    resumed = report(model, lambda: losses_of(second, resume_from_checkpoint=checkpoint))
    assert torch.equal(torch.cat([torch.tensor(first), resumed["losses"]]), done["losses"])
    assert {name: 2 * count for name, count in resumed["counts"].items()} == done["counts"]
    assert resumed["moved"] == []
    assert_same(resumed["A"], done["A"], 0.0)
    assert all(A.any() for A in resumed["A"].values())


def test_sft_trainer_with_peft_config(tmp_path):
    """trl wraps the model itself, and turns gradient checkpointing and bf16 on by default."""
    starts = (0, 40, 80, 120)
    rows = Dataset.from_dict({"text": [tiny_cli.TEXT[start : start + 40] for start in starts]})

    def trainer():
        torch.manual_seed(0)
        config = LoraConfig(init_lora_weights="mica", r=4, lora_alpha=8, target_modules="all-linear")
        arguments = SFTConfig(str(tmp_path), **OPTIONS, max_steps=4, max_length=32, bf16=True)
        return SFTTrainer(
            model=tiny_cli.tiny_llama(initializer_range=0.3),
            args=arguments,
            train_dataset=rows,
            peft_config=config,
            processing_class=tiny_cli.byte_tokenizer(),
        )

    ours, stock = trainer(), trainer()
    done = report(ours.model, lambda: losses_of(ours))
    with mica.fast.disabled():
        expected = losses_of(stock)
    reentrant = False if ours.args.gradient_checkpointing else None
    check(done, expected, Run(use_reentrant=reentrant, dtype=torch.bfloat16), steps=4)


# -- two processes ------------------------------------------------------------------------------------


def fsdp_resumed(rank, folder):
    """Two steps, a full state dict of model and optimizer, a new model, two more steps; a saved adapter."""
    reports, states = [], None
    for _ in range(2):
        model = setups.shard(llama())
        optimizer = optimizer_of(model)
        if states:
            parts = {"model_state_dict": states[0], "optim_state_dict": states[1]}
            state_dict.set_state_dict(model, optimizer, **parts, options=FULL)
        run = replace(
            setups.FSDP,
            make=lambda model=model: model,
            around=lambda model: model,
            train=lambda model, data, optimizer=optimizer: train(model, data[:2], optimizer=optimizer),
        )
        reports.append(run.done(rank))
        states = state_dict.get_state_dict(model, optimizer, options=FULL)
    states = state_dict.get_model_state_dict(model, options=FULL)
    if rank == 0:
        model.save_pretrained(folder, state_dict=states)
    return {**reports[1], "losses": torch.cat([done["losses"] for done in reports])}


def adapter_after_sharding(rank, folder):
    return wrap(fully_shard(tiny_llama(), mesh=setups.mesh()), targets="all-linear")


def with_fsdp1(rank, folder):
    """The losses, and what `explain` says before and after: between calls its shards are flat."""
    model = llama()
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    rows = mica.fast.explain(model).rows
    losses = train(sharded, batches()[:, 2 * rank : 2 * rank + 2])
    dist.all_reduce(losses)
    return losses / 2, rows + mica.fast.explain(model).rows


def bases_of_both(rank, folder):
    """Those of layers and of stacks of experts, and how many this process has solved itself."""
    with patch.object(many, "solve_stack", wraps=many.solve_stack) as solver:
        models = [net(), wrap_experts(BUILDERS["qwen3_moe"]())]
    found = {name: basis.detach() for model in models for name, basis in bases(model).items()}
    return found, solver.call_count


OTHERS = {
    "resumed": fsdp_resumed,
    "adapter after sharding": adapter_after_sharding,
    "FSDP1": with_fsdp1,
    "bases": bases_of_both,
}


def scenarios(rank, folder):
    """All in one launch, which takes longer than the runs; an error in the place of a result."""
    results = {name: gloo.attempt(function, rank, folder) for name, function in OTHERS.items()}
    for name, table in setups.TWO_PROCESSES.items():
        for number, run in enumerate(table):
            if run.make is not setups.tensor_parallel or is_at_least("0.21"):
                results[name, number] = gloo.attempt(run.done, rank)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return gloo.run(scenarios, str(folder)), folder


@pytest.fixture
def of(results):
    return lambda name: gloo.pair(results[0], name)


def check_both(pair, *arguments, **options):
    for done in pair:
        check(done, *arguments, **options)
    for part in ("A", "B"):
        assert_same(*(done[part] for done in pair), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), runs(setups.TWO_PROCESSES))
def test_in_two_processes(of, name, number):
    """Each on half of the batch, or with a part of every layer: the losses of one with all of it."""
    run = setups.TWO_PROCESSES[name][number]
    if run.make is setups.tensor_parallel and not is_at_least("0.21"):
        pytest.skip("PEFT < 0.21: a layer that is split is refused, as a shard")
    check_both(of((name, number)), run.expected(), run, path=PATHS[setups.setups()[name].fast])


@pytest.mark.slow
def test_fsdp2_saves_resumes_and_leaves_a_plain_adapter(of, results):
    pair = of("resumed")
    check_both(pair, Run(reference=lambda model: train(model, batches(4))).expected(), steps=2)
    loaded = PeftModel.from_pretrained(tiny_llama(initializer_range=0.3), results[1])
    weights = dict(loaded.named_parameters())
    for name, A in pair[0]["A"].items():
        assert torch.equal(weights[name], A)


@pytest.mark.slow
def test_fsdp1_trains_on_pefts_path_and_explain_says_why(of):
    for losses, rows in of("FSDP1"):
        follows(losses, Run().expected())
        reason = "the lora_A is flat, as FSDP1 shards it (FSDP2 does not)"
        assert {(row.path, row.reason) for row in rows} == {("peft", reason)}


@pytest.mark.slow
def test_two_processes_hold_the_same_bits_and_solve_a_share_each(of):
    expected, solved_alone = bases_of_both(0, None)
    found, solved = zip(*of("bases"), strict=True)
    for done in found:
        assert_same(done, expected, 0.0)
    assert sum(solved) == solved_alone
    assert min(solved) > 0


# -- refused ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_adapter_after_sharding_is_refused(of):
    what = r"layer 'model\.layers.*' holds one shard of it .*before the model is sharded"
    with pytest.raises(ValueError, match=what):
        of("adapter after sharding")
