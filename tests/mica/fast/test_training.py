"""Every way in which PEFT users train, in one process: on the fast path, with the losses of a plain run."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from training import STEPS, batches, eager_losses, follows, llama, on_the_fast_path, optimizer_of, train, trainable

import mica.fast

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
