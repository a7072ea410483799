"""Every way in which PEFT users train, in one process: on the fast path, with the losses of a plain run."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import mica.fast
from tests.support import models
from tests.support.tiny_cli import TEXT, byte_tokenizer, tiny_llama
from tests.support.training import (
    STEPS,
    batches,
    eager_losses,
    follows,
    llama,
    on_the_fast_path,
    optimizer_of,
    train,
    trainable,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------------
# compiled, in mixed precision, with checkpoints
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile_fullgraph(backend):
    torch.compiler.reset()
    layers = 1 if backend == "inductor" else 2  # C++ for one layer takes half a minute
    model = llama(num_hidden_layers=layers)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with on_the_fast_path(model, STEPS):
        losses = train(compiled)
    follows(losses, eager_losses(num_hidden_layers=layers))


def test_autocast_bf16():
    model = llama()
    with on_the_fast_path(model, STEPS):
        losses = train(model, autocast=torch.bfloat16)
    follows(losses, eager_losses(torch.bfloat16), torch.bfloat16)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}


def test_autocast_around_the_whole_loop():
    """Autocast keeps its cast of A until the context is left: stock trains on an old A, we do not."""

    def run():
        model = llama()
        with torch.autocast("cpu", torch.bfloat16):
            return train(model)

    expected = eager_losses(torch.bfloat16)
    follows(run(), expected, torch.bfloat16)
    with mica.fast.disabled():
        assert ((run() - expected).abs() / expected).max() > 0.1


def test_autocast_fp16_with_a_gradient_scaler():
    def run(model):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def step(loss, optimizer):
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        losses = train(model, step=step, autocast=torch.float16)
        assert scaler.get_scale() == 1024.0  # no step was skipped for an Inf
        return losses

    model = llama()
    with on_the_fast_path(model, STEPS):
        losses = run(model)
    with mica.fast.disabled():
        expected = run(llama())
    follows(losses, expected, torch.float16)


def test_bf16_base_with_fp32_masters():
    model = llama(dtype=torch.bfloat16)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    with on_the_fast_path(model, STEPS):
        losses = train(model)
    follows(losses, eager_losses(dtype=torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with on_the_fast_path(model, 2 * STEPS, STEPS):  # every layer's forward runs again in the backward
        losses = train(model)
    follows(losses, eager_losses())


# ---------------------------------------------------------------------------------------------------
# accelerate
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerate():
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_with_gradient_accumulation(mixed_precision):
    """Two half batches a step are one whole one."""
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=2, cpu=True)
    model = llama()
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    losses = []
    with on_the_fast_path(model, 2 * STEPS):
        for half in batches().flatten(0, 1).split(2):
            with accelerator.accumulate(prepared):
                loss = prepared(input_ids=half, labels=half).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    mean = torch.tensor(losses).view(STEPS, 2).mean(1)
    if mixed_precision == "no":
        follows(mean, eager_losses())
    else:
        follows(mean, eager_losses(torch.bfloat16), torch.bfloat16)


# ---------------------------------------------------------------------------------------------------
# trainers
# ---------------------------------------------------------------------------------------------------


class _Recorded:
    """The loss of every forward, unrounded."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def compute_loss(self, *args, **kwargs):
        result = super().compute_loss(*args, **kwargs)
        self.seen.append((result[0] if isinstance(result, tuple) else result).item())
        return result


class _Trainer(_Recorded, Trainer):
    pass


class _SFTTrainer(_Recorded, SFTTrainer):
    pass


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


def trainer_of(model, folder, **options):
    rows = [{"input_ids": ids, "labels": ids} for ids in batches(1)[0]]
    arguments = TrainingArguments(str(folder), **{**OPTIONS, "max_steps": 4, **options})
    return _Trainer(model=model, args=arguments, train_dataset=rows)


def test_trainer_saves_and_resumes(tmp_path):
    """Four steps in one go are the plain loop's; two, a new model, and the other two are the same bits."""
    model = llama()
    trainer = trainer_of(model, tmp_path / "whole")
    with on_the_fast_path(model, 4):
        trainer.train()
    follows(trainer.seen, eager_losses(data=batches(4)))

    first = trainer_of(llama(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    first.train()
    model = llama()
    resumed = trainer_of(model, tmp_path)
    with on_the_fast_path(model, 2):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert first.seen + resumed.seen == trainer.seen


@pytest.mark.parametrize("bf16", [False, True])
def test_sft_trainer_with_peft_config(tmp_path, bf16):
    """trl wraps the model itself, and turns gradient checkpointing on by default."""
    rows = Dataset.from_dict({"text": [TEXT[start : start + 40] for start in (0, 40, 80, 120)]})

    def trainer():
        torch.manual_seed(0)
        config = LoraConfig(init_lora_weights="mica", r=4, lora_alpha=8, target_modules="all-linear")
        arguments = SFTConfig(str(tmp_path), **OPTIONS, max_steps=4, max_length=32, bf16=bf16)
        return _SFTTrainer(
            model=tiny_llama(initializer_range=0.3),
            args=arguments,
            train_dataset=rows,
            peft_config=config,
            processing_class=byte_tokenizer(),
        )

    ours = trainer()
    forwards = 8 if ours.args.gradient_checkpointing else 4
    with on_the_fast_path(ours.model, forwards, 4):
        ours.train()
    for name, parameter in trainable(ours.model).items():
        assert "lora_A" in name
        assert parameter.dtype == torch.float32
    stock = trainer()
    with mica.fast.disabled():
        stock.train()
    follows(ours.seen, stock.seen, torch.bfloat16 if bf16 else torch.float32)


# ---------------------------------------------------------------------------------------------------
# configurations
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2}},
        {"alpha_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 32}},
        {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 5}, "use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"targets": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    ],
    ids=lambda config: ",".join(config),
)
def test_configurations(config):
    model = llama(**config)
    with on_the_fast_path(model, STEPS):
        losses = train(model)
    follows(losses, eager_losses(**config))
    assert losses[-1] != pytest.approx(eager_losses()[-1].item(), abs=1e-4)  # it does something


def test_trainable_biases():
    def run():
        model = models.wrap(
            models.tiny_llama(initializer_range=0.3, attention_bias=True),
            targets="all-linear",
            bias="lora_only",
        ).train()
        return model, train(model)

    model, losses = run()
    rows = mica.fast.explain(model).rows
    assert {row.path for row in rows} == {"reference"}
    assert (
        sum("base layer called: the base bias is trainable" in row.reason for row in rows) == 8
    )  # q, k, v, o
    assert any(name.endswith("base_layer.bias") for name in trainable(model))
    with mica.fast.disabled():
        follows(losses, run()[1])


def test_lora_bias_is_refused_as_by_stock():
    with pytest.raises(
        ValueError, match=r"lora_bias=True is only supported with init_lora_weights=True or False"
    ):
        LoraConfig(init_lora_weights="mica", lora_bias=True)
